"""The data folder: its files, reading, checking, making."""
