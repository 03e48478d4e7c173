"""What is looked at before and after `sharpen`: samples from equal noise, each with its verdict.

Where nobody judges them: how sharp the field is along the paths of some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fieldsmith.measure.smoothness import Profile, profile
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.sampling import conditioned, draw, judges, spread
from fieldsmith.previews import FEW, Preview
from fieldsmith.verb import Job, Side

PATHS, LOOKS, ITERATIONS = 4, 3, 4  # a profile's paths, the times at which it looks, and those of a norm


@dataclass(frozen=True)
class Samples:
    """Images (n, channels, size, size) in [0, 1], what each was asked for, and what the world's judge says of them."""

    images: Tensor
    asked: list[str]
    verdicts: Any = None  # worlds/judged.py
    sharpness: Profile | None = None  # where there is no judge


def measure(model: Any, config: SharpenConfig, job: Job, side: Side) -> Samples:
    """The same noise on both sides."""
    asked = spread(job.context, config.samples)
    images = model.decode(draw(model, config.samples, config.sampler_steps, config.seed + 1, prompts=asked))
    if judges(job.inputs.world):
        return Samples(images, asked, job.inputs.world.judge(images))
    generator = torch.Generator().manual_seed(config.seed + 2)
    some = spread(job.context, PATHS)
    with model.uncounted():
        sharpness = profile(
            conditioned(model, model.encode(some)), model.noise(PATHS, generator), model.grid(config.sampler_steps),
            generator, clip=model.clip, every=max(1, config.sampler_steps // LOOKS), iterations=ITERATIONS,
        )  # fmt: skip
    return Samples(images, asked, sharpness=sharpness)


def preview(config: SharpenConfig, job: Job) -> Preview:
    """Samples from equal noise."""
    asked = spread(job.context, FEW)
    labels = [prompt or f"sample {i + 1}" for i, prompt in enumerate(asked)]
    return Preview(
        labels,
        lambda model: model.decode(draw(model, FEW, config.sampler_steps, config.seed + 1, prompts=asked)),
    )
