"""What an emoji picture shows, read from its pixels alone: objects, how many, where, how large, on what background.

The background is the named colour that most pixels have. What differs from it is explained by renders of the 48
objects, one after another: the render that takes most of the difference away, first at half resolution everywhere,
then pixel by pixel near there. A picture is valid if little is left, and if no object leans towards another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad

from fieldsmith.worlds.emoji_captions import BACKGROUNDS, OBJECTS, Scene
from fieldsmith.worlds.emoji_glyphs import LARGE, MIDDLE, SMALL, glyph, ground
from fieldsmith.worlds.judged import residual

MOST = 4  # objects that are looked for; training pictures have at most three
NEAR = 0.1  # distance in RGB within which a pixel has a background's colour
LEAST_GROUND = 0.15  # share of pixels that must have it
EXPLAINED = 0.35  # of its own size: how much of the difference a render must take away to count as an object
WINDOW, DEFECT, STAIN = 7, 0.2, 0.06  # pixels; largest RMS of what is left there, at objects and on the background
EDGE = 11  # pixels of a window that an object reaches into: WINDOW and the softness of its edge
LEAN = 0.35  # how far an object may lean from its render towards another's; half-way is 0.5
APART = 0.8  # of the sum of their half sides: how near the middles of two objects may be
MARGIN = 4  # pixels by which windows may stand over the edge, even
BATCH = 64


@dataclass(frozen=True)
class Thing:
    """An object in a picture: its side, and where its middle is, in pixels from the left and the top."""

    name: str
    side: int
    x: float
    y: float


@dataclass(frozen=True)
class Seen:
    """All that a valid picture shows."""

    things: tuple[Thing, ...]
    background: str

    def shows(self, asked: Scene | str) -> bool:
        """Whether it shows exactly the objects that a scene asks for, where and how it asks; or, of a name, any."""
        if isinstance(asked, str):
            return any(thing.name == asked for thing in self.things)
        if asked.background not in (None, self.background):
            return False
        if asked.groups and Counter(t.name for t in self.things) != Counter(g.name for g in asked.objects):
            return False
        small = {group.name for group in asked.groups if group.small}
        if any(thing.name in small and thing.side > max(SMALL) for thing in self.things):
            return False
        if asked.relation is None:
            return True
        first, second = (next(t for t in self.things if t.name == group.name) for group in asked.groups)
        right, down = first.x - second.x, first.y - second.y
        along = {"left of": -right, "right of": right, "above": -down, "below": down}[asked.relation]
        return along > 0 and along > min(abs(right), abs(down))

    def __str__(self) -> str:
        counts = Counter(thing.name for thing in self.things)
        return f"{' and '.join(f'{count} {name}' for name, count in sorted(counts.items()))} on {self.background}"


@dataclass(frozen=True)
class Verdicts:
    """The judge's reading of each picture: what it shows, or None and the reason."""

    seen: tuple[Seen | None, ...]
    reasons: tuple[str, ...]  # '' where valid

    @property
    def valid(self) -> Tensor:
        return torch.tensor([one is not None for one in self.seen], dtype=torch.bool)

    def shows(self, asked: Scene | str) -> Tensor:
        """Whether each picture shows what is asked (`Seen.shows`), (n,) bool; an invalid one shows nothing."""
        return torch.tensor([one is not None and one.shows(asked) for one in self.seen], dtype=torch.bool)

    def names(self) -> list[str]:
        """What the judge saw in each picture, in words."""
        return [str(one) if one else "nothing" for one in self.seen]

    def labels(self) -> Tensor:
        """One label a picture, (n,): its objects in any order; all pictures of more than three, all invalid ones."""
        base = len(OBJECTS) + 1
        labels = []
        for one in self.seen:
            digits = sorted(OBJECTS.index(thing.name) + 1 for thing in one.things) if one else []
            code = sum(digit * base**place for place, digit in enumerate(digits))
            labels.append(base**3 + 1 if one is None else min(code, base**3))
        return torch.tensor(labels)


@dataclass(frozen=True)
class Bank:
    """Renders of every object at some sides, shifted by up to a pixel, in windows of one size.

    On a background b a render differs from it by cover (ink - b). m renders, s sides, w pixels a window: kernels
    (m, 4 w w), cover times ink and then cover; norms (6, m), squared differences by background; gram (6, s, 48, 48),
    their products at equal side and shift; coarse (k, 4, w / 2, w / 2) and coarse_norms (6, k), unshifted, of every
    second side, at half resolution.
    """

    sides: tuple[int, ...]
    width: int
    kernels: Tensor
    norms: Tensor
    gram: Tensor
    coarse: Tensor
    coarse_norms: Tensor

    def place(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Object, index of the side, top and left in the window, of rows of the bank."""
        name, rest = row // (len(self.sides) * 9), row % (len(self.sides) * 9)
        side = rest // 9
        corner = (self.width - torch.tensor(self.sides)[side]) // 2 - 1
        return name, side, corner + rest % 9 // 3, corner + rest % 3


@cache
def grounds() -> Tensor:
    """Colours of the backgrounds, (6, 3)."""
    return torch.stack([torch.from_numpy(ground(name)) for name in BACKGROUNDS])


@cache
def banks() -> tuple[Bank, Bank]:
    """Of objects that share a picture, and of large ones."""
    return _bank((*SMALL, *MIDDLE)), _bank(LARGE)


def _bank(sides: tuple[int, ...]) -> Bank:
    width = max(sides) + 2
    rows = []
    for name in OBJECTS:
        for side in sides:
            ink, cover = (torch.from_numpy(part).permute(2, 0, 1) for part in glyph(name, side))
            both, start = torch.cat((ink * cover, cover)), (width - side) // 2 - 1
            for top, left in product(range(start, start + 3), repeat=2):
                rows.append(pad(both, (left, width - side - left, top, width - side - top)))
    kernels = torch.stack(rows)
    by_side = kernels[4::9].unflatten(0, (len(OBJECTS), len(sides))).transpose(0, 1)  # (s, 48, 4, w, w)
    coarse = avg_pool2d(by_side[1::2].flatten(0, 1), 2)  # a pixel more or less does not matter there
    gram = torch.stack([_products(_on(by_side, i)) for i in range(len(BACKGROUNDS))])
    norms, coarse_norms = (
        torch.stack([_on(part, i).square().sum((1, 2, 3)) for i in range(len(BACKGROUNDS))])
        for part in (kernels, coarse)
    )
    return Bank(sides, width, kernels.flatten(1), norms, gram, coarse, coarse_norms)


def _on(kernels: Tensor, background: int) -> Tensor:
    """How renders (..., 4, w, w) differ from a background, (..., 3, w, w)."""
    return kernels[..., :3, :, :] - grounds()[background][:, None, None] * kernels[..., 3:, :, :]


def _products(renders: Tensor) -> Tensor:
    """Of each two of renders (..., n, 3, w, w): (..., n, n)."""
    flat = renders.flatten(-3)
    return flat @ flat.transpose(-1, -2)


def read(images: Tensor, finite: Tensor) -> Verdicts:
    """Read pictures (n, 3, 48, 48) in [0, 1]; what is not finite (n,) shows nothing."""
    parts = [_judge(part) for part in images.split(BATCH)]
    seen = [one for part in parts for one in part[0]]
    reasons = [one for part in parts for one in part[1]]
    for i in (~finite).nonzero()[:, 0].tolist():
        seen[i], reasons[i] = None, "not finite"
    return Verdicts(tuple(seen), tuple(reasons))


def _judge(images: Tensor) -> tuple[list[Seen | None], list[str]]:
    far = (images[:, None] - grounds()[:, :, None, None]).square().sum(2).sqrt()  # (n, 6, 48, 48)
    share, background = (far < NEAR).float().mean((2, 3)).max(1)
    difference = images - grounds()[background][:, :, None, None]
    seen, reasons = _read(difference, background, banks())
    # where a large object was seen in two small ones, they explain more
    rows = torch.tensor([i for i, one in enumerate(seen) if one is None], dtype=torch.long)
    if len(rows):
        for i, one, reason in zip(rows.tolist(), *_read(difference[rows], background[rows], banks()[:1]), strict=True):
            seen[i], reasons[i] = one, reason
    for i in (share < LEAST_GROUND).nonzero()[:, 0].tolist():
        seen[i], reasons[i] = None, "no known background"
    return seen, reasons


def _read(difference: Tensor, background: Tensor, banks: Sequence[Bank]) -> tuple[list[Seen | None], list[str]]:
    """What pictures show that differ so (n, 3, 48, 48) from their backgrounds (n,), and why they show nothing."""
    left, things, lean = _explain(difference, background, banks)
    rms = residual(left, torch.zeros(()), WINDOW)
    objects = max_pool2d((left != difference).any(1, keepdim=True).float(), EDGE, 1, EDGE // 2)[:, 0] > 0
    defect, stain = (rms * objects).amax((1, 2)), (rms * ~objects).amax((1, 2))
    seen: list[Seen | None] = []
    reasons: list[str] = []
    for i, found in enumerate(things):
        reason = (
            "no object" if not found
            else "part of an object is not as it should be" if defect[i] > DEFECT
            else "the background is stained" if stain[i] > STAIN
            else "an object is between two" if lean[i] > LEAN
            else "objects overlap" if any(_overlap(a, b) for a, b in combinations(found, 2))
            else ""
        )  # fmt: skip
        reasons.append(reason)
        seen.append(None if reason else Seen(tuple(found), tuple(BACKGROUNDS)[int(background[i])]))
    return seen, reasons


def _overlap(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) < APART * (a.side + b.side) / 2


def _explain(difference: Tensor, background: Tensor, banks: Sequence[Bank]) -> tuple[Tensor, list[list[Thing]], Tensor]:
    """What is left of the difference from the background (n, 3, 48, 48), the objects found, how far any leans (n,)."""
    n = len(difference)
    left = pad(difference, (MARGIN,) * 4)
    things: list[list[Thing]] = [[] for _ in range(n)]
    lean = torch.zeros(n)
    active = torch.arange(n)
    for _ in range(MOST):
        kind, top, across = _search(left[active], background[active], banks)
        again = []
        for which, bank in enumerate(banks):
            rows = active[kind == which]
            if len(rows):
                here = (top[kind == which], across[kind == which])
                again.append(_take(left, rows, bank, background[rows], here, things, lean))
        active = torch.cat(again)
        if not len(active):
            break
    return left[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN], things, lean


def _with_ground(left: Tensor, background: Tensor) -> Tensor:
    """Differences (n, 3, ...) with a fourth channel, what the background's colour takes off: (n, 4, ...)."""
    colour = grounds()[background][:, :, None, None]
    return torch.cat((left, -(left * colour).sum(1, keepdim=True)), 1)


def _search(left: Tensor, background: Tensor, banks: Sequence[Bank]) -> tuple[Tensor, Tensor, Tensor]:
    """The bank, top and left (n,) of the window in which some render takes most away, at half resolution."""
    half = avg_pool2d(_with_ground(left, background), 2)
    gains, places = [], []
    for bank in banks:
        gain = 2 * conv2d(half, bank.coarse) - bank.coarse_norms[background][:, :, None, None]
        best, where = gain.amax(1).flatten(1).max(1)
        gains.append(best)
        places.append(torch.stack((where // gain.shape[-1], where % gain.shape[-1])))
    kind = torch.stack(gains).argmax(0)
    top, across = 2 * torch.stack(places)[kind, :, torch.arange(len(kind))].T
    return kind, top, across


def _take(
    left: Tensor,
    rows: Tensor,
    bank: Bank,
    background: Tensor,
    corner: tuple[Tensor, Tensor],
    things: list[list[Thing]],
    lean: Tensor,
) -> Tensor:
    """Find the best render in each row's window, take it away, note it; the rows where there was one."""
    within = torch.arange(bank.width)
    index = (rows[:, None, None], corner[0][:, None, None] + within[:, None], corner[1][:, None, None] + within)
    patch = left.movedim(1, -1)[index].movedim(-1, 1)  # (n, 3, w, w)
    products = _with_ground(patch, background).flatten(1) @ bank.kernels.T  # (n, m)
    gain, best = (2 * products - bank.norms[background]).max(1)
    norm = bank.norms[background, best]
    found = (gain > EXPLAINED * norm).nonzero()[:, 0]
    name, side, top, across = bank.place(best)
    # how far each leans towards the other objects at the same side and shift
    each = torch.arange(len(OBJECTS)) * len(bank.sides) * 9 + (best % (len(bank.sides) * 9))[:, None]
    gram = bank.gram[background, side, name]  # (n, 48)
    squares = bank.norms[background[:, None], each]
    towards = products.gather(1, each) - products.gather(1, best[:, None]) - gram + norm[:, None]
    apart = squares + norm[:, None] - 2 * gram
    leaning = torch.where(apart > 1e-3, towards / apart, torch.zeros(())).amax(1)
    kernel = bank.kernels[best].unflatten(1, (4, bank.width, bank.width))
    render = kernel[:, :3] - grounds()[background][:, :, None, None] * kernel[:, 3:]
    for i in found.tolist():
        row, length = int(rows[i]), bank.sides[int(side[i])]
        left[row][(slice(None), *(part[i] for part in index[1:]))] -= render[i]  # type: ignore[index]
        x, y = (int(corner[axis][i] + (top, across)[axis][i]) + length / 2 - MARGIN for axis in (1, 0))
        things[row].append(Thing(OBJECTS[int(name[i])], length, x, y))
        lean[row] = torch.maximum(lean[row], leaning[i])
    return rows[found]
