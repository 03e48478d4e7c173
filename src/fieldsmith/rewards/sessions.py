"""Judges of one turn of many sessions: exact where a world knows the plan, a server that sees images elsewhere.

In: `Edits`, one turn's images before and after it. Out: `EditScores` in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fieldsmith.errors import InputError
from fieldsmith.rewards.edits import EditJudge, EditScores, disagreement
from fieldsmith.sessions import Edits
from fieldsmith.worlds import scenes_judge

Against = Literal["first", "previous"]  # what consistency is measured against


@dataclass(frozen=True)
class Exact:
    """The scenes world's own judge. Following is 1 - `partial` where the turn is done, and `partial` times the judge's
    partial credit: that alone pays for doing nothing where the result is like the source."""

    against: Against = "first"
    partial: float = 0.2

    def __call__(self, edits: Edits) -> EditScores:
        verdicts = scenes_judge.judge(edits.sessions, edits.turn, edits.before, edits.after, edits.first)  # type: ignore[arg-type]
        following = (1 - self.partial) * verdicts.done + self.partial * verdicts.following
        return EditScores.of(following, verdicts.kept_first if self.against == "first" else verdicts.kept)


@dataclass
class Remote:
    """A vision-language model asked two questions a turn. Raises InputError where its first replies to equal questions
    differ more than the edits do."""

    judge: EditJudge
    against: Against = "first"
    trusted: bool = False

    def __call__(self, edits: Edits) -> EditScores:
        if self.against == "previous" or edits.turn == 1:
            scores = self.judge(edits.before, edits.after, edits.instructions)
        else:
            following = self.judge.following(edits.before, edits.after, edits.instructions)
            consistency = self.judge.consistency(edits.first, edits.after, edits.instructions_so_far)
            scores = EditScores.of(following, consistency)
        trouble = None if self.trusted else disagreement(scores, self.judge.options.n)
        if trouble:
            raise InputError(trouble)
        self.trusted = True
        return scores
