"""Judges of one turn of many editing sessions: exact where a world knows the plan, a server or a function elsewhere.

In: sessions, the turn, images before and after it and at the start (n, 3, h, w) in [0, 1]. Out: `EditScores` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fieldsmith.errors import InputError, RewardError
from fieldsmith.functions import call, check_signature, load_function, name_of
from fieldsmith.rewards.edits import EditJudge, EditScores, disagreement, edit_judge
from fieldsmith.rewards.reward import as_numbers, check_images, images_of
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
    if not isinstance(judge, str):
        return judge if isinstance(judge, (Exact, ByEdit)) else ByEdit(FunctionJudge(judge, name_of(judge)), against)
    kind, _, address = judge.partition(":")
    if judge == "exact":
        return Exact(against)
    if kind == "remote":
        return ByEdit(edit_judge(address), against)
    if not address:
        raise InputError(
            f"judge '{judge}' is unknown; use exact, remote:http://HOST:PORT/v1?model=MODEL or file.py:name"
        )
    return ByEdit(FunctionJudge(load_function(judge, "judge"), judge), against)


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
class ByEdit:
    """A judge of single edits, asked of turns; against the first image, consistency is a question of its own at later
    turns, with all instructions since. Raises InputError where a judge's first replies to equal questions differ more
    than the edits do."""

    judge: EditJudge | FunctionJudge
    against: Against = "first"
    trusted: bool = False

    def __call__(self, sessions: Sessions, turn: int, before: Tensor, after: Tensor, first: Tensor) -> EditScores:
        instructions = sessions.prompts(turn)
        if self.against == "previous" or turn == 1:
            scores = self.judge(before, after, instructions)
        else:
            so_far = [list(row) for row in zip(*(sessions.prompts(t) for t in range(1, turn + 1)), strict=True)]
            following = self.judge.following(before, after, instructions)
            scores = EditScores.of(following, self.judge.consistency(first, after, so_far))
        trouble = None if self.trusted else disagreement(scores, self.judge.replies)
        if trouble:
            raise InputError(trouble)
        self.trusted = True
        return scores


class FunctionJudge:
    """A user's judge(before, after, instructions) -> (following, consistency), asked as `EditJudge` is.

    For the consistency with the first image it is called once more, with that image as `before` and the instructions
    joined by '; then: '. Calls raise RewardError where it raises or returns anything else.
    """

    replies = 1

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.what = function, f"judge '{name}'"
        check_signature(function, self.what, "before", "after", "instructions")

    def __call__(self, before: Tensor, after: Tensor, instructions: Sequence[str]) -> EditScores:
        return EditScores.of(*self._ask(before, after, instructions))

    def following(self, before: Tensor, after: Tensor, instructions: Sequence[str]) -> Tensor:
        return self._ask(before, after, instructions)[0]

    def consistency(self, first: Tensor, after: Tensor, instructions_so_far: Sequence[Sequence[str]]) -> Tensor:
        return self._ask(first, after, ["; then: ".join(instructions) for instructions in instructions_so_far])[1]

    @torch.no_grad()
    def _ask(self, before: Tensor, after: Tensor, instructions: Sequence[str]) -> list[Tensor]:
        """Following and consistency, (n,) float32 each."""
        check_images(after)
        about = images_of(instructions)
        output = call(self.function, self.what, about, before.clone(), after.clone(), list(instructions))
        try:
            following, consistency = output
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{self.what} returned a {type(output).__name__} that is no pair; return (following, consistency), "
                "with one number an edit each"
            ) from error
        parts = {"following": following, "consistency": consistency}
        return [as_numbers(part, f"{self.what} ({name})", instructions).cpu().float() for name, part in parts.items()]
