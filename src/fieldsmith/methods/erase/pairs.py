"""Targets and their anchors as prompts, encoded when they are asked for and kept within bounds.

In: a model and pairs of prompts, a few or, with templates and many concepts, thousands. Out: conditions of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fieldsmith.models.core import Condition, Model
from fieldsmith.models.prompts import Prompts


@dataclass(frozen=True)
class Pair:
    """A target prompt and its anchor's, encoded when they are asked for."""

    words: tuple[str, str]
    prompts: Prompts
    rows: tuple[int, int]  # of target and anchor in these

    @property
    def target(self) -> Condition:
        return self.prompts[[self.rows[0]]]

    @property
    def anchor(self) -> Condition:
        return self.prompts[[self.rows[1]]]

    @property
    def name(self) -> str:
        return " -> ".join(self.words)


def encoded(model: Model, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Pairs (target, anchor) of prompts, whose embeddings are kept within bounds: templates make many of them."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompt for pair in pairs for prompt in pair))}
    prompts = Prompts(model, list(rows))
    return [Pair((target, anchor), prompts, (rows[target], rows[anchor])) for target, anchor in pairs]
