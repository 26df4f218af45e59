"""Benchmarks, and their results; installed as `mpicoll.bench`."""
