"""Exposure bias of an editor, measured: the same turns on its own outputs and on planned, clean sources.

In: an editing model, sessions whose planned states are known. Out: verdicts by turn, and how far an image drifts when
nothing is asked of the editor, turn after turn (MT-EditFlow notes, 1.3 and 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith.metrics import editing
from fieldsmith.models.core import Model
from fieldsmith.models.editing import check_editor, edit, encode_unique, quantised
from fieldsmith.worlds.scenes import NOTHING, Sessions
from fieldsmith.worlds.scenes_judge import Channel, EditVerdicts, judge


@dataclass(frozen=True)
class Exposure:
    """Verdicts of n sessions of T turns: on the model's own images, and on planned ones (None if not asked).

    images (n, T + 1, 3, h, w): the start and what came out of each turn on its own outputs.
    drift (turns, n): 1 - consistency with the first image after each turn of `NOTHING`; artefacts (turns, n): root
    mean squared distance to it.
    """

    own: tuple[EditVerdicts, ...]
    clean: tuple[EditVerdicts, ...] | None
    images: Tensor
    drift: Tensor | None
    artefacts: Tensor | None

    @property
    def sessions(self) -> editing.Sessions:
        """What metrics.editing reads: done, consistency with the first image, done on clean sources."""
        return editing.Sessions(
            torch.stack([one.done for one in self.own], 1), torch.stack([one.kept_first for one in self.own], 1),
            None if self.clean is None else torch.stack([one.done for one in self.clean], 1),
        )  # fmt: skip


def exposure(
    model: Model,
    sessions: Sessions,
    steps: int,
    seed: int = 0,
    guidance: float | None = None,
    channel: Channel | None = None,
    forced: bool = True,
    still: int = 0,
    still_sessions: int | None = None,
) -> Exposure:
    """Run every session turn by turn; with `forced` once more on planned sources, at equal noise.

    The channel is what happens to an image on its way to the next turn (None: it is quantised). `still` turns of
    NOTHING measure drift, on the first `still_sessions` starts (None: all). Not counted as cost. Raises InputError
    where the model takes no source images.
    """
    check_editor(model)
    channel = channel or Channel()
    first = quantised(sessions.clean(0))
    source, before = first, first
    own, clean, images = [], [], [first]
    with model.uncounted():
        for turn in range(1, sessions.turns + 1):
            condition = encode_unique(model, sessions.prompts(turn))
            after = edit(model, condition, source, _draws(seed, turn), steps, guidance)
            own.append(judge(sessions, turn, before, after, first))
            if forced:
                planned = quantised(sessions.clean(turn - 1))
                again = edit(model, condition, planned, _draws(seed, turn), steps, guidance)
                clean.append(judge(sessions, turn, planned, again, first))
            images.append(after)
            before, source = after, channel(after, _draws(seed, turn, 1))
        drift, artefacts = [], []
        first = first[:still_sessions]
        now, condition = first, encode_unique(model, [NOTHING] * len(first))
        for turn in range(1, still + 1):
            now = edit(model, condition, now, _draws(seed, turn, 2), steps, guidance)
            apart = (now - first).square()
            drift.append(1 - torch.exp(-sessions.world.split(apart).mean((2, 3, 4)) / 0.0075).mean(1))
            artefacts.append(apart.mean((1, 2, 3)).sqrt())
            now = channel(now, _draws(seed, turn, 3))
    return Exposure(
        tuple(own), tuple(clean) if forced else None, torch.stack(images, 1),
        torch.stack(drift) if drift else None, torch.stack(artefacts) if artefacts else None,
    )  # fmt: skip


def _draws(seed: int, turn: int, stream: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 64 + turn) * 8 + stream)
