"""What `distill` reports: what the student kept of its teacher, at equal noise.

In: what both draw and say. Out: numbers for metrics.json, and the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fieldsmith.measure.guidance import VERDICTS
from fieldsmith.measure.guidance import measure as fidelity
from fieldsmith.measure.sweep import Sweep, best
from fieldsmith.methods.distill.measure import Measured, sweep_of
from fieldsmith.report.page import Caption, Page, Pair, Panel
from fieldsmith.report.run_curves import curves
from fieldsmith.verb import Outcome

SHOWN = 5  # classes
EACH = 8  # images of a class


def report(page: Page, outcome: Outcome) -> dict[str, Any]:
    """Fill the page; what goes into metrics.json."""
    config, teacher, student = outcome.config, outcome.before, outcome.after
    sweep = sweep_of(config, outcome.job)
    by_scale = {
        name: {w: sweep.scores(images, teacher.images[w]) for w, images in side.images.items()}
        for name, side in (("teacher", teacher), ("student", student))
    }
    kept = {
        kind: fidelity(student.branches[kind], teacher.branches[kind], times).to_json()
        for kind, times in teacher.times.items()
    }
    metrics: dict[str, Any] = {
        "judge": sweep.judge_name, "curves": by_scale, "before": by_scale["teacher"], "after": by_scale["student"],
        "guidance": kept,
    }  # fmt: skip
    sizes = outcome.metrics["parameters"]
    times = sizes["teacher"] / sizes["student"]
    page.title, page.subtitle = (
        f"A student of {config.teacher}, {times:.1f} times smaller",
        f"{config.objective}, seed {config.seed}",
    )
    _head(page, metrics, outcome.metrics)
    _images(page, sweep, teacher, student, best(by_scale["student"]))
    _sweep(page, metrics)
    for kind, found in kept.items():
        _branches(page, kind, found)
    errors = ("conditional error", "unconditional error")
    curves(page, outcome, {"loss": ("loss",), "squared error of each branch": errors})
    run = outcome.metrics
    page.text(
        "",
        f"{run['student forwards']:,} evaluations of the student, {run['teacher forwards']:,} of the teacher at "
        f"{run['teacher cost']:.1f} of the student's. The objective: {run['identifiability']}.",
    )
    if outcome.run:
        model = outcome.run.folder / "model"
        page.command(
            "Draw from it", f"fieldsmith sample --model {model} --guidance 1.5 --out student.png --prompts ..."
        )
    return metrics


def _head(page: Page, metrics: dict[str, Any], run: dict[str, Any]) -> None:
    """Verdict and big numbers."""
    kinds, by_scale, sizes = metrics["guidance"], metrics["curves"], run["parameters"]
    if kinds:
        worst = max(kinds, key=lambda kind: VERDICTS.index(kinds[kind]["verdict"]))
        verdict = kinds[worst]["verdict"]
        good = {"healthy": True, "distorted": None}.get(verdict, False)
        page.verdict(f"{kinds[worst]['words']} (Seen on {worst}.)", good, verdict.capitalize())
    scale = best(by_scale["student"])
    at_best = {name: by_scale[name][best(by_scale[name])] for name in by_scale}
    ratio = at_best["student"]["distance"] / at_best["teacher"]["distance"]
    cards = [
        ("parameters", f"{sizes['student']:,}", f"of the teacher's {sizes['teacher']:,}"),
        ("distance to data", f"{ratio:.2f} x", "the teacher's, each at its best guidance scale"),
    ]
    if "accuracy" in at_best["student"]:
        right = f"{100 * at_best['student']['accuracy']:.0f}%"
        cards.append(("classes right", right, f"at w = {scale}, by a classifier"))
    page.numbers([*cards, ("cost", f"{run['nfe']:,.0f}", "evaluations of the student, the teacher's included")])


def _images(page: Page, sweep: Sweep, teacher: Measured, student: Measured, scale: str) -> None:
    sides = teacher.images[scale], student.images[scale]
    read = [sweep.judge.read(images) for images in sides] if sweep.judge else []
    names, pairs = sweep.data.names, []
    drawn = sweep.labels.unique().tolist()  # fewer than there are, where there are fewer images than classes
    shown = min(SHOWN, len(drawn))
    for label in [drawn[i * len(drawn) // shown] for i in range(shown)]:
        rows = [i for i, one in enumerate(sweep.labels.tolist()) if one == label][:EACH]
        marks = [[Caption(names[int(seen[i])], int(seen[i]) == label) for i in rows] for seen in read]
        pairs.append(Pair(names[label], sides[0][rows], sides[1][rows], *marks))
    page.before_after(f"From equal noise, w = {scale}", pairs, sides=("teacher", "student"))


def _sweep(page: Page, metrics: dict[str, Any]) -> None:
    curves = metrics["curves"]
    judged = "accuracy" in next(iter(curves["student"].values()))
    rows = []
    for w in curves["student"]:
        two = [curves[name].get(w) for name in ("teacher", "student")]
        right = [f"{100 * c['accuracy']:.1f}%" for c in two] if judged else []
        rows.append((w, *(f"{c['distance']:.3g}" for c in two), *right, f"{two[1]['drift']:.4f}"))
    right = ["classes right, teacher", "student"] if judged else []
    page.table(
        "Against the guidance scale",
        ["w", "distance, teacher", "student", *right, "drift at equal noise"],
        rows,
        note=f"Frechet distance to the data, biased upward for both by few images; {metrics['judge']}.",
    )
    panels = [
        Panel(title, {name: _points(curve, key) for name, curve in curves.items()}, "guidance scale w")
        for title, key in (("distance to data", "distance"), ("share of classes right", "accuracy"))
        if key == "distance" or judged
    ]
    panels.append(Panel("drift from the teacher", {"student": _points(curves["student"], "drift")}, "guidance scale w"))
    page.curves("Curves against the guidance scale", panels)


def _points(curve: dict[str, dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [float(w) for w in curve], [one[key] for one in curve.values()]


def _branches(page: Page, kind: str, found: dict[str, Any]) -> None:
    bins = [b for b in found["bins"] if b["rho"] is not None]
    at = [(b["t_low"] + b["t_high"]) / 2 for b in bins]

    def by(names: Sequence[tuple[str, str]]) -> dict[str, tuple[list[float], list[float]]]:
        return {label: (at, [b[name] or 0.0 for b in bins]) for label, name in names}

    panels = [
        Panel("size and direction of the gap", by((("rho", "rho"), ("cosine", "weighted_cosine"))), "t"),
        Panel("error of each branch", by((("E_c", "e_c"), ("E_u", "e_u"))), "t"),
        Panel("free recalibration a*(t)", by((("a*", "recalibration"),)), "t"),
    ]
    pooled = found["pooled"]
    note = (
        f"Pooled: rho {pooled['rho']:.2f}, cosine weighted by energy {pooled['weighted_cosine']:.2f}, E_c "
        f"{pooled['e_c']:.4g}, E_u {pooled['e_u']:.4g}, gap error {pooled['gap_mse']:.4g}. Verdict: {found['verdict']}."
    )
    page.curves(f"Branches on {kind}", panels, note=note)
