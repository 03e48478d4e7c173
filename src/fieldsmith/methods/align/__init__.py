"""`align`: a reward pulls the field (reward score matching, arXiv 2604.17415), and the methods that it unifies.

In: a model, prompts, a reward. Out: an adapter that raises the reward, and what it cost.
config.py settings and recipes (no torch), schedule.py the scalars of a step and the strengths, rollouts.py the rows,
guidance.py estimates of the value's gradient, losses.py the equations, auxiliary.py learned helpers, loop.py the run.
"""
