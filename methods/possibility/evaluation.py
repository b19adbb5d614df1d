"""Figures of possibility numbers: the common ones, among them how stable numbers are over seeds."""

from methods import defaults

measure = defaults.common_only
tables = defaults.no_tables
