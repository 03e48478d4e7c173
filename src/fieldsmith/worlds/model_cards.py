"""A pipeline folder's card.json: what the model was trained on, and so which world can judge it.

In: a model's name. Out: its world, or None where nobody here can judge its images.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from fieldsmith.errors import InputError
from fieldsmith.worlds import asked

ZOO = pathlib.Path(__file__).parent.parent / "zoo"


def card_of(name: str) -> dict[str, Any]:
    """The card of a folder or a zoo model, {} where there is none."""
    folder = ZOO / name.removeprefix("zoo:") if name.startswith("zoo:") else pathlib.Path(name)
    file = folder / "card.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def data_of(name: str, known: str) -> str:
    """What the card says that the model was trained on. Raises InputError where it does not; `known` names choices."""
    card = card_of(name)
    source = card.get("data") or card.get("world")
    if not source:
        raise InputError(f"'{name}' does not say what it was trained on; add --data {known} or a folder")
    return str(source)


def world_of(name: str) -> asked.Asked | None:
    """The world that the card names, where its pictures are asked for with prompts."""
    card = card_of(name)
    return asked.load(card.get("world", ""), card.get("size", 0))
