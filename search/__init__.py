"""Optuna: what varies, the study, one trial, the worker."""
