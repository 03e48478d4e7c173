"""Where the study trains: a model, its states and the arm's settings -> the trained model and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fieldsmith import verb
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Inputs
from fieldsmith.methods.sharpen.verb import SHARPEN

Settings = dict[str, Any]
# an arm's settings that say how much it trains, on what, and how it is sampled; all others are the verb's own
OF_STUDY = {"of", "points", "times more", "times steps", "laplacian", "scale", "filter"}


@dataclass(frozen=True)
class Trained:
    """`share`: the length of the term's gradient over the rest's."""

    model: Any
    seconds: float
    forwards: int
    share: float | None


def of_verb(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in OF_STUDY}


def fit(model: Any, states: Tensor, **settings: Any) -> Trained:
    """Train in place by `sharpen`."""
    config = SharpenConfig(**{"method": "plain", "share_every": 100, **settings})
    job, done = verb.train(SHARPEN, model, config, Inputs(states=states))
    return Trained(model, done.seconds, done.nfe, job.facts()["gradient share"])
