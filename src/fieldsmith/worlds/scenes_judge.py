"""Reading an edited scene from its pixels alone: was the turn done, and is the rest as it was (MT-EditFlow notes, 4.2).

A cell is read as the nearest of thirteen contents (nothing, or three shapes in four colours), drawn over the
background that the session has there. What each number means is in `EditVerdicts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.worlds.scenes import CELLS, COLOURS, GROUNDS, INK, SHAPES, Drawn, Scene, SceneSessions, ScenesWorld

GRAIN = 0.11  # largest RMS distance, in [0, 1] of a channel, at which a cell counts as drawn right
SCALE = 0.0075  # mean squared distance at which partial credit has fallen to 1/e
EXACT = 0.06  # largest RMS distance at which an untouched cell counts as unchanged


@dataclass(frozen=True)
class EditVerdicts:
    """One turn of n sessions, each (n,).

    done: every cell whose object the turn changes is read as planned, within GRAIN (a new background: its hue is the
    nearest, within GRAIN); a turn that asks for nothing is done where no cell's content changed.
    following: partial credit for the same, the mean over those cells of exp(-MSE / SCALE), in [0, 1].
    kept: the same over cells that no turn of the session touches, against the image before; kept_first: against the
    first image. From a turn that changes the background on, both are measured against the background that is read.
    unchanged: the share of those cells within EXACT of the first image.
    """

    done: Tensor
    following: Tensor
    kept: Tensor
    kept_first: Tensor
    unchanged: Tensor

    def __getitem__(self, rows: Tensor) -> EditVerdicts:
        return EditVerdicts(*(part[rows] for part in vars(self).values()))


def judge(
    sessions: SceneSessions, turn: int, before: Tensor, after: Tensor, first: Tensor | None = None
) -> EditVerdicts:
    """What turn 1, 2, ... made of images `before`, both (n, 3, size, size) in [0, 1]; `first` is the clean start.

    Raises InputError on images of another shape or number, or with NaN.
    """
    world, plans = sessions.world, sessions.plans
    first = sessions.clean(0) if first is None else first
    for images in (before, after, first):
        if images.shape != (len(plans), 3, world.size, world.size):
            raise InputError(
                f"images of shape {tuple(images.shape)} for {len(plans)} sessions; the judge reads "
                f"({len(plans)}, 3, {world.size}, {world.size})"
            )
        if not bool(images.isfinite().all()):
            raise InputError("the images hold NaN or infinity; look at the model that made them")
    before, after, first = (images.cpu().float() for images in (before, after, first))
    was, planned = [plan.state(turn - 1) for plan in plans], [plan.state(turn) for plan in plans]
    edited = torch.zeros(len(plans), CELLS, dtype=torch.bool)
    spared = torch.zeros(len(plans), CELLS, dtype=torch.bool)
    for i, plan in enumerate(plans):
        edited[i, list(plan.turns[turn - 1].edited)] = True
        spared[i, list(plan.spared)] = True
    free = torch.tensor([plan.recoloured(turn) for plan in plans])
    free_before = torch.tensor([plan.recoloured(turn - 1) for plan in plans])
    asks_hue = torch.tensor([plan.turns[turn - 1].operation == "background" for plan in plans])
    asks_nothing = torch.tensor([plan.turns[turn - 1].operation == "nothing" for plan in plans])

    seen = _seen(world, after, planned, was, free)
    error = _mse(world, after, planned, seen.hue)
    right = (seen.kind == Drawn.of(planned).kind) & (error.sqrt() < GRAIN)
    done = (right | ~edited).all(1)
    following = _mean(torch.exp(-error / SCALE), edited)
    # a new background is read where no object is planned
    by_hue = _ground_errors(world, after, planned)  # (n, hues)
    hue = torch.tensor([scene.hue for scene in planned])
    asked = by_hue.gather(1, hue[:, None])[:, 0]
    done = torch.where(asks_hue, (by_hue.argmin(1) == hue) & (asked.sqrt() < GRAIN), done)
    following = torch.where(asks_hue, torch.exp(-asked / SCALE), following)

    residual = after - world.render(_with_hue(planned, seen.hue))
    hue_before = _seen_hue(world, before, was, free_before)
    against = before - world.render(_with_hue(was, hue_before))
    kept = _per_cell(world, residual - against)
    start = first - sessions.clean(0)
    kept_first = _per_cell(world, residual - start)
    still = torch.exp(-kept / SCALE)
    done = torch.where(asks_nothing, (seen.kind == _seen(world, before, was, was, free_before).kind).all(1), done)
    following = torch.where(asks_nothing, still.mean(1), following)
    return EditVerdicts(
        done, following, _mean(still, spared), _mean(torch.exp(-kept_first / SCALE), spared),
        _mean((kept_first.sqrt() < EXACT).float(), spared),
    )  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    kind: Tensor  # (n, 9)
    hue: Tensor  # (n,)


def _seen(world: ScenesWorld, images: Tensor, planned: Sequence[Scene], was: Sequence[Scene], free: Tensor) -> _Seen:
    """Contents nearest to each cell's pixels, drawn where the plan, or the state before it, has an object."""
    hue = _seen_hue(world, images, planned, free)
    now, earlier = Drawn.of(planned), Drawn.of(was)
    offset = torch.where((now.kind > 0)[..., None], now.offset, earlier.offset)
    ground = world.split(world.grounds(hue, now.own))  # (n, 9, 3, c, c)
    cells = world.split(images)
    errors = [(cells - ground).square().mean((2, 3, 4))]
    for shape in range(len(SHAPES)):
        cover = world.cover(torch.full_like(now.kind, shape), offset)[:, :, None]
        for colour, name in enumerate(COLOURS):
            pure = torch.tensor(INK[name]).expand(now.ink.shape)
            # a shape left as it was has the planned shade too
            alike = (now.kind > 0) & ((now.kind - 1) % len(COLOURS) == colour)
            ink = torch.where(alike[..., None], now.ink, pure)[..., None, None]
            errors.append((cells - (cover * ink + (1 - cover) * ground)).square().mean((2, 3, 4)))
    return _Seen(torch.stack(errors, -1).argmin(-1), hue)


def _seen_hue(world: ScenesWorld, images: Tensor, planned: Sequence[Scene], free: Tensor) -> Tensor:
    """The background's hue: the plan's where no turn was to change it, the nearest where one was."""
    told = torch.tensor([scene.hue for scene in planned])
    return torch.where(free, _ground_errors(world, images, planned).argmin(1), told)


def _ground_errors(world: ScenesWorld, images: Tensor, planned: Sequence[Scene]) -> Tensor:
    """Mean squared distance to each hue's background, over pixels with no planned object, (n, hues)."""
    now = Drawn.of(planned)
    shape = (now.kind - 1).clamp(min=0) // len(COLOURS)
    cover = world.cover(shape, now.offset) * (now.kind > 0)[..., None, None]
    bare = world.join((cover < 0.05)[:, :, None].expand(-1, -1, 3, -1, -1).float())
    found = []
    for hue in range(len(GROUNDS)):
        apart = (images - world.grounds(torch.full_like(now.hue, hue), now.own)).square()
        found.append((apart * bare).sum((1, 2, 3)) / bare.sum((1, 2, 3)))
    return torch.stack(found, 1)


def _with_hue(scenes: Sequence[Scene], hue: Tensor) -> Drawn:
    drawn = Drawn.of(scenes)
    return Drawn(drawn.kind, drawn.offset, drawn.ink, hue, drawn.own)


def _mse(world: ScenesWorld, images: Tensor, planned: Sequence[Scene], hue: Tensor) -> Tensor:
    """Mean squared distance of each cell to the plan under a hue, (n, 9)."""
    return _per_cell(world, images - world.render(_with_hue(planned, hue)))


def _per_cell(world: ScenesWorld, apart: Tensor) -> Tensor:
    return world.split(apart).square().mean((2, 3, 4))


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over marked cells, (n,); 1 where none is marked."""
    count = where.sum(1)
    return torch.where(count > 0, (values * where).sum(1) / count.clamp(min=1), torch.ones(len(values)))


def likeness(world: ScenesWorld, images: Tensor, first: Tensor) -> Tensor:
    """How like the first images whole images are, both (n, 3, size, size): partial credit over all cells, (n,)."""
    return torch.exp(-_per_cell(world, images - first) / SCALE).mean(1)


@dataclass(frozen=True)
class Channel:
    """What happens to an image between two turns: contrast, blur, noise, 8 bit; the default quantises alone."""

    contrast: float = 1.0
    """Factor on the distance from mid grey."""
    blur: float = 0.0
    """Weight of the mean of a pixel's 3 x 3 neighbourhood, in [0, 1]."""
    noise: float = 0.0
    """Standard deviation of added noise, in [0, 1] of a channel."""

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] as the next turn gets them. Raises ValueError for noise without a generator."""
        if self.blur:
            padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
            images = (1 - self.blur) * images + self.blur * torch.nn.functional.avg_pool2d(padded, 3, stride=1)
        images = 0.5 + self.contrast * (images - 0.5)
        if self.noise:
            if generator is None:
                raise ValueError(f"noise={self.noise}: a noisy channel needs a generator")
            images = images + self.noise * torch.randn(images.shape, generator=generator).to(images)
        return (images.clamp(0, 1) * 255).round() / 255
