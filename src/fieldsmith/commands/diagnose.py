"""`fieldsmith diagnose KIND`: what a model kept, and what is broken, measured on a finished one; nothing is trained.

In: the words after the verb, or a model and settings from Python. Out: a Diagnosis; with an `out` folder also a run
directory with metrics.json and report.html. Here names become objects: a teacher, data, a world, a reward, a judge.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError, check_word
from fieldsmith.measure.diagnose import config_of
from fieldsmith.measure.diagnose.config import (
    KINDS,
    AuditConfig,
    ConceptsConfig,
    ExposureConfig,
    GuidanceConfig,
    JudgeConfig,
    SmoothnessConfig,
)

if TYPE_CHECKING:  # torch: `fieldsmith diagnose --help` does without
    from fieldsmith.measure.diagnose import Diagnosis
    from fieldsmith.models.core import Model


@dataclass(frozen=True)
class Named:
    """What every kind but the judge is told: a model, and where to write. From Python, a model, a teacher, data or a
    reward may be an object instead of its name."""

    model: str | None = None
    """A diffusers pipeline folder, a hub id or a zoo model."""
    out: pathlib.Path | None = None
    """The run directory to write (new or empty)."""
    resolution: int | None = None
    """Image side in pixels; None: the model's own, at most 512."""


@dataclass(frozen=True)
class Guidance(GuidanceConfig, Named):
    __doc__ = GuidanceConfig.__doc__
    teacher: str | None = None
    """What the model was distilled from, in the same states and with the same classes."""
    data: str | None = None
    """Models of classes: digits, shapes, or a folder with a subfolder of images a class; held-out images are used."""
    prompts: tuple[str, ...] = ()
    """Prompts or class names to follow, or one text file with one a line; empty: every class."""


@dataclass(frozen=True)
class Smoothness(SmoothnessConfig, Named):
    __doc__ = SmoothnessConfig.__doc__
    data: str | None = None
    """columns, cards, chess or a folder of images; None: what the model's card names."""
    judge: str | None = None
    """With a folder: module:function, file.py:function or http:// address that says what is valid."""


@dataclass(frozen=True)
class Exposure(ExposureConfig, Named):
    __doc__ = ExposureConfig.__doc__
    adapter: pathlib.Path | None = None
    """A LoRA folder to attach first."""


@dataclass(frozen=True)
class Concepts(ConceptsConfig, Named):
    __doc__ = ConceptsConfig.__doc__
    adapter: pathlib.Path | None = None
    """A LoRA folder to attach first, such as a run's adapter/."""


@dataclass(frozen=True)
class Audit(AuditConfig, Named):
    __doc__ = AuditConfig.__doc__
    model: str = "zoo:shapes-flux"
    """A diffusers pipeline folder, a hub id, a zoo model, or world:triangle, whose truth is a closed form."""
    reward: str = "classifier"
    """A reward, or a weighted sum of rewards, e.g. `classifier` or `right+0.1*brightness`; world:triangle: `linear`."""
    prompts: tuple[str, ...] = ()
    """Prompts to look at, or one text file with a prompt a line; empty: the world's own captions."""


@dataclass(frozen=True)
class Judge(JudgeConfig):
    __doc__ = JudgeConfig.__doc__
    judge: str | None = None
    """remote:http://HOST:PORT/v1?model=M&mode=direct&mode=expected&n=4&temperature=0.7, a server that sees images,
    asked n times in each mode that is named (none: all four)."""
    out: pathlib.Path | None = None
    """The run directory to write (new or empty)."""


SETTINGS: dict[str, Any] = {"guidance": Guidance, "smoothness": Smoothness, "exposure": Exposure,
                            "concepts": Concepts, "audit": Audit, "judge": Judge}  # fmt: skip
NEEDED = {
    "guidance": {"model": "FOLDER, the student", "teacher": "FOLDER, what it was distilled from"},
    "smoothness": {"model": "FOLDER, a DDPM pipeline"},
    "exposure": {"model": "FOLDER, an editing model of the scenes world"},
    "concepts": {"model": "FOLDER, a model whose card.json names its world"},
    "audit": {"model": "FOLDER"},
    "judge": {"judge": "remote:http://HOST:PORT/v1?model=MODEL"},
}


def diagnose(words: Sequence[str]) -> None:
    """fieldsmith diagnose KIND [--config FILE.toml] [--field value ...] --out DIR."""
    listed = "\n".join(f"  {kind:<11}{what}" for kind, what in KINDS.items())
    if not words or words[0].startswith("-"):
        if {"-h", "--help"} & set(words):
            print(f"usage: fieldsmith diagnose KIND [--field value ...] --out DIR; kinds:\n{listed}")
            return
        raise InputError(f"no kind named after `fieldsmith diagnose`; use one of {', '.join(KINDS)}")
    kind, rest = words[0], list(words[1:])
    check_word(kind, tuple(KINDS), "diagnose's kinds")
    verb = f"diagnose {kind}"
    path = arguments.take(rest, "--config")
    file = arguments.from_file(path, SETTINGS[kind], verb) if path else {}
    notes = "Also: --config FILE.toml (such as a run's config.toml) sets fields; flags come last."
    config = arguments.parse(SETTINGS[kind](**file), rest, verb, notes)
    if config.out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{kind}")
    run(kind, config)


def diagnose_model(model: Model | str | None, kind: str, **settings: Any) -> Diagnosis:
    """What `fs.diagnose` is: measure one thing of a model (a name or an object; None for 'judge').

    `settings` are the fields of `fieldsmith diagnose KIND --help`; a teacher, data or reward may be an object.
    `out=None` writes nothing. Raises InputError with the value and the fix.
    """
    check_word(kind, tuple(KINDS), "diagnose's kinds")
    for name in settings:
        check_word(name, [field.name for field in dataclasses.fields(SETTINGS[kind])], f"diagnose {kind}'s settings")
    paths = {name: pathlib.Path(settings[name]) for name in ("out", "adapter") if settings.get(name) is not None}
    return run(kind, SETTINGS[kind](**settings | paths | ({} if model is None else {"model": model})))


def run(kind: str, config: Any) -> Diagnosis:
    """The diagnosis, written to `config.out`, or read from there where it is complete.

    Raises InputError before anything is written.
    """
    for name, what in NEEDED[kind].items():
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; add --{name} {what}")
    config.check()
    arguments.at_least(config, 1, *(["resolution"] if hasattr(config, "resolution") else []))
    directory = arguments.directory_of(_recorded(config), f"diagnose {kind}") if config.out else None
    # torch comes with these, which --help and refusals do without
    from fieldsmith.commands.diagnose_inputs import INPUTS
    from fieldsmith.measure.diagnose import Diagnosis
    from fieldsmith.measure.diagnose import diagnose as measured
    from fieldsmith.measure.progress import CONSOLE

    if directory and directory.finished:
        CONSOLE.print(f"this run is complete: {directory.folder / 'report.html'}")
        numbers = json.loads((directory.folder / "metrics.json").read_text(encoding="utf-8"))
        return Diagnosis(numbers, numbers["words"], None)
    inputs = INPUTS[kind](config)
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config_of(kind))}
    diagnosis = measured(inputs.pop("model"), kind, **settings | inputs)
    CONSOLE.print(diagnosis.words, markup=False)
    if directory and diagnosis.page:
        directory.begin()
        nfe, seconds = (diagnosis.numbers[name] for name in ("forward_equivalents", "seconds"))
        cost = f"{nfe:,} forward-equivalents, {seconds:.0f} s."
        again = f"fieldsmith diagnose {kind} --config {directory.folder}/config.toml --out ANOTHER-FOLDER"
        diagnosis.page.command("Repeat it", again, cost)
        diagnosis.page.write(directory.folder / "report.html")
        directory.finish(diagnosis.numbers)
        CONSOLE.print(f"page: {directory.folder / 'report.html'}")
    return diagnosis


def _recorded(config: Any) -> Any:
    """The settings as config.toml can hold them: an object by its name."""
    plain = (str, int, float, tuple, list, pathlib.Path)
    objects = {k: v for k, v in vars(config).items() if v is not None and not isinstance(v, plain)}
    return dataclasses.replace(config, **{k: str(getattr(v, "name", type(v).__name__)) for k, v in objects.items()})
