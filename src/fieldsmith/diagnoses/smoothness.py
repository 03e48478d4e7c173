"""Diagnosis 'smoothness': how sharp a DDPM's score is along its paths, and whether that finds bad samples.

In: a model on a DDPM's schedule, and a world that samples data and judges images where one is known. Out: a profile of
the Jacobian by time, detectors' AUROC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import SmoothnessConfig
from fieldsmith.errors import InputError
from fieldsmith.measure.hallucination import auroc, tpr_at
from fieldsmith.measure.intervals import share
from fieldsmith.measure.progress import track
from fieldsmith.measure.smoothness import Profile, SharpestJacobian, TrajectoryVariance, profile, window
from fieldsmith.methods.sharpen.sampling import field_of
from fieldsmith.models.core import Model
from fieldsmith.paths import Prediction, VariancePreserving
from fieldsmith.report.page import Page, Panel
from fieldsmith.samplers import ancestral
from fieldsmith.worlds.judged import JudgedWorld

RARE = 0.05  # share of hallucinated samples up to which a model keeps to its data
LOOKS = 10  # times at which the profile looks
WINDOWS = ((0.0, 0.5), (0.5, 1.0))  # halves of the way from noise to data, where detectors watch
HOW = (
    "Jn = -sigma d eps/dx is the score's Jacobian without units. Cov[x_0 | x_t] = sigma^2 / alpha^2 (I + Jn): an "
    "exact score has no eigenvalue below -1, where x_0 is known, and large ones where two explanations compete; a "
    "network too smooth to have them there drifts between the two, and its samples lie where the data has none.",
    "The consistency gap compares, on noised data, the error of eps with the error that Jn implies; 0 is exact. It is "
    "a mean over data, nearly blind to rare ridges.",
    "A detector watches paths: the variance of predicted x_0, or the largest I + Jn. AUROC is the chance that it puts "
    "a hallucinated sample above a valid one: 0.5 knows nothing.",
)


def diagnosis(model: Model, config: SmoothnessConfig, world: JudgedWorld | None = None) -> Diagnosis:
    """Raises InputError where the model is on another path, is conditional alone, or has not as many steps."""
    if not isinstance(model.path, VariancePreserving):
        raise InputError(f"{model.name} is on rectified flow; smoothness reads DDPM schedules")
    model.encode([""])  # a model without an unconditional branch is refused in its own words
    try:
        grid = model.grid(config.steps)
    except ValueError as error:
        raise InputError(f"steps={config.steps}: {error}") from error
    generator = torch.Generator().manual_seed(config.seed)
    states = None if world is None else model.encode_images(world.sample(config.samples, 7 + config.seed))
    with model.count_nfe() as nfe:
        sharpness = profile(
            field_of(model), model.noise(config.samples, generator), grid, generator, clip=model.clip, iterations=6,
            every=max(1, config.steps // LOOKS), data=states,
        )  # fmt: skip
        detectors = {} if world is None else _detectors(model, world, config, grid)
    numbers = {"nfe": nfe.total, "profile": sharpness.to_json(), **detectors}
    words = _words(sharpness, detectors)
    page = Page(f"Sharpness of {model.name}", f"{config.samples} paths of {config.steps} steps, seed {config.seed}")
    page.verdict(words, *verdict_of(detectors.get("hallucinated")))
    _sections(page, sharpness, detectors)
    page.text("How to read it", HOW)
    return Diagnosis(numbers, words, page)


def _detectors(model: Model, world: JudgedWorld, config: SmoothnessConfig, grid: Tensor) -> dict[str, Any]:
    """How well what a path does tells whether its end is valid, on 4 x `samples` paths."""
    steps, generator = len(grid) - 1, torch.Generator().manual_seed(1_000 + config.seed)
    field, flags = field_of(model), []
    scores: dict[str, list[Tensor]] = {}
    for part in track(torch.arange(4 * config.samples).split(config.chunk), "watching paths"):
        watches: dict[str, Any] = {}
        for first, last in WINDOWS:
            steps_in = window(steps, first, last)
            words = f"steps {steps_in[0] + 1} to {steps_in[-1] + 1} of {steps}"
            watches[f"trajectory variance, {words}"] = TrajectoryVariance(steps, first, last)
            watches[f"sharpest Jacobian, {words}"] = SharpestJacobian(
                field, steps, first, last, generator, norm="frobenius"
            )

        def all_of_them(pred: Prediction, t_next: Tensor, watches: dict[str, Any] = watches) -> None:
            for watch in watches.values():
                watch(pred, t_next)

        noise = model.noise(len(part), generator)
        with torch.no_grad():
            states = ancestral(field, noise, grid, generator, "small", model.clip, all_of_them)
        flags.append(~world.judge(model.decode(states)).valid)
        for name, watch in watches.items():
            scores.setdefault(name, []).append(watch.scores)
    bad = torch.cat(flags)
    results: dict[str, Any] = {"hallucinated": share(bad).to_json(), "world": world.name}
    if bool(bad.any()) and not bool(bad.all()):
        results["detectors"] = {
            name: {"auroc": auroc(torch.cat(parts), bad), "tpr at 5%": tpr_at(torch.cat(parts), bad)}
            for name, parts in scores.items()
        }
    return results


def verdict_of(hallucinated: Mapping[str, Any] | None) -> tuple[bool | None, str]:
    """Whether samples keep to the data's rules (None: it cannot be told), and that in a word or three."""
    if hallucinated is None:
        return None, "Measured"
    if hallucinated["n"] > 1 and hallucinated["low"] > RARE:
        return False, "Hallucinates"
    return (
        (True, "Keeps to its data") if hallucinated["n"] > 1 and hallucinated["high"] <= RARE else (None, "Not shown")
    )


def _words(sharpness: Profile, detectors: dict[str, Any]) -> str:
    """One sentence."""
    sharpest = max(sharpness.moments, key=lambda m: m.norms[-1])
    words = f"The sharpest place of a path has |Jn| = {sharpest.norms[-1]:.3g}, at t = {sharpest.t:.2f}"
    if "detectors" not in detectors:
        return words + "."
    name, best = max(detectors["detectors"].items(), key=lambda item: item[1]["auroc"])
    rate = 100 * detectors["hallucinated"]["value"]
    return f"{words}; {rate:.0f}% of the samples are hallucinated, best told by {name} (AUROC {best['auroc']:.2f})."


def _sections(page: Page, sharpness: Profile, detectors: dict[str, Any]) -> None:
    moments = sharpness.moments
    at = [m.t for m in moments]
    names = ("median", "90%", "99%", "largest")
    series = {name: (at, [m.norms[i] for m in moments]) for i, name in enumerate(names)}
    panels = [
        Panel("|Jn| along paths", series, "t"),
        Panel("share with an eigenvalue below -1", {"paths": (at, [m.unphysical for m in moments])}, "t"),
    ]
    if moments[0].gap is not None:
        sides: Any = {side: (at, [getattr(m, side) for m in moments]) for side in ("implied", "error")}
        panels.append(Panel("consistency, on noised data", sides, "t"))
    page.curves("Along the way from noise (1) to data (0)", panels)
    if "detectors" in detectors:
        rows = [
            (name, f"{one['auroc']:.3f}", f"{100 * one['tpr at 5%']:.0f}%")
            for name, one in detectors["detectors"].items()
        ]
        headers = ("what watches the path", "AUROC", "found at 5% false alarms")
        note = f"On {detectors['hallucinated']['n']} samples."
        page.table("Does it find hallucinated samples?", headers, rows, note=note)
