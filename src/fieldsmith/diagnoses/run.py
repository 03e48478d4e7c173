"""One diagnosis from names or objects to a page: what `fieldsmith diagnose KIND` calls, and overview.py for each."""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

from fieldsmith.diagnoses import Diagnosis, config_of
from fieldsmith.diagnoses.inputs import INPUTS
from fieldsmith.errors import InputError, check_word
from fieldsmith.measure.progress import CONSOLE
from fieldsmith.models.core import Model, check_kept
from fieldsmith.result import going_on
from fieldsmith.run import Run, base_of

NEEDED = {
    "guidance": {"model": "FOLDER, the student", "teacher": "FOLDER, what it was distilled from"},
    "smoothness": {"model": "FOLDER, a DDPM pipeline"},
    "exposure": {"model": "FOLDER, an editing model of the scenes world"},
    "concepts": {"model": "FOLDER, a model whose card.json names its world"},
    "reward": {"model": "FOLDER", "reward": "NAME"},
    "audit": {"model": "FOLDER"},
    "judge": {"judge": "remote:http://HOST:PORT/v1?model=MODEL"},
}


def diagnose(model: Model | str | None, kind: str, *, config: Any = None, **settings: Any) -> Diagnosis:
    """Measure one thing of a model (a name or an object; None for 'judge'): nothing is trained.

    `kind` is guidance, smoothness, exposure, concepts, reward, audit or judge. `settings` are the fields of
    `fieldsmith diagnose KIND --help`, where a teacher, data or a reward may be an object; `config` takes the whole.
    out=None writes nothing. Raises InputError with the value and the fix before anything is written.
    """
    return one(kind, *settle(model, kind, config, settings))


def one(kind: str, config: Any, objects: dict[str, Any], begin: Callable[[], object] = lambda: None) -> Diagnosis:
    """One diagnosis of what a config names and of objects in the places of names; `begin` is called before anything is
    written. Raises as `diagnose`."""
    for name, what in NEEDED[kind].items():
        if getattr(config, name) is None:
            raise InputError(f"no {name} given; add --{name} {what}")
    config.check()
    directory = Run(config.out, f"diagnose {kind}", config) if config.out else None
    if complete := made(directory):
        return complete
    inputs = INPUTS[kind](with_objects(config, objects))
    kept = {name: getattr(config, name, 0) for name in ("samples", "tuples", "states", "each")}
    if isinstance(inputs["model"], Model):
        check_kept(inputs["model"], {f"{name}={n}": n for name, n in kept.items()})
    began = time.monotonic()
    module = importlib.import_module(f"fieldsmith.diagnoses.{kind}")
    diagnosis: Diagnosis = module.diagnosis(inputs.pop("model"), config, **inputs)
    diagnosis = told(kind, diagnosis, time.monotonic() - began)
    if directory and diagnosis.page:
        begin()
        directory.begin()
        try:
            write(directory, diagnosis, kind)
        finally:
            directory.end()
    return diagnosis


def made(directory: Run | None) -> Diagnosis | None:
    """What a complete run directory holds; None where there is none."""
    if directory is None or not directory.finished:
        return None
    CONSOLE.print(f"this run is complete: {directory.folder / 'report.html'}")
    numbers = json.loads((directory.folder / "metrics.json").read_text(encoding="utf-8"))
    return Diagnosis(numbers, numbers["words"], None)


def told(kind: str, diagnosis: Diagnosis, seconds: float) -> Diagnosis:
    """The diagnosis, printed, with the numbers that all kinds have."""
    answer = diagnosis.page.answer if diagnosis.page else None
    shared = {
        "method": "diagnose", "instrument": kind, "seconds": seconds, "words": diagnosis.words,
        "answer": answer and {name: answer[name] for name in ("tone", "word")},
    }  # fmt: skip
    CONSOLE.print(diagnosis.words, markup=False)
    return replace(diagnosis, numbers={**shared, **diagnosis.numbers})


def settle(model: Model | str | None, kind: str, config: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a call, and by name what was handed over as an object. Raises InputError at an unknown setting."""
    model = going_on(model)
    given = settings if model is None else {"model": model, **settings}
    objects = {name: value for name, value in given.items() if name != "prompts" and _is_object(value)}
    if config is None:
        kind_of_config = config_of(kind)
        for name in given:
            check_word(name, [field.name for field in fields(kind_of_config)], f"diagnose {kind}'s settings")
        named = {name: getattr(value, "name", type(value).__name__) for name, value in objects.items()}
        config = kind_of_config(**{**given, **named})
    named_model = None if "model" in objects else getattr(config, "model", None)
    if named_model and (found := base_of(named_model)):
        adapters = (*found.adapter, *config.adapter)
        config = dataclasses.replace(config, model=found.model, adapter=adapters, config_from=found.config_from)
    return config, objects


def with_objects(config: Any, objects: dict[str, Any]) -> Any:
    """The settings, with objects in the places of their names."""
    return SimpleNamespace(**{field.name: getattr(config, field.name) for field in fields(config)} | objects)


def write(directory: Run, diagnosis: Diagnosis, kind: str) -> None:
    """The page and the numbers of a diagnosis that was made now."""
    assert diagnosis.page is not None
    cost = f"{diagnosis.numbers['nfe']:,} network evaluations, {diagnosis.numbers['seconds']:.0f} s."
    again = f"fieldsmith diagnose{kind and ' '}{kind} --config {directory.folder}/config.toml --out ANOTHER-FOLDER"
    diagnosis.page.command("Repeat it", again, cost)
    diagnosis.page.write(directory.folder / "report.html")
    directory.finish(diagnosis.numbers)
    CONSOLE.print(f"page: {directory.folder / 'report.html'}")


def _is_object(value: Any) -> bool:
    return not (value is None or isinstance(value, (str, int, float)) or hasattr(value, "__fspath__"))
