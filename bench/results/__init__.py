"""Experiments of the method: what becomes RESULTS.md (`python -m bench.results`)."""
