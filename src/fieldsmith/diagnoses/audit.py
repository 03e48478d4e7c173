"""Diagnosis 'audit': which choice would hurt on this model and reward: estimator, strength per step, trust region.

In: a model, a reward, prompts, closed forms where they are known. Out: each estimator against a reference, each
recipe of `align` with what it would lose, one advice. What is measured is in methods/align/audit.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from fieldsmith.diagnoses import Diagnosis
from fieldsmith.diagnoses.config import AuditConfig
from fieldsmith.errors import InputError
from fieldsmith.measure.progress import progress
from fieldsmith.methods.align.advice import BUDGET, Outlook, breaks, outlooks, outside, recommend
from fieldsmith.methods.align.audit import Moment, Truths, measure
from fieldsmith.methods.align.config import RECIPES, AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.probes import Kind
from fieldsmith.models.core import Model
from fieldsmith.report.page import Page, Panel
from fieldsmith.training import step_generator

HOW = (
    "What is estimated is the gradient of the expected reward of what the reference makes from a state, in units of "
    "score: the limit of alpha grad V, V being the soft value, for a reward that varies little beside alpha. On a "
    "chain of steps it carries omega = sigma^2 / Omega, as policy gradients do; gradients at the current state leave "
    "omega out and come out 1 / omega larger, which a smaller strength fixes. Errors are relative to its own size.",
    "The reference is a large estimate in two independent halves, so that its own noise drops out of every product: "
    "biases are what would be left after infinitely many draws, +- one standard error over states. '<' stands before a "
    "bias that these draws cannot tell from 0, with the smallest one that they could have shown.",
    "'kept' supposes that the output moves as a recipe pushes it, and asks which share of the best first-order reward "
    "gain per root of KL is left: with the best strength at every step, with the recipe's own strengths, and with the "
    f"noise of estimates that cost {BUDGET:.0f} forward-equivalents at each state and time. Training shares what it "
    "learns between states, so noise hurts less than this; the order of recipes is what counts. Trust regions: the "
    "output moves in a direction that knows nothing of a row's own noise.",
)


def diagnosis(
    model: Model, config: AuditConfig, reward: Any, prompts: Sequence[str], exact: Truths | None = None
) -> Diagnosis:
    """`reward` as methods.align takes it; `exact` gives grad E r and alpha grad V where they are closed forms.

    Raises InputError where settings, model and prompts do not fit each other, or the reward is the same for everything.
    """
    sde = "ddim" if exact and config.sde == "auto" else config.sde
    plain = AlignConfig(
        model=model.name, reward=reward.name, prompts=tuple(prompts), seed=config.seed, steps=config.steps, sde=sde,
        chunk=config.chunk, noise_level=config.noise_level, guidance=config.guidance, strength="jacobian",
    )  # fmt: skip
    with model.count_nfe() as nfe:
        context = AlignContext.of(model, plain, reward)
        truths = exact if config.reference == "auto" else None
        ids = _steps(config, context)
        kind: Kind = "closed form" if truths else "zeroth order"
        if config.reference == "auto" and not truths and reward.differentiable:
            kind = "pathwise"
        pool = max(32, min(64, config.samples // 2))
        with progress("auditing", len(ids)) as advance:
            moments = measure(
                context, ids, config.states, config.samples, kind, pool, truths, tell=lambda step: advance()
            )
    where = "zoo:" if exact else model.name  # recipes as they are on small models
    presets = {}
    for name in RECIPES:
        clip = AlignConfig.preset_of(name, None, {"model": where}).clip
        presets[name] = AlignConfig.preset_of(name, "laptop", {}).replace(steps=config.steps, clip=clip)
    recipes = outlooks(presets, context.schedule, context.prior, moments)
    dim = model.noise(1, step_generator(config.seed, 0)).numel()
    words = recommend(recipes, context.schedule, moments, reward.differentiable, dim, config.temperature)
    numbers = {
        "nfe": nfe.total,
        "recommendation": words,
        "reference": kind,
        "numbers": dim,
        "grid": context.schedule.times.tolist(),
        "times": [of_moment(moment) for moment in moments],
        "recipes": {one.name: of_outlook(one, config.displacement, dim) for one in recipes},
    }
    return Diagnosis(numbers, words, _page(f"{reward.name} on {model.name}", config, numbers))


def _steps(config: AuditConfig, context: AlignContext) -> list[int]:
    """`times` of the steps that draw noise, evenly spread. Raises InputError where there are fewer."""
    noisy = context.schedule.noisy.nonzero().flatten().tolist()
    if config.times > len(noisy):
        raise InputError(f"times={config.times} is more than the {len(noisy)} steps that draw noise; lower it")
    return sorted({noisy[round(i * (len(noisy) - 1) / max(config.times - 1, 1))] for i in range(config.times)})


def of_moment(moment: Moment) -> dict[str, Any]:
    """What metrics.json holds of one time."""
    rows = {
        name: {**dataclasses.asdict(row), "bias": row.bias, "floor": row.floor, "turned": _finite(row.turned)}
        for name, row in moment.rows.items()
    }
    return {**{k: v for k, v in dataclasses.asdict(moment).items() if k != "rows"}, "estimators": rows}


def of_outlook(one: Outlook, displacement: float, dim: int) -> dict[str, Any]:
    """What metrics.json holds of one recipe; clip fractions and break points by step, per number of the output."""
    trust: dict[str, Any] = {}
    if one.config.trust != "none":
        moved = torch.full_like(one.s.w, displacement * dim**0.5)
        share = outside(moved, one.s, one.config.trust, one.config.clip) / 2
        at = breaks(one.s, one.config.trust, one.config.clip) / dim**0.5
        trust = {"kind": one.config.trust, "clip": one.config.clip, "held": share.tolist(),
                 "breaks": [_finite(d) for d in at.tolist()]}  # fmt: skip
    kept = {name: _finite(getattr(one, name)) for name in ("of_estimator", "of_strength", "of_noise")}
    return {"h": one.h.tolist(), "silenced": one.silenced, "estimator": one.estimator, **kept, "hurts": one.hurts,
            "trust": trust}  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# the page


def _page(title: str, config: AuditConfig, metrics: dict[str, Any]) -> Page:
    """The report, from the numbers alone."""
    times = metrics["times"]
    page = Page(
        f"Audit of {title}",
        f"{config.steps} steps, {config.states} states at each of {len(times)} times, seed {config.seed}; nothing was "
        "trained",
    )
    page.verdict(metrics["recommendation"], True, "Advice")
    worst = max(m["spread_sde"] for m in times)
    page.numbers([
        ("reference", metrics["reference"], _quality(metrics)),
        ("siblings differ by", f"{worst:.3g}", f"alpha = {config.temperature:g}: {_small(worst, config)}"),
    ])  # fmt: skip
    _estimators(page, times)
    spread = {
        "later steps: ODE": ([m["t"] for m in times], [m["spread"] for m in times]),
        "later steps: drawn": ([m["t"] for m in times], [m["spread_sde"] for m in times]),
    }
    page.curves("Where the reward is decided", spread, "t", "deviation among siblings",
                note="Siblings share a state and differ in the noise of one step.")  # fmt: skip
    _recipes(page, metrics)
    _trust(page, metrics, config.displacement)
    page.text("How to read it", HOW)
    return page


def _quality(metrics: dict[str, Any]) -> str:
    if metrics["reference"] == "closed form":
        gaps = [m["soft"] for m in metrics["times"] if m["soft"] is not None]
        return f"no noise; alpha grad V itself is up to {max(gaps, default=0):.0%} away at this alpha"
    lost = [f"{m['t']:.2f}" for m in metrics["times"] if not m["certain"]]
    if lost:
        return f"too noisy at t = {', '.join(lost)}: raise samples or states"
    return f"noise {max(m['noise'] / m['truth2'] for m in metrics['times']):.0%} of the signal's power at worst"


def _small(spread: float, config: AuditConfig) -> str:
    return "small beside it" if spread < config.temperature / 2 else "not small beside it, so V bends"


def _estimators(page: Page, times: list[dict[str, Any]]) -> None:
    known = [m for m in times if m["estimators"]]
    names = list(times[0]["variances"])
    panels = []
    for title, names_, part in (
        ("First order: direction error", [n for n in names if "siblings" not in n and n != "terminal x J"],
         lambda r: r["turned"]),
        ("First order: how much of the truth", [n for n in names if "siblings" not in n and "linear" not in n],
         lambda r: r["along"]),
        ("Zeroth order: log10 of relative variance", [n for n in names if "siblings" in n and "mean" not in n],
         lambda r: math.log10(max(r["variance"], 1e-9))),
    ):  # fmt: skip
        series: dict[str, Any] = {}
        for name in names_ if known else ():
            at = [(m["t"], part(m["estimators"][name])) for m in known]
            at = [(t, value) for t, value in at if value is not None]
            if at:
                series[name] = ([t for t, _ in at], [value for _, value in at])
        panels.append(Panel(title, series, "t"))
    heading = "Estimators against the reference"
    if known:
        page.curves(heading, panels, note="Direction error is what no scalar can fix: the sine of the angle to the "
                    "truth. How much of the truth: 1 is the right size, along the right direction.")  # fmt: skip
    else:
        page.text(heading, "At no time does the reference stand out from its own noise, so no bias can be measured.")
    heads = [f"{m['t']:.2f}" for m in times]
    rows = [
        [name, *([known[0]["estimators"][name]["cost"]] if known else []),
         *(_bias(m["estimators"].get(name)) for m in times)]
        for name in names
    ]  # fmt: skip
    if known:
        page.table(
            "Bias",
            ["estimator; t =", f"cost at {known[0]['t']:.2f}", *heads],
            rows,
            "Relative to the truth, size and direction; cost of one estimate in forward-equivalents.",
        )
    page.table("Variance", ["estimator; t =", *heads], [
        ["the truth's square", *(_truth(m) for m in times)],
        ["the reference's noise", *(f"{m['noise']:.2g}" for m in times)],
        *([name, *(f"{m['variances'][name]:.2g}" for m in times)] for name in names),
    ], "Of one estimate, summed over its numbers; '<': no larger than two standard errors above what was found.",
        highlight=[0])  # fmt: skip
    if all("siblings" in name for name in names):
        page.text("", "First-order estimators were left out: they need a differentiable reward.")


def _truth(m: dict[str, Any]) -> str:
    most = max(m["truth2"], 0.0) + 2 * m["truth2_error"]
    return f"{m['truth2']:.2g}" if m["certain"] else f"< {most:.2g}"


def _bias(row: dict[str, Any] | None) -> str | None:
    if row is None:
        return None
    if row["bias2"] < 2 * row["error"]:
        return f"< {100 * max(row['floor'], row['bias']):.0f}%"
    return f"{100 * row['bias']:.0f}% ± {100 * row['error'] / (2 * row['bias']):.0f}"


def _recipes(page: Page, metrics: dict[str, Any]) -> None:
    recipes, grid = metrics["recipes"], metrics["grid"]

    def share(value: float | None) -> str | None:
        return None if value is None else f"{100 * value:.0f}%"

    rows = []
    for name, r in sorted(recipes.items(), key=lambda item: -(item[1]["of_noise"] or 0)):
        quiet = ", ".join(f"{grid[k]:.2f}" for k in r["silenced"]) or "none"
        rows.append([name, r["estimator"], share(r["of_estimator"]), share(r["of_strength"]), share(r["of_noise"]),
                     r["hurts"], quiet])  # fmt: skip
    heads = ["recipe", "estimator", "kept", "with its strengths", "with noise", "hurts most", "silences t ="]
    page.table("Recipes: what hurts", heads, rows)
    same: dict[tuple[float, ...], list[str]] = {}
    for name, r in recipes.items():
        most = max(r["h"]) or 1.0
        same.setdefault(tuple(round(h / most, 4) for h in r["h"]), []).append(name)
    curves = {_names(names): (grid[:-1], list(h)) for h, names in same.items()}
    drawn = [name for name, (_, h) in curves.items() if min(h) < max(h)]
    panels = [Panel("", {name: curves[name] for name in drawn[i : i + 5]}, "t", "h / its largest")
              for i in range(0, len(drawn), 5)]  # fmt: skip
    page.curves("Strength of each recipe, h(t)", panels, note="The push on the network's output per unit of guidance; "
                "recipes of one shape share a curve.")  # fmt: skip
    table = [[name, *(f"{h:.3g}" for h in r["h"])] for name, r in recipes.items()]
    page.table("h by step", ["recipe; t =", *(f"{t:.2f}" for t in grid[:-1])], table,
               "nft, awm: the shape that they have with adaptive weights off.")  # fmt: skip


def _names(names: list[str]) -> str:
    """Recipes that share something; all of them where they are two short names."""
    if len(", ".join(names)) <= 24:
        return ", ".join(names)
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _trust(page: Page, metrics: dict[str, Any], displacement: float) -> None:
    grid = metrics["grid"]
    regions: dict[tuple[Any, ...], tuple[dict[str, Any], list[str]]] = {}
    for name, r in metrics["recipes"].items():
        if r["trust"]:
            key = (r["trust"]["kind"], r["trust"]["clip"], *(round(h, 6) for h in r["trust"]["held"]))
            regions.setdefault(key, (r["trust"], []))[1].append(name)
    heads = ["recipes", "trust region; t =", *(f"{t:.2f}" for t in grid[:-1])]
    rows, series = [], {}
    for trust, names in regions.values():
        label = f"{trust['kind']}, {trust['clip']:g}"
        rows.append([_names(names), label, *(f"{100 * share:.0f}%" for share in trust["held"])])
        at = [(t, math.log10(d)) for t, d in zip(grid[:-1], trust["breaks"], strict=True) if d]
        series[_names(names)] = ([t for t, _ in at], [d for _, d in at])
    page.curves("Where the trust region breaks", series, "t", "log10 of the output's change",
                note="The root mean square change of the output, a number, at which half of a step's rows are beyond. "
                "A level line treats all steps alike; where it dips, that step is clipped first.")  # fmt: skip
    page.table(f"Rows held back once the output has moved by {displacement:g} a number", heads, rows,
               "At most half: a row is held on its advantage's side only.")  # fmt: skip
