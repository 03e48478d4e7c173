"""`fieldsmith diagnose`: what a model kept, and what is broken, measured on a finished one.

In: the words after the verb. Out: a run directory with metrics.json and report.html; nothing is trained.
Instruments: --guidance, a student's classifier-free guidance against its teacher's; --smoothness, --exposure and
--judge-of-edits, each in a file of its own.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError

if TYPE_CHECKING:
    from fieldsmith.diagnose.guidance import Guidance, GuidedSampler, Tuples
    from fieldsmith.models.core import Model
    from fieldsmith.run import Run
    from fieldsmith.worlds.classes import Classes

INSTRUMENTS = {
    "guidance": "a student's guidance against its teacher's",
    "smoothness": "the sharpness of a score",
    "exposure": "an editor on its own results",
    "judge_of_edits": "a judge of edits against known truth",
}
NOISED, OWN_PATH = "noised data", "the teacher's guided path"  # the two kinds of states


@dataclass(frozen=True)
class DiagnoseConfig:
    """Measure what is left undetermined: a student's guidance, a score's sharpness, exposure bias, a judge."""

    guidance: bool = False
    """An instrument: classifier-free guidance, student against teacher."""
    smoothness: bool = False
    """An instrument: the score's Jacobian along a DDPM's sampling paths, and whether it tells bad samples."""
    exposure: bool = False
    """An instrument: an editor's sessions on its own results against planned sources, and asked for nothing."""
    judge_of_edits: str | None = None
    """An instrument: remote:http://HOST:PORT/v1?model=M&mode=direct&mode=expected&n=4&temperature=0.7, a server that
    sees images, asked n times in each mode that is named (none: all four) about edits whose truth is known."""
    model: str | None = None
    """The student, or the one model: a diffusers pipeline folder, a hub id or a zoo model."""
    adapter: pathlib.Path | None = None
    """With --exposure: a LoRA folder to attach first."""
    teacher: str | None = None
    """What it was distilled from, in the same states and with the same classes."""
    data: str | None = None
    """Models of classes: digits, shapes, or a folder with a subfolder of images a class; held-out images are used.
    With --smoothness: columns, cards or a folder; None: what the model's card names."""
    judge: str | None = None
    """With --smoothness and a folder: file.py:name, package.module:name or http:// address that says what is valid."""
    prompts: tuple[str, ...] = ()
    """Prompts or class names to follow, or one text file with one a line; empty: every class."""
    out: pathlib.Path | None = None
    """The run directory to write (new or empty)."""
    tuples: int = 2000
    """States of each kind at which both are asked; below about 1000, bins are noisy."""
    bins: int = 10
    """Equal bins of time."""
    steps: int = 25
    """Sampler steps of the teacher's path, and of the images for liveness; with --exposure, of every turn."""
    scale: float = 2.0
    """Guidance scale of the teacher's path."""
    samples: int = 32
    """Images of each model at each scale for liveness; 0 leaves it out. With --exposure: sessions, at least 100 for
    narrow intervals. With --judge-of-edits: instructions, each with 8 edits."""
    reference: float | None = None
    """E_c + E_u of another student, the yardstick of drift; None: the teacher's own mean squared gap."""
    chunk: int = 256
    """States per forward; lower it when memory is short."""
    resolution: int | None = None
    """Image side in pixels; None: the models' own, at most 512."""
    turns: int = 5
    """With --exposure: turns of a session."""
    dependency: float = 0.7
    """With --exposure: how often a turn refers to what an earlier turn made."""
    still: int = 5
    """With --exposure: turns that ask for nothing, for the drift of identity; 0 leaves it out."""
    contrast: float = 1.0
    """With --exposure, between turns: factor on the distance from mid grey."""
    blur: float = 0.0
    """With --exposure, between turns: weight of each pixel's 3 x 3 mean."""
    noise: float = 0.0
    """With --exposure, between turns: deviation of added noise, in [0, 1]."""
    seed: int = 0
    """Everything random follows from it."""


def diagnose(words: Sequence[str]) -> None:
    rest = list(words)
    path = arguments.take(rest, "--config")
    file = arguments.from_file(path, DiagnoseConfig, "diagnose") if path else {}
    notes = "Also: --config FILE.toml (such as a run's config.toml) sets fields; flags come last."
    run(arguments.parse(DiagnoseConfig(**file), rest, "diagnose", notes))


def check(config: DiagnoseConfig) -> None:
    """Raises InputError with the value and the fix; needs no model."""
    named = [f"--{name.replace('_', '-')}" for name in INSTRUMENTS if getattr(config, name)]
    if len(named) != 1:
        known = [f"--{name.replace('_', '-')} ({what})" for name, what in INSTRUMENTS.items()]
        raise InputError(
            f"{' and '.join(named)} are {len(named)} instruments; use one at a time" if named else
            f"no instrument named; add either {', '.join(known[:-1])} or {known[-1]}"
        )  # fmt: skip
    needed = {
        "guidance": [("model", "the student"), ("teacher", "what it was distilled from")],
        "smoothness": [("model", "a DDPM pipeline")],
        "exposure": [("model", "an editing model of the scenes world")],
    }
    for name, what in next((pairs for one, pairs in needed.items() if getattr(config, one)), []):
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; add --{name} FOLDER, {what}")
    if config.adapter is not None and not config.exposure:
        raise InputError(f"adapter '{config.adapter}' is read by --exposure alone; leave it out")
    if (config.exposure or config.judge_of_edits) and config.samples < 2:
        raise InputError(f"samples={config.samples} is too few for an interval; give at least 2")
    if config.exposure and config.turns < 2:
        raise InputError(f"turns={config.turns}: the first turn has no source of the editor's own; give at least 2")
    arguments.at_least(config, 1, "tuples", "bins", "steps", "chunk", "resolution")
    arguments.at_least(config, 0, "samples", "scale", "still", "noise")
    for name in ("dependency", "blur"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{name}={getattr(config, name)} is no share; give 0 to 1")
    if not 0 < config.contrast < float("inf"):
        raise InputError(f"contrast={config.contrast} must be above 0")
    if config.reference is not None and not config.reference > 0:
        raise InputError(f"reference={config.reference} must be above 0")


def run(config: DiagnoseConfig) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    if config.smoothness:
        from fieldsmith.commands import diagnose_smoothness

        return diagnose_smoothness.run(config)
    if config.exposure:
        from fieldsmith.commands import diagnose_exposure

        return diagnose_exposure.run(config)
    if config.judge_of_edits:
        from fieldsmith.commands import diagnose_judge

        return diagnose_judge.run(config)
    directory = arguments.directory_of(config, "diagnose")
    from rich.console import Console

    from fieldsmith.commands.diagnose_page import page_of
    from fieldsmith.diagnose.guidance import VERDICTS, ask, liveness, measure
    from fieldsmith.models import load
    from fieldsmith.read import read_prompts

    console = Console(stderr=True)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    began = time.monotonic()
    student, teacher = (load(str(name), config.resolution) for name in (config.model, config.teacher))
    check_pair(student, teacher)
    data = _data(config, teacher)
    prompts = read_prompts(config.prompts) or (data.names if data else ())
    if not prompts:
        raise InputError(f"{teacher.name} reads text; name what to draw with --prompts 'a prompt' 'another'")
    found: dict[str, Guidance] = {}
    with console.status("measuring"):
        for kind, tuples in _states(config, teacher, data, prompts).items():
            said = [ask(model, tuples, config.chunk) for model in (student, teacher)]
            found[kind] = measure(said[0], said[1], tuples.t, config.bins, config.reference)
        alive = None
        if config.samples:
            drawn = [prompts[i % len(prompts)] for i in range(config.samples)]
            alive = liveness(_sampler(student, config), _sampler(teacher, config), drawn, config.seed)
    directory.begin()
    where, worst = max(found.items(), key=lambda item: VERDICTS.index(item[1].verdict))
    metrics: dict[str, Any] = {
        "method": "diagnose",
        "instrument": "guidance",
        "seconds": time.monotonic() - began,
        "forward_equivalents": spent(config, len(found)),
        "verdict": worst.verdict,
        "words": worst.words,
        "where": where,
        "liveness": alive if alive is None or alive < float("inf") else None,
        "states": {kind: one.to_json() for kind, one in found.items()},
    }
    page_of(dataclasses.asdict(config), metrics, str(directory.folder)).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(f"{worst.words} (Seen on {where}.)")
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def check_pair(student: Model, teacher: Model) -> None:
    """Raises InputError where the two cannot be asked the same, or have no guidance to compare."""
    import torch

    for model in (student, teacher):
        _check_null(model)
    known = [getattr(model, "classes", None) for model in (student, teacher)]
    if known[0] != known[1]:
        raise InputError(
            f"the student knows {_listed(known[0])} and the teacher {_listed(known[1])}; give the teacher that "
            "the student was distilled from"
        )
    shapes = [tuple(model.noise(1, torch.Generator().manual_seed(0)).shape[1:]) for model in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise InputError(f"the student's states are {shapes[0]}, the teacher's {shapes[1]}; they must be the same")
    kinds = [_kind(model) for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise InputError(f"the student predicts {kinds[0]} and the teacher {kinds[1]}, whose errors do not compare")
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    if not torch.allclose(student.path.alpha(t), teacher.path.alpha(t), atol=1e-4):
        raise InputError("student and teacher have different noise schedules, so that one t is two noise levels; "
                         "save the student with the teacher's scheduler")  # fmt: skip


def _check_null(model: Model) -> None:
    if not getattr(model, "conditional", True):
        raise InputError(f"{model.name} is unconditional, so it has no guidance to measure")
    if getattr(model, "embedded_guidance", False) or getattr(model, "scales", None):
        raise InputError(
            f"{model.name} takes its guidance scale as an input, so it has one branch and no gap to measure"
        )
    try:
        model.encode([""])
    except InputError as error:
        raise InputError(
            f"{model.name} has no null class, so no guidance to measure; train it with one embedding row more than it "
            "has classes (unet_pipeline(class_rows=classes + 1)) and with labels dropped now and then"
        ) from error


def _listed(classes: Sequence[str] | None) -> str:
    if not classes:
        return "no classes"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _kind(model: Model) -> str:
    """The form in which the network predicts."""
    import torch

    with torch.no_grad():
        x = model.noise(1, torch.Generator().manual_seed(0))
        said = model.predict(x, model.grid(1)[0], model.encode([""]))
    return said.kind


def _data(config: DiagnoseConfig, teacher: Model) -> Classes | None:
    """The held data of a model of classes, None for one that reads text. Raises InputError where they do not fit."""
    from fieldsmith.worlds.classes import load

    classes: tuple[str, ...] = getattr(teacher, "classes", ())
    if not classes:
        if config.data is not None:
            raise InputError(f"data '{config.data}' has classes, but {teacher.name} reads text; leave out --data")
        return None
    if config.data is None:
        raise InputError(f"no data given, and {teacher.name} has classes; add --data digits, shapes or a folder")
    channels, side = _picture(teacher)
    data = load(config.data, side, channels, config.seed)
    if data.names != classes:
        raise InputError(f"data '{config.data}' has {_listed(data.names)}, {teacher.name} {_listed(classes)}")
    return data


def _picture(model: Model) -> tuple[int, int]:
    """Channels and side of its images. Raises InputError where they are not square."""
    import torch

    with torch.no_grad():
        _, channels, height, width = model.decode(model.noise(1, torch.Generator().manual_seed(0))).shape
    if height != width:
        raise InputError(f"{model.name} draws {height} x {width} images, and data come square; give square models")
    return channels, height


def _states(config: DiagnoseConfig, teacher: Model, data: Classes | None, prompts: Sequence[str]) -> dict[str, Tuples]:
    """The states by kind; those of noised data only where there are data."""
    from fieldsmith.diagnose.guidance import noised_tuples, path_tuples
    from fieldsmith.training import step_generator

    found = {}
    if data:
        generator = step_generator(config.seed, 0)
        found[NOISED] = noised_tuples(teacher, data.held_images, data.held_labels, config.tuples, generator)
    generator = step_generator(config.seed, 1)
    found[OWN_PATH] = path_tuples(teacher, prompts, config.steps, config.scale, generator, config.tuples, config.chunk)
    return found


def _sampler(model: Model, config: DiagnoseConfig) -> GuidedSampler:
    from fieldsmith.diagnose.concepts import sampler

    return lambda prompts, seed, guidance: sampler(model, config.steps, guidance, config.chunk)(prompts, seed)


def spent(config: DiagnoseConfig, kinds: int) -> int:
    """Network forwards of the whole diagnosis, of student and teacher alike: the models' own counts leave it out."""
    asked = kinds * config.tuples * 2 * 2
    path = -(-config.tuples // config.steps) * config.steps * (1 if config.scale == 1 else 2)
    return asked + path + config.samples * config.steps * (1 + 2) * 2  # scale 1 needs one branch
