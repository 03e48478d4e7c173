"""What is measured of a model: detection, distances, intervals, side effects, guidance, smoothness, exposure, attacks.

In: models, images in [0, 1], verdicts (n,) bool; the caller brings data, judges and worlds, and this room knows none.
Out: numbers with intervals. diagnose/ puts some of them together as one answer about a model, with its page.
"""
