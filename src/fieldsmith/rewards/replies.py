"""What goes to a chat server that sees images, and how to read what comes back; no network here.

In: pixels; an OpenAI-style chat completion. Out: a PNG data URI; a `Reply`, numbers in [0, 1] and expected scores.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

NUMBER = re.compile(r"(?<![\w.])([+-]?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0+)?)?(?![\w])")
YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Token:
    """One token of a reply: its log-probability, and those of the likeliest at its place (itself among them)."""

    text: str
    logprob: float
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """A server's n texts on one question; `tokens` has a tuple a text, empty where log-probabilities were not asked."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[Token, ...], ...]


def data_uri(image: Tensor) -> str:
    """An image (3, h, w) in [0, 1] as a PNG in a data URI."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_reply(answer: Mapping[str, Any]) -> Reply:
    """A chat completion's choices. Raises KeyError, IndexError, TypeError or AttributeError at anything else."""
    choices = [answer["choices"][0], *answer["choices"][1:]]  # no choices at all is no reply
    texts = [str(choice["message"]["content"] or "") for choice in choices]
    tokens = [
        tuple(
            Token(part["token"], part["logprob"], {x["token"]: x["logprob"] for x in part.get("top_logprobs") or []})
            for part in (choice.get("logprobs") or {}).get("content") or []
        )
        for choice in choices
    ]
    return Reply(tuple(texts), tuple(tokens))


def read_number(text: str, highest: float = 10.0) -> float | None:
    """The last number of the text over `highest`, in [0, 1]; None without one or out of range. '8/10' is 8."""
    values = NUMBER.findall(text)
    value = float(values[-1]) / highest if values else -1.0
    return value if 0 <= value <= 1 else None


def read_yes_no(text: str) -> float | None:
    """1 or 0 by the last 'yes' or 'no' of the text; None without one."""
    answers = YES_OR_NO.findall(text)
    return float(answers[-1].lower() == "yes") if answers else None


def expected_score(token: Token, scores: Mapping[str, float]) -> float | None:
    """sum p(word) score(word) / sum p(word) over the score words among the likeliest at a token; None without any."""
    likely = [
        (math.exp(logprob), scores[word.strip()])
        for word, logprob in token.alternatives.items()
        if word.strip() in scores
    ]
    mass = sum(p for p, _ in likely)
    return sum(p * score for p, score in likely) / mass if mass > 0 else None
