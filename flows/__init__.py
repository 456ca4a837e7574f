"""Prefect flows and the `cmran` command."""
