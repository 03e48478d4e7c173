"""A triangle, a square and a pentagon, each in a column of its own or absent (VSM notes, section 4.1).

In: a size, 64 or 32, and patterns to hold out. Out: grey images of the seven patterns, and a judge of each column's
shape, number and place that also notices grey smear.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.pictures import pixels
from fieldsmith.worlds.judged import GRAIN, UNREADABLE, Verdicts, generator_of, readable, residual

SHAPES = ("triangle", "square", "pentagon")
Pattern = tuple[bool, bool, bool]  # which columns hold their shape
PATTERNS: tuple[Pattern, ...] = tuple(
    p for p in itertools.product((False, True), (False, True), (False, True)) if any(p)
)
SMEAR = 0.2  # largest RMS distance from black or white in a window; noise of 0.04 reaches 0.09
UNBINARY = 0.15  # mean distance from black or white above which nothing can be read; uniform noise has 0.25


@dataclass(frozen=True)
class Geometry:
    """Pixels; places are the ranges of x and of y, ends included, of the corner or (pentagon) the centre."""

    width: int
    height: int
    triangle: tuple[int, int]  # side, height
    square: int  # side less 1
    radius: int  # of the pentagon
    places: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    least_iou: float
    window: int


GEOMETRIES = {
    64: Geometry(
        21, 63, (11, 9), 7, 5,
        {"triangle": ((0, 10), (0, 52)), "square": ((1, 7), (1, 49)), "pentagon": ((5, 16), (5, 58))},
        0.9, 5,
    ),
    32: Geometry(
        10, 30, (8, 7), 5, 4,
        {"triangle": ((0, 1), (0, 22)), "square": ((0, 4), (0, 24)), "pentagon": ((4, 5), (4, 25))},
        0.9, 3,
    ),
}  # fmt: skip


class ColumnsWorld:
    """The world at 64 pixels, as published, or 32. Patterns in `hold_out` are never drawn for training."""

    name = "columns"
    channels = 1

    def __init__(self, size: int = 64, hold_out: tuple[Pattern, ...] = ()):
        if size not in GEOMETRIES:
            raise InputError(f"size={size}: the columns are drawn and judged at 64 or 32 pixels")
        unknown = [pattern for pattern in hold_out if tuple(pattern) not in PATTERNS]
        if unknown or len(set(hold_out)) == len(PATTERNS):
            raise InputError(
                f"hold_out={hold_out}: give some, not all, of the 7 patterns of three bools with at least one True"
            )
        self.size, self.geometry = size, GEOMETRIES[size]
        self.held = tuple(pattern for pattern in PATTERNS if pattern in hold_out)
        self.support = len(PATTERNS) - len(self.held)

    def sample(self, n: int, seed: int, held_out: bool = False) -> Tensor:
        """Raises InputError at held_out=True where no pattern is held out."""
        allowed = self.held if held_out else tuple(p for p in PATTERNS if p not in self.held)
        if not allowed:
            raise InputError("held_out=True, but no pattern of the columns is held out; make the world with hold_out=")
        generator = generator_of(seed, held_out)
        which = torch.tensor(allowed)[torch.randint(len(allowed), (n,), generator=generator)]
        return self.compose([(k, k, which[:, k]) for k in range(3)], n, generator)

    def novel(self, content: Hashable) -> bool:
        return content in self.held

    def draw(self, shape: str, x: int, y: int) -> Tensor:
        """One shape in a column, (height, width)."""
        g = self.geometry
        image = Image.new("L", (g.width, g.height))
        corners: list[tuple[float, float]]
        if shape == "triangle":
            side, height = g.triangle
            corners = [(x, y), (x + side, y), (x + side / 2, y + height)]
        elif shape == "square":
            corners = [(x, y), (x + g.square, y), (x + g.square, y + g.square), (x, y + g.square)]
        else:
            turns = [math.radians(72 * k) for k in range(1, 6)]
            corners = [(x + g.radius * math.cos(a), y + g.radius * math.sin(a)) for a in turns]
        ImageDraw.Draw(image).polygon(corners, fill=255, outline=255)
        return pixels(image)[0]

    @cached_property
    def placed(self) -> tuple[Tensor, ...]:
        """Per shape, every placement that the data have, (places, height, width)."""
        return tuple(self._at(shape, *self.geometry.places[shape]) for shape in SHAPES)

    @cached_property
    def bank(self) -> tuple[Tensor, ...]:
        """Per shape, every translate that lies in a column, also where the data have none, (m, height, width)."""
        g, bank = self.geometry, []
        for shape, placed in zip(SHAPES, self.placed, strict=True):
            anywhere = self._at(shape, (-1, g.width), (-1, g.height))
            least = placed.sum((1, 2)).min()  # a pixel less where the data clip a corner
            bank.append(anywhere[anywhere.sum((1, 2)) >= least])
        return tuple(bank)

    def judge(self, images: Tensor) -> Verdicts:
        """Each column empty or one translate of its shape, nothing elsewhere, every pixel near black or white."""
        images, finite = readable(images, self)
        g, white = self.geometry, (images > 0.5).float()
        distance = (images - white).abs().flatten(1).mean(1)
        clear = finite & (distance < UNBINARY)
        checks: list[tuple[str, Tensor]] = [
            (UNREADABLE, ~clear),
            ("grey smear", residual(images, white, g.window).flatten(1).amax(1) > SMEAR),
            ("grain", (images - white).square().mean((1, 2, 3)).sqrt() > GRAIN),
        ]
        present = []
        for k, name in enumerate(SHAPES):
            column = white[:, 0, : g.height, k * g.width : (k + 1) * g.width]
            area = column.sum((1, 2))
            best = [_best(column, bank) for bank in self.bank]
            iou, where = best[k]
            around = torch.nn.functional.max_pool2d(self.bank[k][where][:, None], 3, 1, 1)[:, 0]
            stray = (column > around).flatten(1).any(1)
            there, fits = area > 0, iou >= g.least_iou
            other = torch.stack([best[j][0] if j != k else torch.zeros_like(iou) for j in range(3)])
            foreign = there & ~fits & (other.amax(0) >= g.least_iou)
            several = there & ~foreign & (area > 1.4 * self.bank[k][0].sum())
            for j, shape in enumerate(SHAPES):
                checks.append((f"{shape} in the {name} column", foreign & (other.argmax(0) == j)))
            checks.append((f"more than one shape in the {name} column", several))
            checks.append((f"malformed {name}", there & ~fits & ~foreign & ~several))
            checks.append((f"stray pixels in the {name} column", fits & stray & ~several))
            present.append(there)
        margin = white.clone()
        margin[:, :, : g.height, : 3 * g.width] = 0
        checks += [("stray pixels at the margin", margin.flatten(1).any(1)), ("empty", ~torch.stack(present).any(0))]
        wrong = torch.stack([found for _, found in checks], 1)  # (n, checks)
        shown = torch.stack(present, 1).tolist()
        reasons = [
            tuple(checks[i][0] for i, found in enumerate(row) if found) if clear[at] else (UNREADABLE,)
            for at, row in enumerate(wrong.tolist())
        ]
        contents = tuple(None if said else tuple(row) for said, row in zip(reasons, shown, strict=True))
        return Verdicts(~wrong.any(1), clear, tuple(reasons), contents)

    def _at(self, shape: str, xs: tuple[int, int], ys: tuple[int, int]) -> Tensor:
        span = itertools.product(range(xs[0], xs[1] + 1), range(ys[0], ys[1] + 1))
        return torch.stack([self.draw(shape, x, y) for x, y in span])

    def compose(
        self, parts: list[tuple[int, int, Tensor]], n: int, generator: torch.Generator, half: str = ""
    ) -> Tensor:
        """Images with (shape, column, which images (n,)) at random places, of the upper or lower half if named."""
        g = self.geometry
        images = torch.zeros(n, 1, self.size, self.size)
        for shape, column, which in parts:
            placed = self.placed[shape]
            if half:
                free = placed[:, g.height // 2 :] if half == "upper" else placed[:, : g.height // 2 + 2]
                placed = placed[free.flatten(1).sum(1) == 0]
            chosen = placed[torch.randint(len(placed), (n,), generator=generator)] * which[:, None, None]
            target = images[:, 0, : g.height, column * g.width : (column + 1) * g.width]
            target.copy_(torch.maximum(target, chosen))
        return images


def _best(column: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The best IoU of each binary column with a bank, and where it is, both (n,)."""
    shared = column.flatten(1) @ bank.flatten(1).T
    iou = shared / (column.sum((1, 2))[:, None] + bank.sum((1, 2)) - shared)
    best, where = iou.max(1)
    return best, where
