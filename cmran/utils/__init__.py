"""Helpers without knowledge of the network: files, locks, devices, signals, progress, URIs."""
