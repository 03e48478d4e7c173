"""Exposure bias of an editor, measured: the same turns on its own outputs and on planned, clean sources.

In: an editing model, sessions whose planned states are known, their judge. Out: verdicts by turn, and how far an image
drifts when nothing is asked of the editor, turn after turn (MT-EditFlow notes, 1.3 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fieldsmith.measure import editing
from fieldsmith.measure.progress import progress
from fieldsmith.models.core import Model
from fieldsmith.models.editing import check_editor, edit, encode_unique, quantised
from fieldsmith.sessions import Sessions

HELD_OUT = 1_000_003  # added to the seed of sessions that are only measured

Channel = Callable[[Tensor, torch.Generator], Tensor]  # what happens to an image on its way to the next turn
Likeness = Callable[[Tensor, Tensor], Tensor]  # images, first images -> (n,) in [0, 1]


class Verdicts(Protocol):
    """Of one turn: was it done, (n,) bool, and how like the first image is what no turn names, (n,) in [0, 1]."""

    @property
    def done(self) -> Tensor: ...
    @property
    def kept_first(self) -> Tensor: ...


Judge = Callable[[Any, int, Tensor, Tensor, Tensor], Verdicts]  # sessions, turn, before, after, first


@dataclass(frozen=True)
class Exposure:
    """Verdicts of n sessions of T turns: on the model's own images, and on planned ones (None if not asked).

    images (n, T + 1, 3, h, w): the start and what came out of each turn on its own outputs.
    """

    own: tuple[Any, ...]
    clean: tuple[Any, ...] | None
    images: Tensor

    @property
    def verdicts(self) -> editing.SessionVerdicts:
        """What measure.editing reads: done, consistency with the first image, done on clean sources."""
        done, consistency = (
            torch.stack([getattr(one, name) for one in self.own], 1) for name in ("done", "kept_first")
        )
        clean = None if self.clean is None else torch.stack([one.done for one in self.clean], 1)
        return editing.SessionVerdicts(done, consistency, clean)


def exposure(
    model: Model,
    sessions: Sessions,
    judge: Judge,
    channel: Channel,
    steps: int,
    seed: int = 0,
    guidance: float | None = None,
    forced: bool = True,
) -> Exposure:
    """Run every session turn by turn; with `forced` once more on planned sources, at equal noise.

    Not counted as cost. Raises InputError where the model takes no source images.
    """
    check_editor(model)
    first = quantised(sessions.clean(0))
    source, before = first, first
    own, clean, images = [], [], [first]
    with model.uncounted(), progress("running sessions", sessions.turns * (1 + forced)) as advance:
        for turn in range(1, sessions.turns + 1):
            condition = encode_unique(model, sessions.prompts(turn))
            after = edit(model, condition, source, _generator(seed, turn), steps, guidance)
            own.append(judge(sessions, turn, before, after, first))
            advance()
            if forced:
                planned = quantised(sessions.clean(turn - 1))
                again = edit(model, condition, planned, _generator(seed, turn), steps, guidance)
                clean.append(judge(sessions, turn, planned, again, first))
                advance()
            images.append(after)
            before, source = after, channel(after, _generator(seed, turn, 1))
    return Exposure(tuple(own), tuple(clean) if forced else None, torch.stack(images, 1))


@dataclass(frozen=True)
class Drift:
    """What turns that ask for nothing do: away = 1 - likeness to the first image, and artefacts, the root mean squared
    distance to it in [0, 1]; each (turns, n)."""

    away: Tensor
    artefacts: Tensor


def identity_drift(
    model: Model,
    first: Tensor,
    nothing: str,
    likeness: Likeness,
    channel: Channel,
    turns: int,
    steps: int,
    seed: int = 0,
    guidance: float | None = None,
) -> Drift:
    """Ask `nothing` of an editor, `turns` >= 1 times in a row from images `first` (n, 3, h, w). Not counted as cost."""
    check_editor(model)
    now = first = quantised(first)
    condition = encode_unique(model, [nothing] * len(first))
    away, artefacts = [], []
    with model.uncounted(), progress("asking for nothing", turns) as advance:
        for turn in range(1, turns + 1):
            now = edit(model, condition, now, _generator(seed, turn, 2), steps, guidance)
            away.append(1 - likeness(now, first))
            artefacts.append((now - first).square().mean((1, 2, 3)).sqrt())
            now = channel(now, _generator(seed, turn, 3))
            advance()
    return Drift(torch.stack(away), torch.stack(artefacts))


def _generator(seed: int, turn: int, stream: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 64 + turn) * 8 + stream)
