"""The capabilities behind the commands and the flows, one module each: Parameters, Result and `run`.

The parameter records are the only description of an option: the `cmran` command, Prefect's forms and the checks of both
are generated from them.
"""
