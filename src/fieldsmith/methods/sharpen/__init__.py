"""Training and sampling against hallucination: between models, samplers and `fieldsmith sharpen`.

In: a model on a variance-preserving path, the states of its data. Out: a score that decides, or paths that are chosen.
"""
