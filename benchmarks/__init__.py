"""Benchmarks: one program per kind of work. `docs/performance.md` has the results.

Importing this package sets passive waiting for OpenMP, as the `cmran` command does.
"""

from cmran.utils.device import set_passive_openmp_waiting

set_passive_openmp_waiting()
