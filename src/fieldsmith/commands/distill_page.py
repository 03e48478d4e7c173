"""What `fieldsmith distill` shows: what the student kept, beside its teacher at equal noise.

In: the config, the metrics, the sweep that drew the images. Out: a Page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fieldsmith.commands import arguments
from fieldsmith.measure.guidance import VERDICTS
from fieldsmith.measure.sweep import Sweep, best
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.models.core import Model
from fieldsmith.report.page import Caption, Page, Pair, Panel
from fieldsmith.run import Run

SHOWN = 5  # classes
EACH = 8  # images of a class


def page_of(config: DistillConfig, metrics: dict[str, Any], sweep: Sweep, student: Model, directory: Run) -> Page:
    """The report; the student draws once more at its best scale."""
    sizes, curves = metrics["parameters"], metrics["curves"]
    times = sizes["teacher"] / sizes["student"]
    page = Page(f"A student of {config.teacher}, {times:.1f} times smaller", f"{config.objective}, seed {config.seed}")
    kinds = metrics["guidance"]
    if kinds:
        worst = max(kinds, key=lambda kind: VERDICTS.index(kinds[kind]["verdict"]))
        verdict = kinds[worst]["verdict"]
        good = {"healthy": True, "distorted": None}.get(verdict, False)
        page.verdict(f"{kinds[worst]['words']} (Seen on {worst}.)", good, verdict.capitalize())
    scale = best(curves["student"])
    at_best = {name: curves[name][best(curves[name])] for name in curves}
    ratio = at_best["student"]["distance"] / at_best["teacher"]["distance"]
    page.numbers(
        [
            ("parameters", f"{sizes['student']:,}", f"of the teacher's {sizes['teacher']:,}"),
            ("distance to data", f"{ratio:.2f} x", "the teacher's, each at its best guidance scale"),
            ("classes right", f"{100 * at_best['student']['accuracy']:.0f}%", f"at w = {scale}, by a classifier"),
            ("cost", f"{metrics['forward_equivalents']:,.0f}", "forwards of the student, the teacher's included"),
        ]
    )
    _images(page, sweep, student, scale)
    _sweep(page, metrics)
    for kind, found in kinds.items():
        _branches(page, kind, found)
    _run(page, config, metrics, directory)
    page.command("Repeat it, load it", _commands(directory))
    return page


def _images(page: Page, sweep: Sweep, student: Model, scale: str) -> None:
    of_student, of_teacher = sweep.draw(student, float(scale)), sweep.of_teacher(float(scale))
    read, was = sweep.judge.read(of_student), sweep.judge.read(of_teacher)
    names, pairs = sweep.data.names, []
    for label in [i * len(names) // SHOWN for i in range(min(SHOWN, len(names)))]:
        rows = [i for i, one in enumerate(sweep.labels.tolist()) if one == label][:EACH]
        marks = [[Caption(names[int(seen[i])], int(seen[i]) == label) for i in rows] for seen in (was, read)]
        before, after = (images[rows] for images in (of_teacher, of_student))
        pairs.append(Pair(names[label], before, after, *marks))
    page.before_after(f"From equal noise, w = {scale}", pairs, sides=("teacher", "student"))


def _sweep(page: Page, metrics: dict[str, Any]) -> None:
    curves = metrics["curves"]
    rows = []
    for w in curves["student"]:
        two = [curves[name].get(w) for name in ("teacher", "student")]
        rows.append((w, *(f"{c['distance']:.3g}" for c in two), *(f"{100 * c['accuracy']:.1f}%" for c in two),
                     f"{two[1]['drift']:.4f}"))  # fmt: skip
    headers = ["w", "distance, teacher", "student", "classes right, teacher", "student", "drift at equal noise"]
    page.table(
        "Against the guidance scale",
        headers,
        rows,
        note=f"Frechet distance to all the data, biased upward for both by few images; {metrics['judge']}.",
    )
    panels = [
        Panel(title, {name: _points(curve, key) for name, curve in curves.items()}, "guidance scale w")
        for title, key in (("distance to data", "distance"), ("share of classes right", "accuracy"))
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


def _run(page: Page, config: DistillConfig, metrics: dict[str, Any], directory: Run) -> None:
    history = directory.history()
    panels = []
    for title, keys in (
        ("loss", ("loss",)),
        ("squared error of each branch", ("conditional error", "unconditional error")),
    ):
        series = {}
        for key in keys:
            rows = [row for row in history if key in row]
            if rows:
                series[key] = ([row["step"] for row in rows], [row[key] for row in rows])
        if series:
            panels.append(Panel(title, series, "step"))
    asked = f"{metrics['teacher forwards']:,} forwards of the teacher at {metrics['teacher cost']:.1f} of the student's"
    page.curves(
        "The run", panels,
        note=f"{metrics['steps']} steps, {metrics['seconds']:.0f} s; {metrics['student forwards']:,} forwards of the "
        f"student (a backward is 2), {asked}. The objective: {metrics['identifiability']}.",
    )  # fmt: skip


def _commands(directory: Run) -> list[str]:
    model = directory.folder / "model"
    return [
        *arguments.repeat_and_load("distill", None, directory, adapter=False),
        f"fieldsmith sample --model {model} --guidance 1.5 --out student.png --prompts ...",
        "",
        "# in Python, with diffusers alone",
        f'pipe = DiffusionPipeline.from_pretrained("{model}")',
    ]
