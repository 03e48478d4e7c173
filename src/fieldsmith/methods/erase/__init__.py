"""`erase`: a forbidden prompt gets what its anchor prompt would give (GEM, arXiv 2606.00140), and the baselines.

In: a text-conditional rectified-flow model, pairs of target and anchor prompts. Out: an adapter and its diagnostics.
config.py settings and presets (no torch), losses.py the equations, states.py where they are evaluated, loop.py the run.
"""
