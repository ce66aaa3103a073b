"""The tables of the five papers, taken anew: see :mod:`benchmarks.papers.__main__`."""
