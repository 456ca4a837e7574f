"""Prefect flows and the `cmran` command.

Importing this package has OpenMP wait passively, as a process that runs a command or a flow should
(`cmran.utils.device.set_passive_openmp_waiting`). It must come before torch is loaded.
"""

from cmran.utils.device import set_passive_openmp_waiting

set_passive_openmp_waiting()
