"""Prefect flows and the `cmran` command.

Importing this package has OpenMP wait passively, as a process that runs a command or a flow should
(`cmran.utils.device.openmp_waits_passively`). It must come before torch is loaded.
"""

from cmran.utils.device import openmp_waits_passively

openmp_waits_passively()
