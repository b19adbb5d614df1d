"""Rulers of responses: metrics, intervals, judges, and how figures are shown."""
