"""What is looked at before and after `sharpen`: samples from equal noise, each with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.sampling import draw
from fieldsmith.verb import Job, Side


@dataclass(frozen=True)
class Samples:
    """Images (n, channels, size, size) in [0, 1] and what the world's judge says of them."""

    images: Tensor
    verdicts: Any  # worlds/judged.py


def measure(model: Any, config: SharpenConfig, job: Job, side: Side) -> Samples:
    """The same noise on both sides."""
    images = model.decode(draw(model, config.samples, config.sampler_steps, config.seed + 1))
    return Samples(images, job.inputs.world.judge(images))
