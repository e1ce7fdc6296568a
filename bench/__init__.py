"""Benchmarks anyone can run: each prints one table and says what it compares."""
