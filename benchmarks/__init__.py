"""What is fast is shown here: one small program a kind of work, see README.md.

Importing this package has OpenMP wait passively, as the `cmran` command does.
"""

from cmran.utils.device import set_passive_openmp_waiting

set_passive_openmp_waiting()
