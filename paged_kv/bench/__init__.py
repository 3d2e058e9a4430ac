"""Measures policies against plain vLLM: the demo, and what the scripts in benchmarks/ share."""
