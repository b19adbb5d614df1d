"""Tools that make, check and convert data files; run as python -m data.NAME."""
