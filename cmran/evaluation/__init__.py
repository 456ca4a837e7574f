"""Evaluation: metrics of predicted segments and events, and their plots and tables."""
