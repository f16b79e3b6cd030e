"""Measurements of gemmconv, run from a checkout as `python -m bench`; not part of the installed package."""
