"""Measurements: speed, transfer, equality before and after a change; run as python -m benchmarks.NAME."""
