"""`pretrain`, `sample` and `reproduce`: making models, drawing with them, and repeating the papers' claims.

In: the words after the verb. Out: a zoo model, a PNG grid, a table of verdicts, or results/VERB.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError, check_word

RECIPES: dict[str, dict[str, Any]] = {  # what each changes of the recipe in zoo/shapes_flux.py
    "shapes-flux": {},
    "shapes-flux-small": {"heads": 1, "steps": 6_000},  # right in half of its images: room for a reward
}
CLASS_RECIPES: dict[str, dict[str, Any]] = {  # of the recipe in zoo/class_unet.py
    "digits-unet": {},
    "shapes-unet": {"data": "shapes", "widths": (24, 48, 64), "steps": 5_500},
}
JUDGED_RECIPES: dict[str, dict[str, Any]] = {"columns-ddpm": {}}  # of the recipe in zoo/judged_ddpm.py
EDITOR_RECIPES: dict[str, dict[str, Any]] = {"scenes-kontext": {}}  # of the recipe in zoo/scenes_kontext.py
CLAIMS = ("erase", "align", "distill", "sharpen", "edit")


def pretrain(words: Sequence[str]) -> None:
    """fieldsmith pretrain RECIPE --out DIR [--field value ...]; resumes where it was interrupted."""
    recipe, rest = _first(words, (*RECIPES, *CLASS_RECIPES, *JUDGED_RECIPES, *EDITOR_RECIPES), "pretrain", "recipes")
    out = arguments.take(rest, "--out")
    from fieldsmith.zoo import class_unet, judged_ddpm, scenes_kontext, shapes_flux

    default: Any
    if recipe in RECIPES:
        default = shapes_flux.ShapesFlux(**RECIPES[recipe])
    elif recipe in JUDGED_RECIPES:
        default = judged_ddpm.JudgedDDPM(**JUDGED_RECIPES[recipe])
    elif recipe in EDITOR_RECIPES:
        default = scenes_kontext.ScenesKontext(**EDITOR_RECIPES[recipe])
    else:
        default = class_unet.ClassUNet(**CLASS_RECIPES[recipe])
    config = arguments.parse(default, rest, f"pretrain {recipe}", "Also: --out DIR, the folder to write.")
    if out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{recipe}")
    counts = ("images", "sessions", "heads", "layers", "vae_steps", "vae_batch", "steps", "batch", "threads")
    arguments.at_least(config, 1, *(name for name in counts if hasattr(config, name)))
    arguments.at_least(config, 0, *(name for name in ("vae_lr", "kl", "lr", "ema") if hasattr(config, name)))
    arguments.check_out(pathlib.Path(out), folder=True)
    if isinstance(config, class_unet.ClassUNet):
        class_unet.train(config, pathlib.Path(out))
    elif isinstance(config, judged_ddpm.JudgedDDPM):
        judged_ddpm.train(config, pathlib.Path(out))
    elif isinstance(config, scenes_kontext.ScenesKontext):
        scenes_kontext.train(config, pathlib.Path(out))
    else:
        shapes_flux.train(config, pathlib.Path(out), recipe)
    print(f"pipeline: {pathlib.Path(out) / 'model'}")


@dataclass(frozen=True)
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


def reproduce(words: Sequence[str]) -> None:
    """fieldsmith reproduce VERB [--out results] [--field value ...]; resumable, one run at a time."""
    claim, rest = _first(words, CLAIMS, "reproduce", "verbs with claims")
    if claim == "align":
        from fieldsmith.reproduce import align

        align.main(arguments.parse(align.ReproduceAlign(), rest, "reproduce align"))
    elif claim == "distill":
        from fieldsmith.reproduce import distill

        distill.main(arguments.parse(distill.ReproduceDistill(), rest, "reproduce distill"))
    elif claim == "sharpen":
        from fieldsmith.reproduce import sharpen

        sharpen.main(arguments.parse(sharpen.ReproduceSharpen(), rest, "reproduce sharpen"))
    elif claim == "edit":
        from fieldsmith.reproduce import edit

        edit.main(arguments.parse(edit.ReproduceEdit(), rest, "reproduce edit"))
    else:
        from fieldsmith.reproduce import erase

        erase.main(arguments.parse(erase.ReproduceErase(), rest, "reproduce erase"))


def _first(words: Sequence[str], known: tuple[str, ...], verb: str, kind: str) -> tuple[str, list[str]]:
    if not words:
        raise InputError(f"no name given after `fieldsmith {verb}`; {kind}: {', '.join(known)}")
    if words[0] in ("-h", "--help"):
        print(f"usage: fieldsmith {verb} NAME [--field value ...]; {kind}: {', '.join(known)}")
        raise SystemExit(0)
    check_word(words[0], known, f"the {kind}")
    return words[0], list(words[1:])


def _sampler(config: SampleConfig):  # type: ignore[no-untyped-def]
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


def _guidance(model: Any, config: SampleConfig) -> Any:
    """A scale, or a schedule of scales in time. Raises InputError at a file that holds no recalibration."""
    schedule = getattr(config, "schedule", "constant")
    if schedule == "constant":
        return config.guidance
    from fieldsmith.paths import recalibrated, tag_schedule

    if schedule == "tag":
        return tag_schedule(model.path)
    import json

    try:
        states = json.loads(pathlib.Path(schedule).read_text(encoding="utf-8"))["states"]
        bins = list(states.values())[-1]["bins"]  # those on the teacher's guided path, where sampling takes place
        ends, factors = [one["t_high"] for one in bins], [float(one["recalibration"]) for one in bins]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"schedule '{schedule}' is neither constant, tag nor a metrics.json of `fieldsmith diagnose`"
        ) from error
    if config.guidance is None:
        raise InputError("a recalibrated schedule needs a scale to multiply; add --guidance 2")
    return recalibrated(config.guidance, ends, factors)
