"""`sample` and `evaluate`: what a model draws, and what its world's judge says of it.

In: the words after the verb. Out: a PNG grid, or a table of verdicts.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError
from fieldsmith.read import read_json, read_prompts


@dataclass(frozen=True)
class SampleConfig:
    """Draw a grid of images: one row a prompt."""

    prompts: tuple[str, ...] = ()
    """Prompts (or class names) to draw, e.g. `--prompts "a red star" "a blue ring"`, or a text file with one a line."""
    image: pathlib.Path | None = None
    """For editors: where a session starts; the prompts are its turns, each on what the last one made."""
    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, or a zoo model."""
    adapter: pathlib.Path | None = None
    """A LoRA folder to attach first, such as a run's adapter/."""
    out: pathlib.Path = pathlib.Path("sample.png")
    """The PNG to write."""
    each: int = 8
    """Images per prompt."""
    steps: int = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale, against no prompt or, with --worse, against that network; none and 1 are off."""
    worse: str | None = None
    """A worse network of the same images to steer away from, such as the guide/ of a sharpen run."""
    variance: Literal["none", "small", "large", "learned"] = "none"
    """DDPM's ancestral steps under this variance; none: DDIM, or small with --worse."""
    schedule: str = "constant"
    """constant; tag: from 1 at noise to 4 at data; or a metrics.json of `diagnose`: its a*(t) multiplies --guidance."""
    resolution: int | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    seed: int = 0
    """Equal seeds give equal noise."""


def sample(words: Sequence[str]) -> None:
    config = arguments.parse(SampleConfig(), list(words), "sample")
    config = dataclasses.replace(config, prompts=read_prompts(config.prompts))
    if not config.prompts:
        raise InputError('no prompt given; name what to draw, e.g. --prompts "a red star"')
    arguments.at_least(config, 1, "each", "steps", "resolution")
    arguments.check_out(config.out, folder=False)
    if config.image:
        _session(config)
        return
    draw = _ancestral(config) if config.worse or config.variance != "none" else _sampler(config)
    from fieldsmith.report.grid import save_grid

    images = draw([prompt for prompt in config.prompts for _ in range(config.each)], config.seed)
    scale = max(1, 128 // images.shape[-1])
    save_grid(images, config.out, columns=config.each, scale=scale)
    print(f"{len(images)} images: {config.out}")


def _session(config: SampleConfig) -> None:
    """A session from an image, `each` times: one row a time, a column a turn after the start."""
    import torch

    from fieldsmith.models import load, load_adapter
    from fieldsmith.models.editing import check_editor, edit, encode_unique, quantised
    from fieldsmith.report.grid import save_grid
    from fieldsmith.sessions import Session, load_images
    from fieldsmith.training import step_generator

    model = load(config.model, config.resolution)
    check_editor(model)
    if config.adapter:
        load_adapter(model, config.adapter)
    assert config.image and hasattr(model, "resolution")
    start = Session("0", config.image, config.prompts)
    now = quantised(load_images([start], model.resolution)).expand(config.each, -1, -1, -1)
    turns = [now]
    for turn, words in enumerate(config.prompts):
        generator = step_generator(config.seed, turn)
        now = edit(model, encode_unique(model, [words] * config.each), now, generator, config.steps, config.guidance)
        turns.append(now)
    images = torch.stack(turns, 1).flatten(0, 1)
    save_grid(images, config.out, columns=len(turns), scale=max(1, 128 // images.shape[-1]))
    print(f"{config.each} sessions of {len(config.prompts)} turns: {config.out}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge what a model draws for every composition of its world, and print the table."""

    model: str = "zoo:shapes-flux"
    """A zoo model, or a pipeline folder whose card.json names its world."""
    adapter: pathlib.Path | None = None
    """A LoRA folder to attach first, such as a run's adapter/."""
    out: pathlib.Path | None = None
    """A JSON file to write the numbers to."""
    each: int = 16
    """Images per prompt."""
    steps: int = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale; none and 1 are off."""
    resolution: int | None = None
    """Image side in pixels; None: the model's own."""
    seed: int = 0
    """Equal seeds give equal noise."""


def evaluate(words: Sequence[str]) -> None:
    config = arguments.parse(EvaluateConfig(), list(words), "evaluate")
    arguments.at_least(config, 1, "each", "steps", "resolution")
    if config.out:
        arguments.check_out(config.out, folder=False)
    from fieldsmith.models import pipeline_folder
    from fieldsmith.worlds.model_cards import world_of

    pipeline_folder(config.model)  # a name that is no model is refused as such
    world = world_of(config.model)
    if world is None:
        raise InputError(
            f"no judge knows the images of '{config.model}': it has no card.json that names a world; use a zoo model"
        )
    draw = _sampler(config)
    import json

    from rich.console import Console
    from rich.table import Table

    from fieldsmith.measure.detection import ask, right_by_group
    from fieldsmith.run import write_atomically
    from fieldsmith.worlds.shapes import concepts
    from fieldsmith.worlds.shapes_groups import attributes

    rows = right_by_group(ask(draw, world, concepts(), config.each, config.seed), attributes())
    table = Table(title=f"{config.model}, {config.steps} steps, {config.each} images a prompt", title_justify="left")
    table.add_column("prompts")
    table.add_column("judged right [95%], n", justify="right")
    for name, interval in rows.items():
        table.add_row(name, str(interval))
    Console().print(table)
    if config.out:
        numbers = {k: {"value": v.value, "low": v.low, "high": v.high, "n": v.n} for k, v in rows.items()}
        write_atomically(config.out, json.dumps(numbers, indent=1) + "\n")


def _sampler(config: SampleConfig | EvaluateConfig):  # type: ignore[no-untyped-def]
    from fieldsmith.measure.drawing import sampler
    from fieldsmith.models import load, load_adapter

    model = load(config.model, config.resolution)
    if config.adapter:
        load_adapter(model, config.adapter)
    return sampler(model, config.steps, _guidance(model, config))


def _ancestral(config: SampleConfig):  # type: ignore[no-untyped-def]
    """Stochastic steps, steered away from a worse network where one is named."""
    from fieldsmith.methods.sharpen.sampling import conditioned, draw, steered
    from fieldsmith.models import load
    from fieldsmith.paths import VariancePreserving

    model = load(config.model, config.resolution)
    if not isinstance(model.path, VariancePreserving):
        raise InputError(f"{config.model} is on rectified flow; --worse and --variance are for DDPM schedules")
    if config.adapter or config.schedule != "constant":
        raise InputError("--adapter and --schedule go with DDIM steps; leave out --worse and --variance")
    variance = "small" if config.variance == "none" else config.variance
    if variance == "learned" and not getattr(model, "learns_variance", False):
        raise InputError(f"{config.model} learns no variance; use --variance small or large")
    worse = load(config.worse, config.resolution) if config.worse else None

    def images(prompts: Sequence[str], seed: int) -> Any:
        field = conditioned(model, model.encode(prompts))
        if worse:
            field = steered(field, conditioned(worse, worse.encode(prompts)), config.guidance or 1.0)
        states = draw(model, len(prompts), config.steps, seed, field, variance, batch=len(prompts))
        return model.decode(states)

    return images


def _guidance(model: Any, config: SampleConfig | EvaluateConfig) -> Any:
    """A scale, or a schedule of scales in time. Raises InputError at a file that holds no recalibration."""
    schedule = getattr(config, "schedule", "constant")
    if schedule == "constant":
        return config.guidance
    from fieldsmith.paths import recalibrated, tag_schedule

    if schedule == "tag":
        return tag_schedule(model.path)
    try:
        states = read_json(schedule, "schedule")["states"]
        bins = list(states.values())[-1]["bins"]  # those on the teacher's guided path, where sampling takes place
        ends, factors = [one["t_high"] for one in bins], [float(one["recalibration"]) for one in bins]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"schedule '{schedule}' is neither constant, tag nor a metrics.json of `fieldsmith diagnose`"
        ) from error
    if config.guidance is None:
        raise InputError("a recalibrated schedule needs a scale to multiply; add --guidance 2")
    return recalibrated(config.guidance, ends, factors)
