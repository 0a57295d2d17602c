"""Benchmarks: `python -m sparsekit.bench attention`. Needs rich, for figures matplotlib: the extra `bench`."""
