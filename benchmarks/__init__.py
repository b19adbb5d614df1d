"""Measurements: speed, transfer, equality before and after a change; python -m benchmarks.NAME."""
