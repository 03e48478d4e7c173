"""What `sharpen` reports: how many samples are hallucinated before and after, why, and what else changed.

In: samples with their verdicts on both sides. Out: numbers for metrics.json, and the page.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fieldsmith.measure.distances import Features, extractor_name, frechet_distance, pixel_features, precision_recall
from fieldsmith.measure.hallucination import coverage
from fieldsmith.measure.intervals import share
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.measure import Samples
from fieldsmith.paths import RectifiedFlow
from fieldsmith.report.page import Caption, Page, Pair
from fieldsmith.report.run_curves import curves
from fieldsmith.verb import Outcome

SHOWN = 16
CURVES = ("loss", "eps error", "velocity error", "L_vb", "term", "gradient share")
WHAT = {
    "guide": "the model itself is as it was; each step moves away from what a small, briefly trained network says",
    "plain": "more training of the same kind, the control",
    "variance-learning": "the reverse variance is learned beside the score",
    "variance-penalty": "VSM: the reverse variance is learned and made small; only shared layers touch the score",
    "jacobian-floor": "the score's normalised Jacobian is raised, which is not the data's own score",
    "jacobian-match": "second-order denoising score matching: the Jacobian is matched to the errors' covariance",
    "covariance": "the reverse variance is matched to the score's own curvature",
    "neighbours": "targets are posterior means over a batch of data",
}


def report(page: Page, outcome: Outcome) -> dict[str, Any]:
    """Fill the page; what goes into metrics.json."""
    config, world, before, after = outcome.config, outcome.job.inputs.world, outcome.before, outcome.after
    features = outcome.job.inputs.features or pixel_features(8)
    told = hallucination_of if before.verdicts else sharpness_of
    metrics = {
        "world": world.name, "before": told(world, before), "after": told(world, after),
        "rest": side_effects(before.images, after.images, world, config, features),
    }  # fmt: skip
    page.title, page.subtitle = f"{config.model}: {config.method}", f"{WHAT[config.method]}; seed {config.seed}"
    (_head if before.verdicts else _unjudged)(page, metrics, outcome.metrics)
    page.before_after(
        "From equal noise",
        [Pair(world.name, before.images[:SHOWN], after.images[:SHOWN], _captions(before), _captions(after))],
    )
    if before.verdicts:
        _reasons(page, metrics)
    _rest(page, metrics)
    curves(page, outcome, {name: (name,) for name in CURVES})
    if outcome.run:
        page.command("Draw from it", _command(config, outcome.run.folder, after.asked[0], flows(outcome.job.model)))
    return metrics


def sharpness_of(world: Any, samples: Samples) -> dict[str, Any]:
    """How many images there are, and the field's sharpness along paths, where nobody judges where they end."""
    assert samples.sharpness is not None
    return {"images": len(samples.images), "sharpness": samples.sharpness.to_json()}


def flows(model: Any) -> bool:
    """Whether it is on rectified flow, whose steps have no variance to choose."""
    return isinstance(model.path, RectifiedFlow)


def hallucination_of(world: Any, samples: Samples) -> dict[str, Any]:
    """Rate of hallucination, novelty and coverage, each with how many images it rests on."""
    verdicts = samples.verdicts
    valid = [c for c, good in zip(verdicts.contents, verdicts.valid.tolist(), strict=True) if good and c is not None]
    reasons = Counter(word for words in verdicts.reasons for word in set(words))
    metrics: dict[str, Any] = {
        "hallucinated": dataclasses.asdict(share(~verdicts.valid)), "unreadable": int((~verdicts.readable).sum()),
        "images": len(samples.images), "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])[:8]),
    }  # fmt: skip
    if valid:
        metrics |= {"different": len(set(valid)), "valid": len(valid)}
        metrics["novel"] = sum(world.novel(content) for content in valid)
        if world.support:
            metrics["coverage"] = coverage(valid, world.support).relative
    return metrics


def side_effects(
    before: Tensor, after: Tensor, world: Any, config: SharpenConfig, features: Features
) -> dict[str, Any]:
    """What else changed: distances to held-out data, precision and recall, brightness, diversity."""
    real = features(world.sample(max(200, config.samples), 1_000_003 + config.seed))
    metrics: dict[str, Any] = {"extractor": extractor_name(features), "real": len(real)}
    for side, images in (("before", before), ("after", after)):
        made = features(images)
        reach = precision_recall(real, made)
        metrics[side] = {
            "distance": frechet_distance(real, made), "precision": reach.precision, "recall": reach.recall,
            "brightness": float(images.mean()), "contrast": float(images.flatten(1).std(1).mean()),
            "diversity": float(torch.pdist(made[:200]).mean()),
        }  # fmt: skip
    return metrics


def _head(page: Page, metrics: dict[str, Any], run: dict[str, Any]) -> None:
    """Verdict, big numbers, and what to mind."""
    was, now = metrics["before"]["hallucinated"], metrics["after"]["hallucinated"]
    apart = now["high"] < was["low"] or now["low"] > was["high"]
    fewer = now["value"] < was["value"]
    word = ("Fewer" if fewer else "More") if apart else "No clear change"
    page.verdict(
        f"{100 * now['value']:.1f}% [{100 * now['low']:.1f}, {100 * now['high']:.1f}] of {now['n']} samples are "
        f"hallucinated, before it was {100 * was['value']:.1f}% [{100 * was['low']:.1f}, {100 * was['high']:.1f}].",
        fewer if apart else None,
        word,
    )
    cards = [("hallucinated", f"{100 * now['value']:.1f}%", f"of {now['n']} images; before {100 * was['value']:.1f}%")]
    if now["value"] and was["value"]:
        change = 100 * (now["value"] / was["value"] - 1)
        cards.append(("change", f"{change:+.0f}%", "of the rate, at equal noise"))
    if "different" in metrics["after"]:
        one = metrics["after"]
        cards.append(("different", f"{one['different']}", f"contents in {one['valid']} valid images"))
    cards.append(("cost", f"{run['nfe']:,}", "evaluations of the trained network"))
    page.numbers(cards)
    for warning in run["warnings"]:
        page.text("", warning)


def _unjudged(page: Page, metrics: dict[str, Any], run: dict[str, Any]) -> None:
    """No verdict: how sharp the field is, by time."""
    sides = [metrics[side]["sharpness"]["moments"] for side in ("before", "after")]
    sharpest = [max(moment["norms"][-1] for moment in moments) for moments in sides]
    page.verdict(
        f"No judge knows these images: look at the pairs, drawn from equal noise, or name one with --judge. The "
        f"sharpest place of a path has |Jn| = {sharpest[1]:.3g}, before it was {sharpest[0]:.3g}.",
        None,
        "Look",
    )
    page.numbers([("cost", f"{run['nfe']:,}", "evaluations of the trained network")])
    for warning in run["warnings"]:
        page.text("", warning)
    rows = [
        (f"{old['t']:.2f}", *(f"{moment['norms'][k]:.3g}" for k in (0, -1) for moment in (old, new)))
        for old, new in zip(*sides, strict=True)
    ]
    note = (
        f"|Jn| along {metrics['after']['sharpness']['n']} paths, from noise (1) to data (0): large where two "
        "explanations compete. A field that is too smooth there drifts between modes."
    )
    headers = ("t", "median before", "median after", "largest before", "largest after")
    page.table("How sharp the field is", headers, rows, note=note)


def _captions(samples: Samples) -> list[Caption]:
    if samples.verdicts is None:
        return [Caption(prompt) for prompt in samples.asked[:SHOWN]]
    valid, reasons = samples.verdicts.valid.tolist()[:SHOWN], samples.verdicts.reasons[:SHOWN]
    return [
        Caption("valid" if good else words[0] if words else "invalid", bool(good))
        for good, words in zip(valid, reasons, strict=True)
    ]


def _reasons(page: Page, metrics: dict[str, Any]) -> None:
    before, after = metrics["before"], metrics["after"]
    names = sorted({*before["reasons"], *after["reasons"]}, key=lambda name: -before["reasons"].get(name, 0))
    rows = [(name, before["reasons"].get(name, 0), after["reasons"].get(name, 0)) for name in names]
    if rows:
        note = f"Of {after['images']} images each, the commonest reasons; an image may have several."
        page.table("Why the judge refused", ("reason", "before", "after"), rows, note=note)


def _rest(page: Page, metrics: dict[str, Any]) -> None:
    rest = metrics["rest"]
    keys = list(rest["before"])
    rows = [(key, f"{rest['before'][key]:.4g}", f"{rest['after'][key]:.4g}") for key in keys]
    note = f"Distances on {rest['extractor']} to {rest['real']} held-out images; biased upward for both by few images."
    page.table("What else changed", ("measure", "before", "after"), rows, note=note)


def _command(config: SharpenConfig, folder: pathlib.Path, prompt: str, euler: bool) -> str:
    asked = f"--prompts {shlex.quote(prompt)} --out sample.png"
    if config.method != "guide":
        return f"fieldsmith sample --model {folder / 'model'} {'' if euler else '--variance small '}{asked}"
    return f"fieldsmith sample --model {config.model} --worse {folder / 'guide'} --guidance {config.guidance:g} {asked}"
