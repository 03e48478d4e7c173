"""The verbs: each a configuration, pure losses, and one loop over them.

In: a `Model`, a config dataclass, a run directory. Out: a trained model and a Result with what it cost.
Methods know models and samplers, never diffusers, and not each other.
"""
