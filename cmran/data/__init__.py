"""The data folder: its files, reading, validation and the synthetic generator."""
