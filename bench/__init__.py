"""Measurements: `speed/` against other libraries, `results/` of the method's experiments."""
