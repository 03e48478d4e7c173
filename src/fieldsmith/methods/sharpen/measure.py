"""What is looked at before and after `sharpen`: samples from equal noise, each with its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.sampling import draw
from fieldsmith.previews import FEW, Preview
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


def preview(config: SharpenConfig, job: Job) -> Preview:
    """Samples from equal noise."""
    labels = [f"sample {i + 1}" for i in range(FEW)]
    return Preview(labels, lambda model: model.decode(draw(model, FEW, config.sampler_steps, config.seed + 1)))
