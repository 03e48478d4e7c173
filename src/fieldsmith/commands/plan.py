"""`fieldsmith plan VERB ...`: what a run would take, before a weight is downloaded or a step is taken.

In: a verb and the words that it takes itself. Out: parameters, peak memory by part, network evaluations, reward calls,
time and disk, printed as tables. The verb's own preparation and its first updates are rehearsed on a model
of its JSON configs alone (models/meta_model.py, models/rehearsal.py); rewards and judges are stood in for.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fieldsmith.commands import verbs
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.disk import size
from fieldsmith.errors import InputError, check_word
from fieldsmith.models import pipeline_folder

if TYPE_CHECKING:
    from fieldsmith.planning import Plan

PLANNED = tuple(verbs.CONFIGS)


def plan(words: Sequence[str]) -> Answer:
    words = list(words)
    if not words:
        raise InputError(f"no verb given after `fieldsmith plan`; verbs that are planned: {', '.join(PLANNED)}")
    if words[0] in ("-h", "--help"):
        print(f"usage: fieldsmith plan VERB [the verb's own flags]; verbs: {', '.join(PLANNED)}")
        raise SystemExit(0)
    verb = words.pop(0)
    check_word(verb, PLANNED, "the verbs that are planned")
    config = verbs.settings(verb, words)
    config.check()
    pipeline_folder(config.model if hasattr(config, "model") else config.teacher)  # an unknown zoo model is refused now
    planning = importlib.import_module("fieldsmith.planning")  # imports torch: only once the words are known to be good
    made = planning.plan(verb, config)
    _print(made)
    return answer(metrics=dataclasses.asdict(made), files=[])


def _print(made: Plan) -> None:
    from rich.console import Console  # slow to import, and only for people
    from rich.table import Table

    console = Console()
    total = sum(part.parameters for part in made.components)
    weights = Table(title=f"fieldsmith {made.verb} on {made.model}", title_justify="left")
    for header in ("component", "parameters", "type", "weights"):
        weights.add_column(header, justify="left" if header in ("component", "type") else "right")
    for part in made.components:
        weights.add_row(part.name, f"{part.parameters:,}", part.dtype, size(part.bytes))
    weights.add_row("trainable", f"{made.trainable:,}", "", f"{100 * made.trainable / total:.2g}% of all")
    console.print(weights)
    peak = Table(title="memory when most is alive (training)", title_justify="left")
    peak.add_column("part")
    peak.add_column("size", justify="right")
    for name, bytes_ in sorted(made.memory.items(), key=lambda item: -item[1]):
        peak.add_row(name, size(bytes_))
    peak.add_section()
    peak.add_row("peak", size(made.peak))
    console.print(peak)
    calls = f", {made.reward_calls:,} reward calls" if made.reward_calls else ""
    console.print(f"cost: {made.nfe:,.0f} network evaluations{calls}", highlight=False)
    if made.seconds is not None:
        each = f"{1000 * made.seconds / made.nfe:.3g} ms each, measured here" if made.nfe else ""
        console.print(
            f"time: {datetime.timedelta(seconds=round(made.seconds))} for the network evaluations ({each}); decoding, "
            "judges and measuring come on top",
            highlight=False,
        )
    disk = ", ".join(f"{name} {size(bytes_)}" for name, bytes_ in made.disk.items() if bytes_)
    console.print(f"disk: {disk}", highlight=False)
    for note in made.notes:
        console.print(f"note: {note}", highlight=False)
