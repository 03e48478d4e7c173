"""Coloured shapes on a 3 x 3 grid, and editing sessions whose every planned state is known (MT-EditFlow notes, 4).

Content that no instruction names has to be copied: sub-pixel offsets, shades, a smooth background. Instructions are
words; a session is planned so that each turn is possible. `judging.py` reads what an editor made of it from pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fieldsmith.errors import InputError

SIDE, CELLS = 3, 9
SHAPES = ("circle", "square", "triangle")
INK = {  # RGB in [0, 1]
    "red": (0.84, 0.16, 0.16),
    "green": (0.13, 0.60, 0.26),
    "blue": (0.17, 0.29, 0.84),
    "yellow": (0.92, 0.80, 0.14),
}
COLOURS = tuple(INK)
GROUNDS = {
    "sand": (0.80, 0.70, 0.58),
    "mint": (0.62, 0.82, 0.74),
    "sky": (0.60, 0.72, 0.88),
    "rose": (0.88, 0.66, 0.74),
}
HUES = tuple(GROUNDS)
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
OPERATIONS = ("add", "remove", "recolour", "reshape", "move", "swap", "count", "background")
VERBS = {
    "add": ("add", "put", "draw"), "remove": ("remove", "delete", "erase"), "recolour": ("paint", "colour"),
    "reshape": ("turn", "change"), "move": ("move", "shift"), "swap": ("swap", "exchange"), "count": ("make", "show"),
    "background": ("make", "paint"), "nothing": ("change", "alter"),
}  # fmt: skip
SYNONYMS = {
    "circle": "disc", "square": "box", "triangle": "wedge", "circles": "discs", "squares": "boxes",
    "triangles": "wedges", "red": "crimson", "green": "emerald", "blue": "azure", "yellow": "golden",
}  # fmt: skip
VOCABULARY = tuple(dict.fromkeys((
    *(verb for verbs in VERBS.values() for verb in verbs), *SYNONYMS, *SYNONYMS.values(), *HUES,
    "top", "middle", "bottom", "left", "centre", "right", "a", "the", "into", "to", "and", "two", "background",
    "nothing",
)))  # fmt: skip
NOTHING = "change nothing"
RADIUS, SOFT = 0.34, 0.035  # of a cell: an object's radius, and the width of its edge
OFFSET, SHADE = 0.09, 0.1  # how far an object lies off its cell's middle, of a cell, and its ink off pure, each way
SPARED = 2  # cells that no turn of a session may touch, at least

Operation = Literal["add", "remove", "recolour", "reshape", "move", "swap", "count", "background", "nothing"]


@dataclass(frozen=True)
class Thing:
    """An object: its kind, its offset from the middle of its cell in cells, what its ink differs by from pure."""

    shape: int
    colour: int
    offset: tuple[float, float] = (0.0, 0.0)
    shade: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def kind(self) -> tuple[int, int]:
        return self.shape, self.colour

    def __str__(self) -> str:
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """Nine cells in reading order, and the background: a named hue, and what makes it this image's own.

    own (3, 7): for each channel a constant, slopes to the right and down, and a wave: amplitude, two frequencies and
    a phase in one (the phase shares the seventh place with nothing).
    """

    cells: tuple[Thing | None, ...]
    hue: int
    own: tuple[tuple[float, ...], ...]

    def where(self, kind: tuple[int, int]) -> list[int]:
        return [i for i, thing in enumerate(self.cells) if thing and thing.kind == kind]

    def put(self, changes: dict[int, Thing | None]) -> Scene:
        return replace(self, cells=tuple(changes.get(i, thing) for i, thing in enumerate(self.cells)))

    @property
    def empty(self) -> list[int]:
        return [i for i, thing in enumerate(self.cells) if thing is None]

    @property
    def unique(self) -> list[Thing]:
        """Things that words can single out."""
        return [thing for thing in self.cells if thing and len(self.where(thing.kind)) == 1]


@dataclass(frozen=True)
class Turn:
    """An instruction in words, what it does, which cells' objects it changes, and the state after it."""

    operation: Operation
    words: str
    edited: frozenset[int]
    after: Scene


# drawing


def _coverage(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Soft silhouettes in [0, 1] at points u, v in cells from the middle; shape broadcasts against them."""
    circle = (u.square() + v.square()).sqrt() - RADIUS
    square = torch.maximum(u.abs(), v.abs()) - 0.86 * RADIUS
    side = torch.maximum(v - 0.8 * RADIUS, 0.89 * u.abs() - 0.45 * v - 0.52 * RADIUS)
    distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, side))
    return torch.sigmoid(-distance / SOFT)


@dataclass(frozen=True)
class Drawn:
    """Scenes as numbers: kinds (n, 9) with 0 empty else 1 + 4 shape + colour, offsets (n, 9, 2), inks (n, 9, 3)."""

    kind: Tensor
    offset: Tensor
    ink: Tensor
    hue: Tensor
    own: Tensor

    @staticmethod
    def of(scenes: Sequence[Scene]) -> Drawn:
        kinds, offsets, inks = [], [], []
        for scene in scenes:
            for thing in scene.cells:
                if thing is None:
                    kinds.append(0)
                    offsets.append((0.0, 0.0))
                    inks.append((0.0, 0.0, 0.0))
                else:
                    kinds.append(1 + len(COLOURS) * thing.shape + thing.colour)
                    offsets.append(thing.offset)
                    pure = INK[COLOURS[thing.colour]]
                    inks.append(tuple(p + s for p, s in zip(pure, thing.shade, strict=True)))  # type: ignore[arg-type]
        n = len(scenes)
        return Drawn(
            torch.tensor(kinds).reshape(n, CELLS), torch.tensor(offsets).reshape(n, CELLS, 2),
            torch.tensor(inks).reshape(n, CELLS, 3), torch.tensor([scene.hue for scene in scenes]),
            torch.tensor([scene.own for scene in scenes]).reshape(n, 3, 7),
        )  # fmt: skip


class ScenesWorld:
    """The world at 18 to 48 pixels, a multiple of 6."""

    name = "scenes"
    channels = 3

    def __init__(self, size: int = 24):
        if size % 6 or not 18 <= size <= 48:
            raise InputError(f"size={size}: the scenes world is drawn at 18, 24, 30, 36, 42 or 48 pixels")
        self.size, self.cell = size, size // SIDE

    @cached_property
    def _within(self) -> Tensor:
        """Pixel centres of a cell, in cells from its middle, (cell,)."""
        return (torch.arange(self.cell) + 0.5) / self.cell - 0.5

    def grounds(self, hue: Tensor, own: Tensor) -> Tensor:
        """Backgrounds (n, 3, size, size) of hues (n,) and what is each image's own, (n, 3, 7)."""
        at = (torch.arange(self.size) + 0.5) / self.size - 0.5
        y, x = torch.meshgrid(at, at, indexing="ij")
        constant, right, down, amplitude, fx, fy, phase = (part[..., None, None] for part in own.unbind(-1))
        wave = amplitude * torch.sin(2 * math.pi * (fx * x + fy * y) + phase)
        base = torch.tensor(list(GROUNDS.values()))[hue][..., None, None]
        return base + constant + right * x + down * y + wave

    def cover(self, shape: Tensor, offset: Tensor) -> Tensor:
        """Silhouettes (..., cell, cell) of shapes (...) at offsets (..., 2)."""
        u = self._within - offset[..., 0, None, None]  # (..., 1, cell)
        v = self._within[:, None] - offset[..., 1, None, None]  # (..., cell, 1)
        return _coverage(shape[..., None, None], u, v)

    def render(self, scenes: Sequence[Scene] | Drawn) -> Tensor:
        """Images (n, 3, size, size) in [0, 1]."""
        drawn = scenes if isinstance(scenes, Drawn) else Drawn.of(scenes)
        shape = (drawn.kind - 1).clamp(min=0) // len(COLOURS)
        cover = self.cover(shape, drawn.offset) * (drawn.kind > 0)[..., None, None]  # (n, 9, cell, cell)
        ground = self.split(self.grounds(drawn.hue, drawn.own))
        cells = cover[:, :, None] * drawn.ink[..., None, None] + (1 - cover[:, :, None]) * ground
        return self.join(cells).clamp(0, 1)

    def split(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) as cells (n, 9, 3, cell, cell)."""
        n, c = len(images), self.cell
        return images.reshape(n, 3, SIDE, c, SIDE, c).permute(0, 2, 4, 1, 3, 5).reshape(n, CELLS, 3, c, c)

    def join(self, cells: Tensor) -> Tensor:
        """What `split` took apart."""
        n, c = len(cells), self.cell
        return cells.reshape(n, SIDE, SIDE, 3, c, c).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, self.size, self.size)

    def sessions(self, n: int, turns: int, seed: int, dependency: float = 0.0, still: float = 0.0) -> SceneSessions:
        """n planned sessions; `dependency` is how often a turn refers to what an earlier turn made, in [0, 1].

        `still` is the share of turns that ask for nothing. Raises InputError beyond 8 turns or at impossible shares.
        """
        if not 1 <= turns <= len(OPERATIONS):
            raise InputError(f"turns={turns}: the scenes world plans sessions of 1 to {len(OPERATIONS)} turns")
        for word, value in (("dependency", dependency), ("still", still)):
            if not 0 <= value <= 1:
                raise InputError(f"{word}={value} is no share; give 0 to 1")
        draw = random.Random(seed)
        return SceneSessions(self, tuple(plan(draw, turns, dependency, still) for _ in range(n)))


@dataclass(frozen=True)
class Plan:
    """One session: the clean start and its turns."""

    start: Scene
    turns: tuple[Turn, ...]

    @property
    def spared(self) -> frozenset[int]:
        """Cells whose objects no turn changes."""
        return frozenset(range(CELLS)) - frozenset().union(*(turn.edited for turn in self.turns))

    def state(self, turn: int) -> Scene:
        """The planned state after `turn` turns."""
        return self.turns[turn - 1].after if turn else self.start

    def recoloured(self, turn: int) -> bool:
        """Whether the background was to change in one of the first `turn` turns."""
        return any(one.operation == "background" for one in self.turns[:turn])


@dataclass(frozen=True)
class SceneSessions:
    """n sessions of equally many turns, whose planned images are known."""

    world: ScenesWorld
    plans: tuple[Plan, ...]

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, rows: slice | Sequence[int]) -> SceneSessions:
        chosen = self.plans[rows] if isinstance(rows, slice) else tuple(self.plans[i] for i in rows)
        return SceneSessions(self.world, chosen)

    @property
    def turns(self) -> int:
        return len(self.plans[0].turns)

    def prompts(self, turn: int) -> list[str]:
        """Instructions of turn 1, 2, ..."""
        return [plan.turns[turn - 1].words for plan in self.plans]

    def clean(self, turn: int) -> Tensor:
        """Planned images after `turn` turns, (n, 3, size, size); 0: the start."""
        return self.world.render([plan.state(turn) for plan in self.plans])


# planning


def scene(draw: random.Random) -> Scene:
    """2 to 4 objects of different kinds on a background of their own."""
    kinds = draw.sample([(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS))], draw.randint(2, 4))
    cells: list[Thing | None] = [None] * CELLS
    for cell, (shape, colour) in zip(draw.sample(range(CELLS), len(kinds)), kinds, strict=True):
        offset = (draw.uniform(-OFFSET, OFFSET), draw.uniform(-OFFSET, OFFSET))
        shade = (draw.uniform(-SHADE, SHADE), draw.uniform(-SHADE, SHADE), draw.uniform(-SHADE, SHADE))
        cells[cell] = Thing(shape, colour, offset, shade)
    own = tuple(
        (draw.uniform(-0.06, 0.06), draw.uniform(-0.12, 0.12), draw.uniform(-0.12, 0.12), draw.uniform(0, 0.05),
         draw.uniform(-1.2, 1.2), draw.uniform(-1.2, 1.2), draw.uniform(0, 2 * math.pi))
        for _ in range(3)
    )  # fmt: skip
    return Scene(tuple(cells), draw.randrange(len(HUES)), own)


def plan(draw: random.Random, turns: int, dependency: float = 0.0, still: float = 0.0) -> Plan:
    """A session in which each turn is possible and SPARED cells stay untouched; no operation twice where it can be."""
    start = now = scene(draw)
    made: list[Turn] = []
    touched: set[int] = set()
    unused = list(OPERATIONS)
    while len(made) < turns:
        if draw.random() < still:
            made.append(Turn("nothing", _say(draw, "nothing"), frozenset(), now))
            continue
        leans = bool(made) and draw.random() < dependency
        order = draw.sample(unused, len(unused)) + draw.sample(OPERATIONS, len(OPERATIONS))
        found = next(turn for turn in _offers(draw, order, now, touched, leans))
        made.append(found)
        touched |= found.edited
        now = found.after
        if found.operation in unused:
            unused.remove(found.operation)
    return Plan(start, tuple(made))


def _offers(draw: random.Random, order: Sequence[str], now: Scene, touched: set[int], leans: bool) -> Sequence[Turn]:
    """The first possible turn in this order, as a sequence of one; without a leaning target where there is none."""
    for lean in (True, False) if leans else (False,):
        for operation in order:
            turn = _turn(draw, operation, now, touched, lean)
            if turn and len(touched | turn.edited) <= CELLS - SPARED:
                return (turn,)
    # every other cell is used up: the background can always change
    turn = _turn(draw, "background", now, touched, False)
    assert turn
    return (turn,)


def _turn(draw: random.Random, operation: str, now: Scene, touched: set[int], leans: bool) -> Turn | None:
    """One turn, or None where the operation has no target: an object that an earlier turn made (`leans`), or not."""
    made = [thing for i, thing in enumerate(now.cells) if thing and (i in touched)]
    targets = [thing for thing in now.unique if (thing in made) == leans]
    absent = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS)) if not now.where((s, c))]
    if operation == "background" and not leans:
        hue = draw.choice([i for i in range(len(HUES)) if i != now.hue])
        return Turn("background", _say(draw, "background", HUES[hue]), frozenset(), replace(now, hue=hue))
    if operation == "add" and not leans and now.empty:
        shape, colour = draw.choice(absent)
        cell = draw.choice(now.empty)
        new = Thing(shape, colour)
        return _done("add", _say(draw, "add", new, PLACES[cell]), now, {cell: new})
    if operation == "background" or operation == "add" or not targets:
        return None
    target = draw.choice(targets)
    (cell,) = now.where(target.kind)
    if operation == "remove":
        return _done("remove", _say(draw, "remove", target), now, {cell: None})
    if operation == "recolour":
        colours = [c for s, c in absent if s == target.shape]
        if not colours:
            return None
        colour = draw.choice(colours)
        painted = Thing(target.shape, colour, target.offset)
        return _done("recolour", _say(draw, "recolour", target, COLOURS[colour]), now, {cell: painted})
    if operation == "reshape":
        shapes = [s for s, c in absent if c == target.colour]
        if not shapes:
            return None
        shape = draw.choice(shapes)
        return _done("reshape", _say(draw, "reshape", target, SHAPES[shape]), now, {cell: replace(target, shape=shape)})
    if operation == "move" and now.empty:
        to = draw.choice(now.empty)
        return _done("move", _say(draw, "move", target, PLACES[to]), now, {cell: None, to: target})
    if operation == "swap":
        others = [thing for thing in now.unique if thing is not target]
        if not others:
            return None
        other = draw.choice(others)
        (there,) = now.where(other.kind)
        return _done("swap", _say(draw, "swap", target, other), now, {cell: other, there: target})
    if operation == "count" and now.empty:
        return _done("count", _say(draw, "count", target), now, {now.empty[0]: target})
    return None


def _done(operation: Operation, words: str, now: Scene, changes: dict[int, Thing | None]) -> Turn:
    return Turn(operation, words, frozenset(changes), now.put(changes))


def _say(draw: random.Random, operation: Operation, *about: Thing | str) -> str:
    """An instruction in words; a fifth of the nouns and colours are synonyms."""
    verb = draw.choice(VERBS[operation])
    names = [str(one) for one in about]
    if operation == "count":
        words = f"{verb} two {names[0]}s"
    elif operation == "background":
        words = f"{verb} the background {names[0]}"
    elif operation == "nothing":
        words = f"{verb} nothing"
    else:
        words = verb + {
            "add": " a {} {}", "remove": " the {}", "recolour": " the {} {}", "reshape": " the {} into a {}",
            "move": " the {} to {}", "swap": " the {} and the {}",
        }[operation].format(*names)  # fmt: skip
    return " ".join(SYNONYMS.get(word, word) if draw.random() < 0.2 else word for word in words.split())
