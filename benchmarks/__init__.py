"""What is fast is shown here: one small program a kind of work, see README.md.

Importing this package has OpenMP wait passively, as the `cmran` command does.
"""

from cmran.utils.device import openmp_waits_passively

openmp_waits_passively()
