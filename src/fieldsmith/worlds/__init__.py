"""Data whose truth is known: below methods, which learn from it, and beside rewards and metrics, which judge with it.

In: how many samples, and a seed or generator. Out: images with captions and an exact judge, or points and closed forms.
"""
