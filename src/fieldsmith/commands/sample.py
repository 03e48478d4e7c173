"""`fieldsmith sample`: draw a grid of images, one row a prompt, or run an editing session from an image."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fieldsmith.commands import arguments
from fieldsmith.config import Pixels, SamplerSteps, Seed, config
from fieldsmith.errors import InputError
from fieldsmith.models import pipeline_folder
from fieldsmith.read import read_prompts
from fieldsmith.run import check_out


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
    each: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Images per prompt."""
    steps: SamplerSteps = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale, against no prompt or, with --worse, against that network; none and 1 are off."""
    worse: str | None = None
    """A worse network of the same images to steer away from, such as the guide/ of a sharpen run."""
    variance: Literal["none", "small", "large", "learned"] = "none"
    """DDPM's ancestral steps under this variance; none: DDIM, or small with --worse."""
    schedule: str = "constant"
    """constant; tag: from 1 at noise to 4 at data; or a metrics.json of `diagnose`: its a*(t) multiplies --guidance."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    seed: Seed = 0
    """Equal seeds give equal noise."""


def sample(words: Sequence[str]) -> None:
    """fieldsmith sample --prompts WORDS [--field value ...]. Raises InputError before anything is drawn."""
    config = arguments.parse(SampleConfig(), list(words), "sample")
    prompts = read_prompts(config.prompts)
    if not prompts:
        raise InputError('no prompt given; name what to draw, e.g. --prompts "a red star"')
    config = dataclasses.replace(config, prompts=prompts)
    check_out(config.out, folder=False)
    pipeline_folder(config.model)  # an unknown zoo model is refused now
    from fieldsmith import sampling  # imports torch: once the words are known to be good
    from fieldsmith.report.grid import save_grid

    if config.image:
        turns = sampling.session(config)
        images, columns = turns.flatten(0, 1), turns.shape[1]
        what = f"{config.each} sessions of {len(prompts)} turns"
    else:
        images = sampling.sampler_of(config)([prompt for prompt in prompts for _ in range(config.each)], config.seed)
        what, columns = f"{len(images)} images", config.each
    save_grid(images, config.out, columns=columns, scale=max(1, 128 // images.shape[-1]))
    print(f"{what}: {config.out}")
