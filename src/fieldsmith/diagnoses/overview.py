"""`fieldsmith diagnose MODEL`: every diagnosis that a model allows, what each found, and what to run next.

In: a model, and what the user has beside it: a teacher, data, a reward, concepts that should be gone. Out: a page with
one finding a diagnosis, whose own pages lie in folders beside it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from fieldsmith.diagnoses import Diagnosis, config_of, run
from fieldsmith.diagnoses.config import OverviewConfig
from fieldsmith.diagnoses.inputs import model_of
from fieldsmith.errors import InputError
from fieldsmith.measure.progress import CONSOLE
from fieldsmith.report.page import Page
from fieldsmith.run import Run
from fieldsmith.worlds.model_cards import card_of, world_of

# each diagnosis, and the setting that asks for it: with that, it is not left out in silence
PARTS = {"concepts": "targets", "guidance": "teacher", "smoothness": "data", "exposure": "", "reward": "reward"}
LOST = {  # by nothing being done
    "concepts": "prompts go on being misread; more steps or guidance help a little, no sampler teaches the rest.",
    "targets": "who finds the right words gets the concept; a filter of prompts does not reach what weights know.",
    "guidance": "a higher guidance scale will not make it follow prompts: the gap that it scales was not learned.",
    "smoothness": "this share of samples stays impossible at any number of steps, more where modes lie close.",
    "exposure": "each further edit starts from a worse picture than the last, however well single edits score.",
    "reward": "a model trained on this reward alone gets better numbers and worse pictures.",
}


@dataclass(frozen=True)
class Finding:
    """What one diagnosis found. tone: 'bad' where there is a fault, 'good' where there is none, 'mixed' where it
    cannot be told; lost and command only where there is one."""

    kind: str
    tone: str
    word: str
    sentence: str
    lost: str = ""
    command: str = ""


def diagnose(model: Any = None, kind: str | None = None, *, config: Any = None, **settings: Any) -> Diagnosis:
    """Measure what a model's training left undetermined, and say what to run next: nothing is trained.

    `model` is a Model or a name (None for kind='judge'). Without a `kind` every diagnosis is made that the model allows
    (numbers["findings"] has them); else one: guidance, smoothness, exposure, concepts, reward, audit or judge.
    `settings` are the fields of `fieldsmith diagnose --help`, or of `fieldsmith diagnose KIND --help`, where a teacher,
    data or a reward may be an object; `config` takes the whole. out=None writes nothing. Raises InputError with the
    value and the fix, before anything is written where a setting is wrong, and where the model allows no diagnosis.
    """
    if kind is not None and kind != "overview":
        return run.diagnose(model, kind, config=config, **settings)
    config, objects = run.settle(model, "overview", config, settings)
    if config.model is None:
        raise InputError("no model given; add a folder, a hub id or a zoo model, e.g. zoo:shapes-flux-small")
    directory = Run(config.out, "diagnose", config) if config.out else None
    if complete := run.made(directory):
        return complete
    given = run.with_objects(config, objects)
    name = getattr(given.model, "name", None) or str(given.model)
    objects["model"] = model_of(given)
    begin = cache(directory.begin) if directory else lambda: None  # once the first diagnosis is made, and never again
    try:
        found, left_out = _each(config, objects, name, begin)
        diagnosis = _together(config, name, found, left_out)
        if directory:
            begin()
            run.write(directory, diagnosis, "")
    finally:
        if directory:
            directory.end()
    return diagnosis


def _each(
    config: OverviewConfig, objects: dict[str, Any], name: str, begin: Callable[[], object]
) -> tuple[dict[str, Diagnosis], dict[str, str]]:
    """The diagnoses that can be made, and why others cannot; `begin` is called before the first is written.

    Raises InputError where the user asked for one of these by what was given for it.
    """
    found: dict[str, Diagnosis] = {}
    left_out: dict[str, str] = {}
    # what the user asks for comes first, so that a wrong word is refused before minutes have passed
    for kind in sorted(PARTS, key=lambda kind: not _asked(kind, config)):
        if kind in ("guidance", "reward") and not _asked(kind, config):
            left_out[kind] = f"it needs --{PARTS[kind]}"
            continue
        part = _part(kind, config, name)
        taken = {one: value for one, value in objects.items() if one in {field.name for field in fields(part)}}
        CONSOLE.print(f"\ndiagnosis: {kind}")
        try:
            found[kind] = run.one(kind, part, taken, begin)
        except InputError as error:
            if _asked(kind, config):
                raise
            left_out[kind] = str(error)
            CONSOLE.print(f"left out: {error}", markup=False)
    if not found:
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in left_out.items())
        raise InputError(f"nothing can be diagnosed of '{name}' ({reasons})")
    return {kind: found[kind] for kind in PARTS if kind in found}, left_out


def _asked(kind: str, config: OverviewConfig) -> bool:
    wanted = bool(PARTS[kind]) and bool(getattr(config, PARTS[kind]))
    # data with a teacher are the classes of guidance's tuples
    return wanted and not (kind == "smoothness" and config.teacher is not None)


def _part(kind: str, config: OverviewConfig, name: str) -> Any:
    """One diagnosis's settings: what it shares with the overview's, and sizes that follow from `samples`."""
    cls, n = config_of(kind), config.samples
    shared = {field.name for field in fields(cls)} & {field.name for field in fields(config)} - {"adapter"}
    given = {one: getattr(config, one) for one in shared} | {"out": config.out / kind if config.out else None}
    if kind == "smoothness" and config.teacher is not None:
        given |= {"data": None, "judge": None}
    if "guidance" in shared and config.guidance is None:
        given["guidance"] = card_of(name).get("guidance")
    sizes: dict[str, dict[str, Any]] = {
        "concepts": {"each": max(1, n // 8)},
        "guidance": {"tuples": 64 * n},
        "smoothness": {"samples": 2 * n, "steps": max(4, config.steps)},
        "exposure": {"samples": 2 * n, "turns": 3, "still": 2},
        "reward": {"samples": max(2, n // 2)},
    }
    return cls(**given | sizes[kind])


def _together(config: OverviewConfig, name: str, found: dict[str, Diagnosis], left_out: dict[str, str]) -> Diagnosis:
    """All findings on one page, faults first."""
    findings = sorted((finding(kind, one, config, name) for kind, one in found.items()), key=_worst_first)
    faults = [one for one in findings if one.tone == "bad"]
    open_ = [one for one in findings if one.tone == "mixed"]
    numbers: dict[str, Any] = {
        "nfe": sum(one.numbers["nfe"] for one in found.values()),
        "findings": [dict(vars(one)) for one in findings],
        "left out": left_out,
    }
    words = _words(name, faults, open_, len(findings))
    page = Page(
        f"What is undetermined in {name}", f"{len(findings)} diagnoses, {config.steps} steps, seed {config.seed}"
    )
    word = "Nothing found" if not (faults or open_) else f"{len(faults)} found" if faults else "Cannot be told yet"
    page.verdict(words, False if faults else None if open_ else True, word)
    page.table(
        "Findings", ("diagnosis", "found", "how sure"), [(one.kind, one.word, one.sentence) for one in findings],
        "Each has a page of its own in the folder of its name." if config.out else "",
    )  # fmt: skip
    for one in faults:
        page.text(f"{one.kind.capitalize()}: {one.word.lower()}", [one.sentence, f"If nothing is done, {one.lost}"])
        page.command("Run next", one.command)
    if open_:
        page.text("What cannot be told yet", f"Look harder with --samples {4 * config.samples}: intervals halve.")
    if left_out:
        page.table("Left out", ("diagnosis", "why"), list(left_out.items()))
    seconds = sum(one.numbers["seconds"] for one in found.values())
    return run.told("overview", Diagnosis(numbers, words, page), seconds)


def _worst_first(one: Finding) -> int:
    return ("bad", "mixed", "good").index(one.tone)


def _words(name: str, faults: list[Finding], open_: list[Finding], n: int) -> str:
    """The verdict in a few sentences."""
    if faults:
        first = faults[0]
        others = f" Also: {', '.join(f'{one.kind} ({one.word.lower()})' for one in faults[1:])}." if faults[1:] else ""
        return f"{first.kind.capitalize()}: {first.word.lower()}. {first.sentence}{others} Run next: {first.command}"
    if open_:
        kinds = ", ".join(one.kind for one in open_)
        return f"No fault is shown in {name}, but these cannot be told from so few samples: {kinds}."
    return (
        f"None of {n} diagnoses finds a fault in {name}." if n > 1 else f"The one diagnosis of {name} finds no fault."
    )


def finding(kind: str, diagnosis: Diagnosis, config: OverviewConfig, name: str) -> Finding:
    """What a diagnosis says, with the command that mends a fault."""
    answer = diagnosis.numbers["answer"]
    if answer["tone"] != "bad":
        return Finding(kind, answer["tone"], answer["word"], diagnosis.words)
    model, teacher = shlex.quote(name), shlex.quote(str(config.teacher))
    data = f" --data {shlex.quote(str(config.data))}" if config.data else ""
    both = shlex.quote(f"{config.reward}+{config.beside or 'right'}")
    command = {
        "concepts": f"align --model {model} --reward right --out runs/align",
        "guidance": f"distill --teacher {teacher}{data} --preset fieldsmith --out runs/distill",
        "smoothness": f"sharpen --model {model}{data} --preset guide --out runs/sharpen",
        "exposure": f"edit --model {model} --out runs/edit",
        "reward": f"align --model {model} --reward {both} --out runs/align",
    }[kind]
    lost = LOST[kind]
    if kind == "concepts" and config.targets:
        world = world_of(name)
        assert world is not None  # which found the fault
        anchors = [world.anchor(one) for one in world.erased(config.targets)]
        words = f"--targets {shlex.join(config.targets)} --anchors {shlex.join(anchors)}"
        command, lost = f"erase --model {model} {words} --out runs/erase", LOST["targets"]
    return Finding(kind, "bad", answer["word"], diagnosis.words, lost, f"fieldsmith {command}")
