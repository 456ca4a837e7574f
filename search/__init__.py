"""Hyperparameter search with Optuna: search space, study, one trial, and the worker that runs trials."""
