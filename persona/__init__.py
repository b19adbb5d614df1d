"""Interviews for the demographic bias test, and what was said in them."""
