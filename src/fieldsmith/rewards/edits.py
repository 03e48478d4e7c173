"""A judge of single edits: a vision-language model that is shown the images before and after (MT-EditFlow, axis 2).

Two questions an edit: was the instruction followed, and did all else stay as it was. Four ways to ask them, which trade
bias for variance and cost: a bare number, reasoning before it, the expectation of the number over its token's
log-probabilities, and a checklist. In: images (n, 3, h, w) in [0, 1] and instructions. Out: `EditScores` in [0, 1].
`metrics.judges` measures such a judge where the truth is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fieldsmith.errors import InputError, RewardError, check_word
from fieldsmith.rewards.remote import Options, RemoteJudge, read_address
from fieldsmith.rewards.replies import Token, expected_score, read_number, read_yes_no

MODES = ("direct", "reasoning", "expected", "checklist")
FOLLOWING = "Was the instruction carried out from the first image to the second?"
CONSISTENCY = "Apart from what the instruction asks for, is everything in the second image as it was in the first?"
RATE = {
    "direct": "Rate this from 0 (not at all) to 10 (fully); reply with the number alone.",
    "reasoning": "Describe what differs and reason step by step; then rate this from 0 (not at all) to 10 (fully) on a "
    "last line of its own: 'Score: NUMBER'.",
    # one digit, because most tokenizers split 10 in two
    "expected": "Rate this from 0 (not at all) to 9 (fully); reply with the number alone.",
}
DIGITS = {str(digit): digit / 9 for digit in range(10)}
WRITE = (
    'An image is edited with the instruction: "{prompt}". Write exactly 4 short questions that someone who sees the '
    "image before and after would answer with yes if the edit was done right, and with no if that part of it was not. "
    "One line each, numbered, each ending in '?'; ask of the instruction alone, not of what must stay."
)
CHECKS_WRITTEN = 4
KEPT = (
    "Apart from what the instruction asks for, does the second image have the same objects, no more and no fewer?",
    "Apart from what the instruction asks for, does each object have the same colour, material and shape?",
    "Apart from what the instruction asks for, is each object at the same place and of the same size?",
    "Apart from what the instruction asks for, are the background, the light and the style the same?",
)
FINAL = re.compile(
    r"[^\w]*(?:the )?(?:final )?score(?: is)?[^\w-]*(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?\W*", re.IGNORECASE
)
DIGIT = re.compile(r"\W*\d(?:\s*(?:/|out of)\s*9)?\W*")
CHECK_LINE = re.compile(r"^\W*\d+[.):]\W*(.+\?)\W*$", re.MULTILINE)
NEXT_ANSWER = re.compile(r"\n|[,;]?\s+(?=\d+[.):]\s)")  # between the answers to two checks
ANSWER = re.compile(r"\W*(?:\d+[.):])?\W*(yes|no)\b", re.IGNORECASE)  # first in its line: 'Yes, no dog is left'
THOUGHT = re.compile(r"^.*</think>", re.DOTALL)


@dataclass(frozen=True)
class EditOptions(Options):
    """What may follow the address: a remote judge's options but `answer` and `question`, which the mode decides."""

    tokens: int = 1024  # longest reply; reasoning that is cut short has no score
    mode: Literal["direct", "reasoning", "expected", "checklist"] = "direct"
    n: int = 1  # replies to each question, averaged; in mode expected they hardly differ, so 1 is enough
    checks: str = ""  # of instruction following, 'CHECK?|CHECK?', '{prompt}' is the instruction; empty: the server's


@dataclass(frozen=True)
class EditScores:
    """Scores of n edits in [0, 1], each the mean of a judge's replies, with their standard deviation; all (n,) float32.

    The deviations are those of single replies (divisor replies - 1), and 0 where there is one reply.
    """

    following: Tensor
    consistency: Tensor
    spread_following: Tensor
    spread_consistency: Tensor

    @classmethod
    def of(cls, following: Tensor, consistency: Tensor) -> EditScores:
        """From the scores of single replies to each question, (replies, n), or (n,) where there is one."""
        both = torch.atleast_2d(following).float(), torch.atleast_2d(consistency).float()
        spreads = (replies.std(0) if len(replies) > 1 else torch.zeros_like(replies[0]) for replies in both)
        return cls(*(replies.mean(0) for replies in both), *spreads)


class EditJudge:
    """One server, asked of edits. Raises InputError as `RemoteJudge` does, if the server is not there or is another.

    Calls raise InputError where images and instructions do not fit, RunError where images hold NaN, RewardError where
    the server fails or says other things after retries, gives fewer replies than asked for, or, in mode expected, no
    log-probabilities.
    """

    def __init__(self, base: str, options: EditOptions):
        self.options, self.replies = options, options.n
        self.server = RemoteJudge(base, options)
        self.name = f"edits:{self.server.model}:{options.mode}" + (f":n={options.n}" if options.n > 1 else "")

    def __call__(self, before: Tensor, after: Tensor, instructions: Sequence[str]) -> EditScores:
        """Both questions of n edits: images (n, 3, h, w) in [0, 1] before and after, one instruction each."""
        one_each = [[instruction] for instruction in instructions]
        return EditScores.of(self.following(before, after, instructions), self.consistency(before, after, one_each))

    def following(self, before: Tensor, after: Tensor, instructions: Sequence[str]) -> Tensor:
        """How far each instruction was carried out from before to after: scores of single replies (replies, n)."""
        checks: Sequence[Sequence[str]] = ()
        if self.options.mode == "checklist":
            checks = self._checks(instructions)
        return self._ask(before, after, instructions, FOLLOWING, checks)

    def consistency(self, first: Tensor, after: Tensor, instructions_so_far: Sequence[Sequence[str]]) -> Tensor:
        """How far all that no instruction asks for stayed as it was: scores of single replies (replies, n).

        `first` may be the image before the last edit, with that edit's instruction alone, or the session's first
        image, with all instructions since.
        """
        joined = ["; then: ".join(instructions) for instructions in instructions_so_far]
        return self._ask(first, after, joined, CONSISTENCY, [KEPT] * len(joined))

    def _checks(self, instructions: Sequence[str]) -> list[list[str]]:
        """Yes/no checks of each instruction; edits of one instruction share them, so that their scores compare."""
        if self.options.checks:
            fixed = self.options.checks.split("|")
            return [[check.replace("{prompt}", instruction) for check in fixed] for instruction in instructions]
        replies = self.server.ask(
            [], instructions, WRITE, readable=lambda text: len(_read_checks(text)) == CHECKS_WRITTEN
        )
        return [_read_checks(reply.texts[0]) for reply in replies]

    def _ask(
        self, first: Tensor, after: Tensor, instructions: Sequence[str], about: str, checks: Sequence[Sequence[str]]
    ) -> Tensor:
        """The question `about` each edit, in the judge's mode -> (replies, n)."""
        for images in (first, after):
            if images.ndim != 4 or images.shape[1] != 3:
                raise InputError(f"images of shape {tuple(images.shape)}; a judge of edits reads (n, 3, h, w)")
        mode, n = self.options.mode, self.options.n
        questions = [
            f'The first image is before an edit, the second after it. The instruction was: "{instruction}". '
            + (_checklist(checks[row]) if mode == "checklist" else f"{about} {RATE[mode]}")
            for row, instruction in enumerate(instructions)
        ]
        count = len(checks[0]) if mode == "checklist" and checks else 0
        read = _reader(mode, count)
        replies = self.server.ask(
            [first, after],
            questions,
            "{prompt}",
            n=n,
            logprobs=mode == "expected",
            readable=lambda text: read(text) is not None,
        )
        scores = torch.zeros(n, len(questions))
        for row, reply in enumerate(replies):
            if len(reply.texts) != n:
                raise RewardError(
                    f"{self.server.name} gave {len(reply.texts)} replies where n={n} were asked for; set n=1, or take "
                    "a server that gives several, such as vLLM"
                )
            for draw, text in enumerate(reply.texts):
                score = _expected(reply.tokens[draw]) if mode == "expected" else read(text)
                if score is None:
                    raise RewardError(
                        f"{self.server.name} gave no log-probabilities of its score '{text.strip()[:200]}'; set "
                        "mode=direct, or take a server that gives them, such as vLLM"
                    )
                scores[draw, row] = score
        return scores.to(after.device)


def edit_judge(address: str) -> EditJudge:
    """The judge of edits at 'http://HOST:PORT/v1?model=M&mode=reasoning&n=4&temperature=0.7'.

    Raises InputError at a bad address, option or server, and at several replies without a temperature.
    """
    base, options = read_address(address, EditOptions)
    check_word(options.mode, MODES, "a judge's modes")
    if (options.answer, options.question) != (Options.answer, Options.question):
        raise InputError(f"the judge of edits at {base} has its own questions; leave answer= and question= out")
    if options.checks and options.mode != "checklist":
        raise InputError(f"checks= of the judge at {base} means nothing in mode={options.mode}; add mode=checklist")
    if not all(check.strip() for check in options.checks.split("|")) and options.checks:
        raise InputError(f"checks={options.checks} of the judge at {base} has an empty check; write 'CHECK?|CHECK?'")
    if options.n < 1:
        raise InputError(f"n={options.n} of the judge at {base}: give at least 1")
    if options.n > 1 and options.temperature == 0:
        raise InputError(
            f"n={options.n} of the judge at {base} at temperature 0 would be one reply {options.n} times; add "
            "temperature=0.7"
        )
    return EditJudge(base, options)


def disagreement(scores: EditScores, n: int) -> str | None:
    """A sentence where a judge's n replies on one edit differ more than its scores of different edits; else None.

    For each question: noise, the root mean square of the spreads, against the deviation of the scores between edits
    (which still holds noise^2 / n). Judge the edits of one group together, since that is what an advantage compares.
    """
    sentences = []
    for question, means, spreads in (
        ("instruction following", scores.following, scores.spread_following),
        ("content consistency", scores.consistency, scores.spread_consistency),
    ):
        if n < 2 or len(means) < 2:
            continue
        noise, between = float(spreads.double().square().mean().sqrt()), float(means.double().std())
        if noise <= between:
            continue
        signal = between**2 - noise**2 / n  # variance of the scores without their noise
        enough = math.ceil(10 * noise**2 / signal) if signal > 0 else math.inf
        fix = (
            f"set n={enough} (now {n})"
            if enough <= 16
            else f"more replies than n={n} will not help: lower the temperature, set mode=expected or take another "
            "model"
        )
        sentences.append(
            f"the judge's {n} replies on one edit differ by {noise:.2f} in {question}, its scores of {len(means)} "
            f"edits by {between:.2f}, so it ranks them by chance; {fix}"
        )
    return "; ".join(sentences) or None


def _checklist(checks: Sequence[str]) -> str:
    lines = "\n".join(f"{number}. {check.strip()}" for number, check in enumerate(checks, 1))
    return f"Answer each of these questions with yes or no alone, one numbered line each:\n{lines}"


def _reader(mode: str, checks: int) -> Callable[[str], float | None]:
    """What reads a reply in this mode: a score in [0, 1], None where the reply does not say it."""

    def read_last_line(text: str) -> float | None:
        # not any number of the text: reasoning that was cut short is full of them
        score = FINAL.fullmatch(text.strip().rpartition("\n")[2])
        return read_number(score[1]) if score else None

    def read_digit(text: str) -> float | None:
        return 0.0 if DIGIT.fullmatch(THOUGHT.sub("", text)) else None  # the score itself is in the tokens

    def read_answers(text: str) -> float | None:
        lines = NEXT_ANSWER.split(THOUGHT.sub("", text))
        starts = [ANSWER.match(line) for line in lines]
        read = [read_yes_no(start[1] if start else line) for start, line in zip(starts, lines, strict=True)]
        answers = [answer for answer in read if answer is not None]
        return sum(answers) / checks if len(answers) == checks else None

    readers = {"direct": read_number, "reasoning": read_last_line, "expected": read_digit, "checklist": read_answers}
    return readers[mode]


def _read_checks(text: str) -> list[str]:
    return [str(check) for check in CHECK_LINE.findall(THOUGHT.sub("", text))]


def _expected(tokens: Sequence[Token]) -> float | None:
    """The expected score at the first digit after any thinking; None without log-probabilities of one."""
    begin = max((at + 1 for at, token in enumerate(tokens) if "</think>" in token.text), default=0)
    return next((expected_score(token, DIGITS) for token in tokens[begin:] if token.text.strip() in DIGITS), None)
