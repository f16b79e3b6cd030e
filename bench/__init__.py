"""The benchmark, run from a checkout as `python -m bench`; not installed with the package. See docs/benchmarks.md."""
