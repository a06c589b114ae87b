"""Benchmarks: run `python benchmarks/bench_grouped.py` from the root of the repository."""
