"""Distances and rates with confidence intervals, and the report of what else changed ("the rest").

In: images in [0, 1], features (n, d), verdicts (n,) bool; the caller brings extractors, judges and models.
Out: `Interval`s, plain numbers, a `Rest`. Used by diagnose, commands and report; knows none of them.
"""
