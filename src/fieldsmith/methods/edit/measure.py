"""What `edit` looks at, before and after, at equal noise: held-out sessions run turn by turn.

Where a world knows the plan: verdicts by turn on the model's own results and on planned sources, and the drift where
nothing is asked. Elsewhere the scores of the judge that trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.measure import editing
from fieldsmith.measure.exposure import HELD_OUT, exposure, identity_drift
from fieldsmith.measure.intervals import mean_interval
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs, World
from fieldsmith.models.core import Model
from fieldsmith.models.editing import edit, encode_unique, quantised
from fieldsmith.previews import Preview
from fieldsmith.training import step_generator
from fieldsmith.verb import Job, Side

SHOWN = 6  # sessions on the page


@dataclass(frozen=True)
class Measured:
    """Held-out sessions run once."""

    numbers: dict[str, Any]  # for metrics.json: lists with a number a turn
    images: Tensor  # of a few sessions, (n, T + 1, 3, h, w): the start and what came out of each turn
    instructions: list[list[str]]  # of these, by turn
    done: list[list[bool | None]]  # whether they were followed, by turn; None where nobody knows
    verdicts: editing.SessionVerdicts | None = None  # of all sessions, where a world gives verdicts
    last: Tensor | None = None  # scores of following at the last turn, (evaluate,), where a judge gives them


def measure(model: Model, config: EditConfig, job: Job, side: Side) -> Measured:
    """`config.evaluate` sessions that training did not draw."""
    inputs: Inputs = job.inputs
    return _judged(model, config, inputs) if inputs.world is None else _exact(model, config, inputs, inputs.world)


def preview(config: EditConfig, job: Job) -> Preview:
    """One held-out session, turn by turn."""
    inputs: Inputs = job.inputs
    sessions = inputs.draw(1, HELD_OUT + config.seed, config.turns)
    turns = range(1, sessions.turns + 1)

    def draw(model: Model) -> Tensor:
        source = quantised(sessions.clean(0))
        images = []
        for turn in turns:
            generator = step_generator(config.seed, turn, stream=9)
            condition = encode_unique(model, sessions.prompts(turn))
            images.append(edit(model, condition, source, generator, config.evaluate_steps, config.guidance))
            source = inputs.channel(images[-1], generator)
        return torch.cat(images)

    return Preview([sessions.prompts(turn)[0] for turn in turns], draw)


def _exact(model: Model, config: EditConfig, inputs: Inputs, world: World) -> Measured:
    seed = HELD_OUT + config.seed
    sessions = inputs.draw(config.evaluate, seed, config.evaluate_turns)
    seen = exposure(
        model, sessions, world.verdicts, inputs.channel, config.evaluate_steps, seed, config.guidance, forced=True
    )
    scores = editing.scores(seen.verdicts)
    numbers: dict[str, Any] = {name: [one.to_json() for one in turns] for name, turns in vars(scores).items() if turns}
    if config.still:
        drift = identity_drift(
            model, sessions.clean(0), world.nothing, world.likeness, inputs.channel, config.still,
            config.evaluate_steps, seed, config.guidance,
        )  # fmt: skip
        numbers["drift"] = drift.away.mean(1).tolist()
        numbers["artefacts"] = drift.artefacts.mean(1).tolist()
    instructions = [sessions.prompts(turn)[:SHOWN] for turn in range(1, sessions.turns + 1)]
    done: list[list[bool | None]] = [[bool(x) for x in one.done[:SHOWN]] for one in seen.own]
    return Measured(numbers, seen.images[:SHOWN], instructions, done, seen.verdicts)


def _judged(model: Model, config: EditConfig, inputs: Inputs) -> Measured:
    """Mean scores a turn, by the judge that trained."""
    sessions = inputs.draw(config.evaluate, HELD_OUT + config.seed, config.turns)
    first = quantised(sessions.clean(0))
    source = before = first
    own = processes.owned(len(first))
    numbers: dict[str, Any] = {"score of following": [], "score of consistency": []}
    images, instructions = [first], []
    for turn in range(1, sessions.turns + 1):
        generator = step_generator(config.seed, turn, stream=9)
        condition = encode_unique(model, sessions.prompts(turn))
        after = edit(model, condition, source, generator, config.evaluate_steps, config.guidance)
        with processes.together():  # each process asks of its own part, and all hear all of them
            scores = inputs.judge(sessions[own.tolist()], turn, before[own], after[own], first[own])
        following = processes.gather(scores.following)
        numbers["score of following"].append(mean_interval(following).to_json())
        numbers["score of consistency"].append(mean_interval(processes.gather(scores.consistency)).to_json())
        images.append(after)
        instructions.append(sessions.prompts(turn)[:SHOWN])
        before, source = after, inputs.channel(after, generator)
    unknown: list[bool | None] = [None] * SHOWN
    return Measured(
        numbers, torch.stack(images, 1)[:SHOWN], instructions, [unknown for _ in instructions], last=following
    )
