"""Benchmarks of the fused operations: `make bench`, or `python -m benchmarks --help`."""
