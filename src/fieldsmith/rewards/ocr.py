"""Written words read from images by rapidocr, whose models come with its package: a reward, and a judge of words.

In: images (n, 3, h, w) in [0, 1]. Out: what is written in each, and how much of asked-for words that is, in [0, 1].
Black box: no gradient flows. `pip install fieldsmith[judges]`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.rewards.reward import Reward, check_images

ANY = "text"  # any writing at all
QUOTED = re.compile(r"[\"“]([^\"”]+)[\"”]|(?<!\w)['‘]([^'’]+)['’](?!\w)")
SIDE = 256  # pixels to which the shorter side of smaller images is enlarged; rapidocr's own 736 takes 4 times as long

Line = tuple[str, float]  # what is written, and how sure the reader is, in [0, 1]


def reward() -> Reward:
    """How much of the words that a prompt has in quotes is written in its image: 'a sign that says "open"'.

    Raises InputError where the package is missing, and at a prompt without quotes when it is judged.
    """
    engine()

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = [quoted(prompt) for prompt in prompts]
        for prompt, words in zip(prompts, asked, strict=True):
            if words is None:
                raise InputError(f"reward 'ocr' reads the words in quotes, and prompt '{prompt[:80]}' has none")
        return torch.tensor([score(lines, str(words)) for lines, words in zip(read(images), asked, strict=True)])

    return Reward("ocr", False, judge)


def quoted(prompt: str) -> str | None:
    """The words that a prompt has in quotes; None where it has none."""
    found = [first or second for first, second in QUOTED.findall(prompt)]
    return " ".join(found) if found else None


def score(lines: Sequence[Line], words: str) -> float:
    """Of words, the share of their letters that stands in the best place of what was read; of ANY, how sure it is."""
    if words == ANY:
        return max((sure for _, sure in lines), default=0.0)
    wanted, written = _letters(words), _letters("".join(line for line, _ in lines))
    if not wanted or wanted in written:
        return float(bool(wanted))
    places = range(max(1, len(written) - len(wanted) + 1))
    match = difflib.SequenceMatcher(None, autojunk=False)
    match.set_seq2(wanted)
    best = 0.0
    for place in places:
        match.set_seq1(written[place : place + len(wanted)])
        best = max(best, match.ratio())
    return best


def read(images: Tensor) -> list[list[Line]]:
    """The lines that stand in each image, from top to bottom. Raises RunError at images that hold NaN."""
    check_images(images)
    return [_read(image) for image in images.detach().float().cpu()]


def _read(image: Tensor) -> list[Line]:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flip(2).contiguous().numpy()  # as OpenCV: BGR
    found = engine()(pixels)
    if found.txts is None:
        return []
    return [(line, float(sure)) for line, sure in zip(found.txts, found.scores, strict=True)]


@functools.cache
def engine() -> Any:
    """The reader, loaded once. Raises InputError where the package is missing or its models are damaged."""
    try:
        from rapidocr import RapidOCR  # an extra, and two seconds
    except ImportError as error:
        raise InputError("reading words needs the package rapidocr; pip install fieldsmith[judges]") from error
    try:
        return RapidOCR(params={"Global.log_level": "critical", "Det.limit_type": "min", "Det.limit_side_len": SIDE})
    except Exception as error:  # onnxruntime has errors of its own
        raise InputError(f"rapidocr's models cannot be loaded ({str(error)[:200]}); install rapidocr again") from error


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
