"""Images from a model: of prompts, of an editing session, by DDPM's own steps, under schedules of guidance."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.measure.drawing import Guidance, Sampler, sampler
from fieldsmith.methods.sharpen.sampling import conditioned, draw, steered
from fieldsmith.models import load, merge_adapters
from fieldsmith.models.core import Model, check_kept
from fieldsmith.models.editing import check_editor, edit, encode_unique, quantised
from fieldsmith.paths import VariancePreserving, recalibrated, tag_schedule
from fieldsmith.read import read_json
from fieldsmith.report.grid import picture
from fieldsmith.sessions import Session, frame_of, load_images
from fieldsmith.training import step_generator


def sample(
    model: Model | str,
    prompts: Sequence[str] | str,
    seed: int = 0,
    n: int = 4,
    *,
    steps: int = 28,
    guidance: float | None = None,
    adapter: str | pathlib.Path | Sequence[str | pathlib.Path] = (),
    config_from: str | pathlib.Path = "",
) -> list[Image.Image]:
    """n images of each prompt, prompt by prompt, as PIL pictures; equal seeds give equal noise.

    `model` is a Model as it stands or a name to load, with each `adapter`, FILE or FILE:scale, in its weights, and the
    config of a single file from `config_from`. Raises InputError at an unknown name or word, n or steps below 1.
    """
    for name, value in (("n", n), ("steps", steps)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if not isinstance(model, Model):
        model = load(model, adapter=adapter, config_from=config_from)
    elif adapter:
        raise InputError("adapter= goes with the name of a model; use load(name, adapter=...) for one that is loaded")
    check_kept(model, {f"n={n}": n})
    asked = [prompt for prompt in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(n)]
    if not asked:
        raise InputError('no prompt given; name what to draw, e.g. prompts=["a red star"]')
    return [picture(image) for image in sampler(model, steps, guidance)(asked, seed)]


def loaded(config: Any) -> Model:
    """The model of a command's settings, with its adapters."""
    model = load(config.model, config.resolution, adapter=config.adapter, config_from=config.config_from)
    model.chunk = config.chunk
    return model


@dataclass(frozen=True)
class Drawn:
    """Images (n, 3, h, w) in [0, 1], how many stand in a row of their grid, and each one's name and what it is."""

    images: Tensor
    columns: int
    about: list[tuple[str, dict[str, str]]]


def drawn(config: Any) -> Drawn:
    """What `fieldsmith sample` draws of prompts. Raises InputError where settings do not go together."""
    places = [(row, k) for row in range(len(config.prompts)) for k in range(config.each)]
    asked = [config.prompts[row] for row, _ in places]
    if config.worse or config.variance != "none":  # whose steps draw noise for all at once, from one seed
        about = [
            (f"{row:03}-{k:03}", {"prompt": config.prompts[row], "seed": str(config.seed), "number": str(i)})
            for i, (row, k) in enumerate(places)
        ]
        return Drawn(_ancestral(config)(asked, config.seed), config.each, about)
    seeds = [config.seed + k for _, k in places]
    about = [
        (f"{row:03}-{config.seed + k}", {"prompt": config.prompts[row], "seed": str(config.seed + k)})
        for row, k in places
    ]
    if not config.side_by_side:
        model = loaded(config)
        return Drawn(sampler(model, config.steps, _guidance(model, config))(asked, seeds), config.each, about)
    model = load(config.model, config.resolution, config_from=config.config_from)
    model.chunk = config.chunk
    draw = sampler(model, config.steps, _guidance(model, config))
    base = draw(asked, seeds)
    merge_adapters(model, config.adapter)
    pairs = torch.stack((base, draw(asked, seeds)), 1).flatten(0, 1)
    both = [(f"{name}{side}", words) for name, words in about for side in ("-base", "")]
    return Drawn(pairs, 2 * config.each, both)


def session(config: Any) -> Tensor:
    """A session from an image, `each` times: (each, turns + 1, 3, h, w), the start first."""
    model = loaded(config)
    check_editor(model)
    assert config.image and model.resolution
    start = Session("0", config.image, config.prompts)
    now = quantised(load_images([start], frame_of(model.resolution))).expand(config.each, -1, -1, -1)
    turns = [now]
    for turn, words in enumerate(config.prompts):
        generator = step_generator(config.seed, turn)
        now = edit(model, encode_unique(model, [words] * config.each), now, generator, config.steps, config.guidance)
        turns.append(now)
    return torch.stack(turns, 1)


def _ancestral(config: Any) -> Sampler:
    """The path's own steps, stochastic on a DDPM schedule, steered away from a worse network where one is named."""
    model = loaded(config)
    if config.variance != "none" and not isinstance(model.path, VariancePreserving):
        raise InputError(f"{config.model} is on rectified flow; --variance is for DDPM schedules, so leave it out")
    if config.schedule != "constant":
        raise InputError("--schedule goes with DDIM steps; leave out --worse and --variance")
    variance: Any = "small" if config.variance == "none" else config.variance
    if variance == "learned" and not getattr(model, "learns_variance", False):
        raise InputError(f"{config.model} learns no variance; use --variance small or large")
    worse = load(config.worse, config.resolution) if config.worse else None

    def images(prompts: Sequence[str], seed: int | Sequence[int]) -> Tensor:
        assert isinstance(seed, int)
        field = conditioned(model, model.encode(prompts))
        if worse:
            field = steered(field, conditioned(worse, worse.encode(prompts)), config.guidance or 1.0)
        return model.decode(draw(model, len(prompts), config.steps, seed, field, variance, batch=len(prompts)))

    return images


def _guidance(model: Model, config: Any) -> Guidance:
    """A scale, or a schedule of scales in time. Raises InputError at a file that holds no recalibration."""
    if config.schedule == "constant":
        return config.guidance  # type: ignore[no-any-return]
    if config.schedule == "tag":
        return tag_schedule(model.path)
    try:
        states = read_json(config.schedule, "schedule")["states"]
        bins = list(states.values())[-1]["bins"]  # those on the teacher's guided path, where sampling takes place
        ends, factors = [one["t_high"] for one in bins], [float(one["recalibration"]) for one in bins]
    except (InputError, KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(
            f"schedule '{config.schedule}' is neither constant, tag nor a metrics.json of `fieldsmith diagnose`"
        ) from error
    if config.guidance is None:
        raise InputError("a recalibrated schedule needs a scale to multiply; add --guidance 2")
    return recalibrated(config.guidance, ends, factors)
