"""`fieldsmith sample`: draw images of prompts, or run an editing session from an image.

Out: a grid, one row a prompt, and beside it a folder with each image at full size, which says in its file what it is.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.config import Count, Pixels, SamplerSteps, Seed, Words, config
from fieldsmith.errors import InputError
from fieldsmith.models import pipeline_folder
from fieldsmith.read import read_prompts
from fieldsmith.run import check_out, plain

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@config
class SampleConfig:
    """Draw images: a grid with one row a prompt, and each at full size in a folder beside it."""

    prompts: tuple[str, ...] = ()
    """Prompts (or class names) to draw, e.g. `--prompts "a red star" "a blue ring"`, or one text file with a prompt a
    line; '' for a model without any."""
    image: pathlib.Path | None = None
    """For editors: where a session starts; the prompts are its turns, each on what the last one made."""
    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, or a zoo model."""
    adapter: Words = ()
    """Adapters (of any trainer) in the base: FILE, FILE:scale or a run's adapter/, --adapter again for each."""
    config_from: str = ""
    """Of a model in one .safetensors file: the pipeline folder or hub id that its config and tokenizers come from."""
    side_by_side: bool = False
    """Left of each image, what the base without --adapter draws at the same seed."""
    out: pathlib.Path = pathlib.Path("sample.png")
    """The grid to write: .png, .jpg or .webp; the images go into the folder NAME-images beside it, in the same format,
    with prompt, seed and settings in each (PNG text, or EXIF)."""
    each: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Images per prompt."""
    steps: SamplerSteps = 28
    """Sampler steps."""
    guidance: float | None = None
    """Guidance scale, against no prompt or, with --worse, against that network; none and 1 are off."""
    worse: str | None = None
    """A worse network of the same images to steer away from, such as the guide/ of a sharpen run."""
    variance: Literal["none", "small", "large", "learned"] = "none"
    """DDPM's ancestral steps under this variance; none: DDIM, or small with --worse. A flow has Euler's steps alone."""
    schedule: str = "constant"
    """constant; tag: from 1 at noise to 4 at data; or a metrics.json of `diagnose`: its a*(t) multiplies --guidance."""
    resolution: Pixels | None = None
    """Image side in pixels; None: the model's own, at most 512."""
    chunk: Count | None = None
    """Images that are drawn at once; None: fewer the larger they are."""
    seed: Seed = 0
    """Of the first image of each prompt; the next ones have the seeds after it, whatever is drawn at once."""


def sample(words: Sequence[str]) -> Answer:
    """fieldsmith sample --prompts WORDS [--field value ...]. Raises InputError before anything is drawn."""
    config = arguments.parse(SampleConfig(), arguments.of_runs(words), "sample")
    prompts = read_prompts(config.prompts)
    if not prompts:
        raise InputError('no prompt given; name what to draw, e.g. --prompts "a red star"')
    config = dataclasses.replace(config, prompts=prompts)
    check_out(config.out, folder=False)
    if config.out.suffix.lower() not in SUFFIXES:
        raise InputError(f"out '{config.out}' has no suffix of a format; end it in {', '.join(SUFFIXES)}")
    check_out(images_of(config.out), folder=True)
    if config.side_by_side and (not config.adapter or config.image or config.worse or config.variance != "none"):
        raise InputError("--side-by-side goes with --adapter, and with --prompts alone; leave out one of them")
    pipeline_folder(config.model)  # an unknown zoo model is refused now
    from fieldsmith import sampling  # imports torch: once the words are known to be good
    from fieldsmith.report.grid import picture, save_grid, save_picture

    if config.image:
        turns = sampling.session(config)
        images, columns = turns.flatten(0, 1), turns.shape[1]
        what = f"{config.each} sessions of {len(prompts)} turns"
        about = [
            (f"{row:03}-turn-{turn}", {"prompt": "" if not turn else prompts[turn - 1], "seed": str(config.seed)})
            for row in range(config.each) for turn in range(columns)
        ]  # fmt: skip
    else:
        drawn = sampling.drawn(config)
        images, columns, about = drawn.images, drawn.columns, drawn.about
        what = f"{len(images)} images"
    save_grid(images, config.out, columns=columns, scale=max(1, 128 // images.shape[-1]))
    settings = {name: value for name, value in plain(config).items() if name not in ("prompts", "out", "seed", "each")}
    files = [config.out]
    for image, (name, text) in zip(images, about, strict=True):
        file = images_of(config.out) / f"{name}{config.out.suffix}"
        save_picture(picture(image), file, {**text, "settings": json.dumps(settings, ensure_ascii=False)})
        files.append(file)
    print(f"{what}: {config.out}, each at full size in {images_of(config.out)}")
    return answer(metrics={"images": len(images)}, files=files)


def images_of(out: pathlib.Path) -> pathlib.Path:
    """The folder beside a grid for what it shows."""
    return out.with_name(f"{out.stem}-images")
