"""`fieldsmith align|distill|edit|erase|sharpen`: words -> preset, file, flags -> a config -> the public function.

What can be refused from the words alone is refused before torch is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.config import from_file
from fieldsmith.errors import InputError, RunError, ShortOfMemoryError
from fieldsmith.models import pipeline_folder

CONFIGS = {
    "align": "AlignConfig", "distill": "DistillConfig", "edit": "EditConfig", "erase": "EraseConfig",
    "sharpen": "SharpenConfig",
}  # fmt: skip


def settings(verb: str, words: Sequence[str]) -> Any:
    """The config of a command line: preset, then file, then flags. Raises InputError at anything unknown."""
    kind = getattr(importlib.import_module(f"fieldsmith.methods.{verb}.config"), CONFIGS[verb])
    words = arguments.of_runs(words)
    preset, scale, path = (arguments.take(words, flag) for flag in ("--preset", "--scale", "--config"))
    file = from_file(path, kind, verb) if path else {}
    # a preset depends on some settings, which flags may give: those are parsed in full on top of it
    flags = {name: arguments.peek(words, f"--{name}") for name in ("model", "teacher", "method", "objective")}
    kind(**file)  # a bad value in the file is refused by its name
    given = file | {name: value for name, value in flags.items() if value is not None}
    steps = arguments.peek(words, "--steps") or ""
    if steps.isdigit():  # what is measured scales with it
        given["steps"] = int(steps)
    return arguments.parse(kind.preset_of(preset, scale, given).replace(**file), words, verb, kind.NOTES)


def run(verb: str, words: Sequence[str]) -> Answer:
    """The whole verb. Raises InputError before anything is written."""
    if verb == "distill" and "--identifiability" in words:
        show = importlib.import_module("fieldsmith.commands.identifiability").show  # imports torch
        show([word for word in words if word != "--identifiability"])
        return answer()
    config = settings(verb, words)
    config.check()
    if config.out is None:
        raise InputError(f"no out folder given; add --out DIR, e.g. --out runs/{verb}")
    pipeline_folder(config.model if hasattr(config, "model") else config.teacher)  # an unknown zoo model is refused now
    api = importlib.import_module("fieldsmith.api")  # imports torch: only once the words are known to be good
    try:
        result = getattr(api, verb)(config=config)
    except ShortOfMemoryError as error:
        planning = importlib.import_module("fieldsmith.planning")
        advice = planning.less_memory(verb, config, planning.memory_there())
        raise ShortOfMemoryError(f"{error}; {advice or 'lower --chunk, --batch or --resolution'}") from error
    return finish(result)


def finish(result: Any) -> Answer:
    """Raises RunError where the run is trained, and its page written, but a judge failed afterwards."""
    if "missing" in result.metrics:
        raise RunError(f"{result.metrics['missing']}; `fieldsmith measure {result.out}` completes what is missing")
    return answer(result.out, result.metrics.get("verdict"), result.metrics)
