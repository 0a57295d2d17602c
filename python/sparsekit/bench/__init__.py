"""Benchmarks: `python -m sparsekit.bench attention`."""
