"""`fieldsmith push`: what a finished run made goes to the hub, with a model card of its numbers and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fieldsmith.commands import arguments
from fieldsmith.commands.answers import Answer, answer
from fieldsmith.errors import InputError

USE = "e.g. fieldsmith push runs/no-triangle me/no-triangle"


@dataclass(frozen=True)
class PushConfig:
    """Upload a finished run's adapter or model, with a card, to the hub: fieldsmith push RUN OWNER/NAME"""

    private: bool = False
    """A repository that is made for it is private; one that is there stays as it is."""


def push(words: Sequence[str]) -> Answer:
    """fieldsmith push RUN REPO [--private]"""
    given = [word for word in words if not word.startswith("-")]
    notes = "RUN: the folder of a finished run. REPO: owner/name. The token is that of `hf auth login`, or HF_TOKEN."
    config = arguments.parse(PushConfig(), [word for word in words if word.startswith("-")], "push", notes)
    if len(given) != 2:
        raise InputError(f"push takes a run's folder and a repository, not {len(given)} words, {USE}")
    from fieldsmith.result import Result  # imports torch: once the words are good

    url = Result.open(given[0]).push_to_hub(given[1], config.private)
    print(f"{given[0]} as {url}")
    return answer(given[0], metrics={"url": url}, files=[])
