"""`fieldsmith sample` and `fieldsmith evaluate`: draw a grid of images, or judge what a model draws.

In: the words after the command. Out: a PNG, or a table of verdicts and a JSON file.
"""

from __future__ import annotations

import pathlib
from typing import Literal

from fieldsmith.config import Count, Seed, config


@config
class SampleConfig:
    """Draw a grid of images: one row a prompt."""

    prompts: tuple[str, ...] = ()
    """Prompts (or class names) to draw, e.g. `--prompts "a red star" "a blue ring"`; '' for a model without any."""
    image: pathlib.Path | None = None
    """For editors: where a session starts; the prompts are its turns, each on what the last one made."""
    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, or a zoo model."""
    adapter: pathlib.Path | None = None
    """A LoRA folder to attach first, such as a run's adapter/."""
    out: pathlib.Path = pathlib.Path("sample.png")
    """The PNG to write."""
    each: Count = 8
    """Images per prompt."""
    steps: Count = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale, against no prompt or, with --worse, against that network; none and 1 are off."""
    worse: str | None = None
    """A worse network of the same images to steer away from, such as the guide/ of a sharpen run."""
    variance: Literal["none", "small", "large", "learned"] = "none"
    """DDPM's ancestral steps under this variance; none: DDIM, or small with --worse."""
    schedule: str = "constant"
    """constant; tag: from 1 at noise to 4 at data; or a metrics.json of `diagnose`: its a*(t) multiplies --guidance."""
    resolution: Count | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    seed: Seed = 0
    """Equal seeds give equal noise."""


@config
class EvaluateConfig:
    """Judge what a model draws for every composition of its world, and print the table."""

    model: str = "zoo:shapes-flux"
    """A zoo model, or a pipeline folder whose card.json names its world."""
    adapter: pathlib.Path | None = None
    """A LoRA folder to attach first, such as a run's adapter/."""
    out: pathlib.Path | None = None
    """A JSON file to write the numbers to."""
    each: Count = 16
    """Images per prompt."""
    steps: Count = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale; none and 1 are off."""
    resolution: Count | None = None
    """Image side in pixels; None: the model's own."""
    seed: Seed = 0
    """Equal seeds give equal noise."""
