"""Judges of one turn of many sessions: exact where a world knows the plan, a server that sees images elsewhere.

In: sessions, the turn, images before and after it and at the start (n, 3, h, w) in [0, 1]. Out: `EditScores` in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.rewards.edits import EditJudge, EditScores, disagreement
from fieldsmith.worlds import scenes, scenes_judge

Against = Literal["first", "previous"]


class Instructed(Protocol):
    """Sessions that say what each turn asks."""

    def prompts(self, turn: int) -> list[str]: ...


@dataclass(frozen=True)
class Exact:
    """The scenes world's own judge. Following is 1 - `partial` where the turn is done, and `partial` times the judge's
    partial credit: that alone pays for doing nothing where the result is like the source."""

    against: Against = "first"
    partial: float = 0.2

    def __call__(
        self, sessions: scenes.Sessions, turn: int, before: Tensor, after: Tensor, first: Tensor
    ) -> EditScores:
        found = scenes_judge.judge(sessions, turn, before, after, first)
        following = (1 - self.partial) * found.done + self.partial * found.following
        return EditScores.of(following, found.kept_first if self.against == "first" else found.kept)


@dataclass
class Remote:
    """A vision-language model asked two questions a turn. Raises InputError where its first replies to equal questions
    differ more than the edits do."""

    judge: EditJudge
    against: Against = "first"
    trusted: bool = False

    def __call__(self, sessions: Instructed, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        told = sessions.prompts(turn)
        if self.against == "previous" or turn == 1:
            found = self.judge(before, after, told)
        else:
            so_far = [list(row) for row in zip(*(sessions.prompts(t) for t in range(1, turn + 1)), strict=True)]
            following = self.judge.following(before, after, told)
            found = EditScores.of(following, self.judge.consistency(first, after, so_far))
        trouble = None if self.trusted else disagreement(found, self.judge.options.n)
        if trouble:
            raise InputError(trouble)
        self.trusted = True
        return found
