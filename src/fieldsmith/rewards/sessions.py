"""Judges of one turn of many editing sessions: exact where a world knows the plan, a server or a function elsewhere.

In: sessions, the turn, images before and after it and at the start (n, 3, h, w) in [0, 1]. Out: `EditScores` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fieldsmith.errors import InputError, RewardError, RunError
from fieldsmith.functions import check_signature, load_function, name_of
from fieldsmith.rewards.edits import EditJudge, EditScores, disagreement, edit_judge
from fieldsmith.rewards.reward import as_numbers, check_images, failure
from fieldsmith.sessions import Sessions
from fieldsmith.worlds import scenes_judge
from fieldsmith.worlds.scenes import SceneSessions

Against = Literal["first", "previous"]
TurnJudge = Callable[[Any, int, Tensor, Tensor, Tensor], EditScores]  # sessions, turn, before, after, first


def load(judge: str | Callable[..., Any], against: Against = "first") -> TurnJudge:
    """The judge of turns that words or a function name; consistency is judged against the first or the previous image.

    'exact' (a world's own), 'remote:http://HOST:PORT/v1?model=MODEL', file.py:name, package.module:name, or a function
    judge(before, after, instructions) that returns (following, consistency): n numbers in [0, 1] each. Raises
    InputError at other words, a bad address or a server that does not answer, RewardError at a function that takes
    other arguments.
    """
    if isinstance(judge, (Exact, Remote, OfFunction)):
        return judge
    if not isinstance(judge, str):
        return OfFunction(judge, name_of(judge), against)
    kind, _, address = judge.partition(":")
    if judge == "exact":
        return Exact(against)
    if kind == "remote":
        return Remote(edit_judge(address), against)
    if not address:
        raise InputError(
            f"judge '{judge}' is unknown; use exact, remote:http://HOST:PORT/v1?model=MODEL or file.py:name"
        )
    return OfFunction(load_function(judge, "judge"), judge, against)


@dataclass(frozen=True)
class Exact:
    """The scenes world's own judge. Following is 1 - `partial` where the turn is done, and `partial` times the judge's
    partial credit: that alone pays for doing nothing where the result is like the source."""

    against: Against = "first"
    partial: float = 0.2

    def __call__(self, sessions: SceneSessions, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        verdicts = scenes_judge.judge(sessions, turn, before, after, first)
        following = (1 - self.partial) * verdicts.done + self.partial * verdicts.following
        return EditScores.of(following, verdicts.kept_first if self.against == "first" else verdicts.kept)


@dataclass
class Remote:
    """A vision-language model asked two questions a turn. Raises InputError where its first replies to equal questions
    differ more than the edits do."""

    judge: EditJudge
    against: Against = "first"
    trusted: bool = False

    def __call__(self, sessions: Sessions, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        instructions = sessions.prompts(turn)
        if self.against == "previous" or turn == 1:
            scores = self.judge(before, after, instructions)
        else:
            following = self.judge.following(before, after, instructions)
            scores = EditScores.of(following, self.judge.consistency(first, after, _so_far(sessions, turn)))
        trouble = None if self.trusted else disagreement(scores, self.judge.options.n)
        if trouble:
            raise InputError(trouble)
        self.trusted = True
        return scores


class OfFunction:
    """A user's judge(before, after, instructions) -> (following, consistency).

    Against the first image it is asked a second time at turns after the first: with that image as `before` and all
    instructions since, joined by '; then: ', for the consistency.
    """

    def __init__(self, function: Callable[..., Any], name: str, against: Against):
        check_signature(function, f"judge '{name}'", "before", "after", "instructions")
        self.function, self.name, self.against = function, name, against

    def __call__(self, sessions: Sessions, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        following, consistency = self._ask(before, after, sessions.prompts(turn))
        if self.against == "first" and turn > 1:
            joined = ["; then: ".join(instructions) for instructions in _so_far(sessions, turn)]
            consistency = self._ask(first, after, joined)[1]
        return EditScores.of(following, consistency)

    @torch.no_grad()
    def _ask(self, before: Tensor, after: Tensor, instructions: list[str]) -> list[Tensor]:
        """Following and consistency, (n,) float32 each. Raises RewardError at anything else."""
        what = f"judge '{self.name}'"
        for images in (before, after):
            check_images(images)
        try:
            output = self.function(before.clone(), after.clone(), list(instructions))
        except (InputError, RunError):
            raise
        except (Exception, SystemExit) as error:  # whatever a user's function may raise
            raise RewardError(failure(what, error, instructions)) from error
        try:
            following, consistency = output
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{what} returned a {type(output).__name__} that is no pair; return (following, consistency), with one "
                "number an edit each"
            ) from error
        parts = {"following": following, "consistency": consistency}
        return [as_numbers(part, f"{what} ({name})", instructions).cpu().float() for name, part in parts.items()]


def _so_far(sessions: Sessions, turn: int) -> list[list[str]]:
    """Each session's instructions up to a turn."""
    return [list(row) for row in zip(*(sessions.prompts(t) for t in range(1, turn + 1)), strict=True)]
