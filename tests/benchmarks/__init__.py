"""Benchmarks: run by `make bench`, never by pytest. What each measures and its last numbers: README.md."""
