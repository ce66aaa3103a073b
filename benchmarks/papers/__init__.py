"""The tables of the five papers, measured again: see :mod:`benchmarks.papers.__main__`."""
