"""`fieldsmith demo`: each verb once on the zoo's small models, and the page that leads to what they made.

In: --out DIR. Out: a complete run directory for each verb, and DIR/index.html with a link to each page.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from fieldsmith.commands import arguments
from fieldsmith.config import config
from fieldsmith.run import check_out


@config
class DemoConfig:
    """Erase the triangle from zoo:shapes-flux, raise a reward on zoo:shapes-flux-small, make a student of
    zoo:digits-unet, steer zoo:columns-ddpm away from hallucination, train zoo:scenes-kontext on its own sessions: each
    verb once, some minutes on one core."""

    out: pathlib.Path = pathlib.Path("demo")
    """The folder to write."""


def demo(words: Sequence[str]) -> None:
    """All five chapters, then the index. Raises InputError where the folder cannot be written."""
    out = arguments.parse(DemoConfig(), list(words), "demo").out
    check_out(out, folder=True)
    from fieldsmith import api  # imports torch: once the words are known to be good
    from fieldsmith.report.page import Page

    gone = api.erase(targets="triangle", anchors="circle", preset="demo", out=out / "erase").metrics
    risen = api.align(
        "zoo:shapes-flux-small", reward="right", held_out_rewards="classifier-heldout", preset="rsm-branch-sd35",
        out=out / "align",
    ).metrics  # fmt: skip
    small = api.distill(preset="fieldsmith", steps=600, evaluate=300, out=out / "distill").metrics
    fewer = api.sharpen(preset="guide", out=out / "sharpen").metrics
    steadier = api.edit(epochs=15, evaluate=120, evaluate_steps=8, out=out / "edit").metrics

    was, now = (fewer[when]["hallucinated"]["value"] for when in ("before", "after"))
    triangle, right = gone["concepts"]["triangle"], risen["rewards"]["right"]
    before, after = triangle["target detected before"]["value"], triangle["target detected"]["value"]
    chapters = [
        (
            "erase: the triangle leaves, the rest stays",
            "erase/report.html",
            f"{100 * after:.0f}% of the images that ask for a triangle show one, before it was {100 * before:.0f}%.",
        ),
        (
            "align: a half-trained model learns from a judge that says yes or no",
            "align/report.html",
            f"What the caption asks is there in {100 * right['after']['value']:.0f}% of images, before it was "
            f"{100 * right['before']['value']:.0f}%; no image was labelled, no gradient came from the judge.",
        ),
        (
            "distill: a student six times smaller that can still be guided",
            "distill/report.html",
            _kept(small),
        ),
        (
            "sharpen: fewer images that break the rules of their data",
            "sharpen/report.html",
            f"{100 * now:.0f}% of {fewer['after']['images']} samples are hallucinated, before it was {100 * was:.0f}%; "
            "the model is as it was, its steps move away from a small, briefly trained network.",
        ),
        (
            "edit: an editor that learns from its own sessions",
            "edit/report.html",
            _sessions(steadier),
        ),
    ]
    page = Page("fieldsmith, tried out", "each verb once, on small models")
    page.chapters("Pages", chapters)
    page.write(out / "index.html")
    print(f"open {(out / 'index.html').resolve()}")


def _kept(metrics: dict[str, Any]) -> str:
    """What a student kept, in a sentence."""
    sizes, curve = metrics["parameters"], metrics["curves"]["student"]
    best = min(curve, key=lambda w: float(curve[w]["distance"]))
    return (
        f"{sizes['student']:,} parameters instead of {sizes['teacher']:,}: {100 * curve['1.0']['accuracy']:.0f}% of "
        f"its digits read as asked without guidance, {100 * curve[best]['accuracy']:.0f}% at w = {best}."
    )


def _sessions(metrics: dict[str, Any]) -> str:
    """What three turns give, in a sentence."""
    before, after = (metrics[when]["following"][-1] for when in ("before", "after"))
    return (
        f"{100 * after['value']:.0f}% of {after['n']} held-out sessions end with every turn done, before it was "
        f"{100 * before['value']:.0f}%; it was trained on what it made itself, turn after turn."
    )
