"""The Prefect flows and the `cmran` command.

Importing this package makes OpenMP threads wait passively (`cmran.utils.device.set_passive_openmp_waiting`). That must
happen before torch is loaded.
"""

from cmran.utils.device import set_passive_openmp_waiting

set_passive_openmp_waiting()
