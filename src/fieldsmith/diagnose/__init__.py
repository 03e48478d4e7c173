"""What is undetermined or broken in a model, measured: concept presence, attacks on an erasure.

In: a model (or two samplers) and a world with a judge. Out: numbers with intervals, for metrics.json and the report.
"""
