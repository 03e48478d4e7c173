"""Edits of graded quality made without a model, so that a judge of edits can be measured against known truth.

In: the scenes world, how many groups, a seed. Out: for each group one instruction, its source, and one result of each
of `KINDS`, with what the world's own judge says of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.worlds.scenes import COLOURS, HUES, SHAPES, Plan, Scene, SceneSessions, ScenesWorld, Thing
from fieldsmith.worlds.scenes_judge import Channel, judge

KINDS = ("as planned", "unchanged", "wrong colour", "wrong cell", "missing", "extra", "tint", "blur")
KINDS_OF_THINGS = tuple((shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS)))
TINT = (0.05, 0.1)  # how far a tinted image lies from the planned one, root mean square: below what the judge forgives


@dataclass(frozen=True)
class Graded:
    """Results of g one-turn sessions, k = len(KINDS) each, images in [0, 1] at 8-bit levels.

    before (g, 3, size, size), after (g, k, 3, size, size). The truth in [0, 1], each (g, k): following is 1 where the
    turn is done, else how far its cells have come from the source (0) to the plan; consistency is the judge's own.
    """

    sessions: SceneSessions
    before: Tensor
    after: Tensor
    following: Tensor
    consistency: Tensor
    kinds: tuple[str, ...] = KINDS


def graded(world: ScenesWorld, groups: int, seed: int) -> Graded:
    """`groups` instructions with a result of each kind. Raises InputError below one group."""
    if groups < 1:
        raise InputError(f"groups={groups}: give at least 1")
    sessions, draw = world.sessions(groups, 1, seed), random.Random(f"graded {seed}")
    kept = Channel()
    before = kept(sessions.clean(0))
    after = torch.stack([world.render(_scenes(plan, draw)) for plan in sessions.plans])
    planned, shift = after[:, 0], torch.tensor([_tint(draw) for _ in range(groups)])
    worse = torch.stack([planned + shift[:, :, None, None], Channel(blur=1.0)(planned)], 1)
    after = kept(torch.cat((after, worse), 1).flatten(0, 1))
    many = sessions[[row for row in range(groups) for _ in KINDS]]
    first = before.repeat_interleave(len(KINDS), 0)
    found = judge(many, 1, first, after, first)
    after, done, credit, consistency = (
        part.unflatten(0, (groups, len(KINDS))) for part in (after, found.done, found.following, found.kept_first)
    )
    source = credit[:, [KINDS.index("unchanged")]]  # a square is half a circle already
    following = torch.where(done, 1.0, ((credit - source) / (1 - source)).clamp(0, 1))
    return Graded(sessions, before, after, following, consistency)


def _scenes(plan: Plan, draw: random.Random) -> list[Scene]:
    """The kinds that are scenes, in the order of KINDS, each another image."""
    was, turn = plan.start, plan.turns[0]
    planned, edited = turn.after, sorted(turn.edited)
    free = draw.choice([cell for cell in planned.empty if cell not in edited])
    made = [thing.kind for cell in edited if (thing := planned.cells[cell])]
    others = [cell for cell, thing in enumerate(planned.cells) if thing and thing.kind not in made]
    shown = [cell for cell in edited if planned.cells[cell]]
    other, own = draw.choice(others or shown), (shown or edited or others)[0]
    if edited:
        there = [thing for thing in (planned.cells[own], was.cells[own]) if thing]
        colour = draw.choice([c for c in range(len(COLOURS)) if c not in [thing.colour for thing in there]])
        painted = planned.put({own: replace(there[0], colour=colour)})
    else:
        painted = replace(planned, hue=draw.choice([h for h in range(len(HUES)) if h not in (was.hue, planned.hue)]))
    # the turn's own object where words say its place; for the rest another, so that no rule unsaid decides
    moves = own if turn.operation in ("add", "move", "swap") else other
    moved = planned.put({moves: None, free: planned.cells[moves]})
    if turn.operation == "remove":
        moved = was.put({other: None})
    lost = own if turn.operation in ("recolour", "reshape", "move", "swap") else other
    new = draw.choice([kind for kind in KINDS_OF_THINGS if not was.where(kind) and not planned.where(kind)])
    return [planned, was, painted, moved, planned.put({lost: None}), planned.put({free: Thing(*new)})]


def _tint(draw: random.Random) -> list[float]:
    """An offset of each channel."""
    way = [draw.gauss(0, 1) for _ in range(3)]
    size = draw.uniform(*TINT) / (sum(part**2 for part in way) / 3) ** 0.5
    return [size * part for part in way]
