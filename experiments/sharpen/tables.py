"""The page's rows and figures: the mechanism, the line and the lattice, the image worlds, the judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.sharpen.claims import INDICES, Runs, claims, rate, reference_of
from experiments.sharpen.hallucination import hallucination
from experiments.study import Record, Records, StudyConfig, Tables, average, geometric
from fieldsmith.measure.intervals import Interval


def tables(config: StudyConfig, records: Records) -> Tables:
    runs = Runs(records)
    page = {
        "indices": " / ".join(map(str, INDICES)),
        "oracle": oracle(runs) if runs.oracle else None,
        "line": on_the_line(runs) if "line" in runs.worlds else None,
        "lattice": on_the_lattice(runs) if "lattice" in runs.worlds else None,
        "images": [of_images(runs, world) for world in runs.images],
        "judges": [judge_row(run) for run in runs.judges],
    }
    return Tables(claims(runs), {"best": runs.best(), "overall": runs.overall()}, page, figures(runs))


def oracle(runs: Runs) -> Record:
    return {
        "smoothed": [
            (f"{row['h']:g}", f"{row['beyond']:.3g}", " / ".join(f"{row['ridge'][str(i)]:.1f}" for i in INDICES))
            for row in runs.oracle["smoothed"]
        ],
        "variances": [
            (kind, f"{v['beyond 4']:.2g}", f"{v['beyond 6']:.2g}", f"{v['deviation']:.4f}")
            for kind, v in runs.oracle["variances"].items()
        ],
    }


def on_the_line(runs: Runs) -> Record:
    rows = []
    for arm in runs.of("line"):
        some = runs.arms["line", arm]
        ridge = " / ".join(f"{_mean(some, 'errors', str(i), 'ridge'):.1f}" for i in INDICES)
        errors = (f"{_mean(some, 'errors', '10', f'eps error {where}'):.3f}" for where in ("between", "at data"))
        deviation = torch.tensor([run["deviations"] for run in some]).mean()
        mass = f"{average(map(rate, some)):.2e}"
        rows.append([arm, mass, *_over(runs, "line", arm), ridge, *errors, f"{deviation:.4f}", _share(some)])
    return {"seeds": len(runs.arms["line", "plain"]), "rows": rows, "swaps": swaps(runs, "line", "{:.2e}", 1)}


def on_the_lattice(runs: Runs) -> Record:
    rows = []
    for arm in runs.of("lattice"):
        some = runs.arms["lattice", arm]
        missed = average(sum(mass < 0.01 for mass in run["masses"]) for run in some)
        error = f"{_mean(some, 'errors', '10', 'eps error between'):.3f}"
        beyond = f"{100 * average(map(rate, some)):.2f}%"
        rows.append([arm, beyond, *_over(runs, "lattice", arm), f"{missed:.1f}", error, _share(some)])
    plain = runs.arms["lattice", "plain"]
    return {"seeds": len(plain), "chains": plain[0]["chains"], "rows": rows}


def of_images(runs: Runs, world: str) -> Record:
    plain = runs.arms[world, "plain"]
    base = _mean(plain, "training seconds")
    rows = []
    for arm in runs.of(world):
        some = runs.arms[world, arm]
        rates = hallucination([_flags(run) for run in some], torch.Generator().manual_seed(0))
        spread = rates.clustered or rates.pooled
        less = "" if arm == "plain" else _points(runs.reduction(world, arm))
        rows.append([
            f"**{arm}**" if arm != "plain" and runs.equal(world, arm) else arm,
            f"{100 * rates.pooled.value:.1f}% [{100 * spread.low:.1f}, {100 * spread.high:.1f}]",
            less,
            *(f"{runs.mean(world, arm, key):.3g}" for key in ("distance", "precision", "recall", "fld")),
            *(f"{runs.mean(world, arm, key):.2f}" if key in some[0] else "" for key in ("different", "novel")),
            f"{runs.mean(world, arm, 'evaluations a step'):.2f}",
            "" if "of" in some[0]["settings"] else f"{_mean(some, 'training seconds') / base:.2f}",
            _share(some),
        ])  # fmt: skip
    reasons: Counter[str] = Counter()
    for run in plain:
        reasons.update(run["reasons"])
    return {
        "name": world,
        "seeds": len(plain),
        "images": plain[0]["images"],
        "study": plain[0]["told"]["study"],
        "detectable": hallucination([_flags(run) for run in plain], torch.Generator().manual_seed(0)).detectable,
        "best": runs.best().get(world),
        "rows": rows,
        "reasons": reasons.most_common(6),
        "detectors": [
            (arm, _mean(runs.arms[world, arm], "auroc"))
            for arm in runs.of(world) if all("auroc" in run for run in runs.arms[world, arm])
        ],
        "swaps": swaps(runs, world, "{:.1f}%", 100),
    }  # fmt: skip


def swaps(runs: Runs, world: str, form: str, scale: float) -> list[list[str]]:
    """Arms that learn a variance: their rate under DDPM's small and large ones, and under their own."""
    rows = []
    for arm in runs.of(world):
        some = runs.arms[world, arm]
        if all("swap" in run for run in some):
            rates = [*(_mean(some, "swap", kind) for kind in ("small", "large")), average(map(rate, some))]
            rows.append([arm, *(form.format(scale * each) for each in rates)])
    return rows


def judge_row(run: Record) -> list[object]:
    worst = min(run["detection"], key=run["detection"].get)
    return [
        f"{run['world']} {run['size']}", run["false alarms"], f"{run['clean']:,}", len(run["detection"]),
        f"{100 * run['detection'][worst]:.2f}%", worst, f"{run['corrupted']:,}",
    ]  # fmt: skip


def _over(runs: Runs, world: str, arm: str) -> tuple[str, str]:
    """An arm's rate over that of the arm it is compared with, and that arm."""
    against = reference_of(arm)
    if arm == against:
        return "", ""
    value = geometric(runs.ratios(world, arm, against))
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]", against


def _mean(runs: Sequence[Record], *keys: str) -> float:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(float(value))
    return average(values)


def _share(some: Sequence[Record]) -> str:
    shares = [run["share"] for run in some if run.get("share") is not None]
    return f"{average(shares):.1e}" if shares else ""


def _flags(run: Record) -> Tensor:
    """(images,), true where hallucinated."""
    return torch.tensor([mark == "1" for mark in run["flags"]])


def _points(value: Interval) -> str:
    return f"{value.value:+.0f} [{value.low:+.0f}, {value.high:+.0f}]"


def figures(runs: Runs) -> dict[str, Figure]:
    drawn = {}
    if runs.oracle:
        drawn["mechanism.png"] = mechanism(runs)
    curves = [(arm, run["score"]) for arm in runs.of("line") for run in runs.arms["line", arm] if "score" in run]
    if curves:
        drawn["scores.png"] = scores(curves)
    if runs.images:
        drawn["images.png"] = frontier(runs)
    return drawn


def mechanism(runs: Runs) -> Figure:
    """Hallucinated mass against smoothing, and against the ridge."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    axes = drawn.subplots(1, 2)
    rows = runs.oracle["smoothed"]
    axes[0].plot([row["h"] for row in rows], [row["beyond"] for row in rows], "o-")
    axes[0].set(yscale="log", xlabel="smoothing h", ylabel="mass beyond 6 deviations")
    for i in INDICES:
        axes[1].plot([row["ridge"][str(i)] for row in rows], [row["beyond"] for row in rows], "o-", label=f"t = {i}")
    for arm in runs.of("line"):
        some = runs.arms["line", arm]
        if "errors" in some[0]:
            x = [run["errors"]["10"]["ridge"] for run in some]
            axes[1].plot(x, [rate(run) for run in some], ".", color="0.7", ms=3, zorder=0)
    axes[1].plot([], [], ".", color="0.7", label="trained networks, t = 10")
    axes[1].set(yscale="log", xlabel="ridge: largest normalised Jacobian between modes")
    axes[1].legend(fontsize=7)
    return drawn


def scores(curves: Sequence[tuple[str, Record]]) -> Figure:
    """Learned scores over the modes and the gaps of the line."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    axis = drawn.subplots()
    axis.plot(curves[0][1]["x"], curves[0][1]["exact"], color="k", lw=2, label="exact")
    for arm, curve in curves:
        axis.plot(curve["x"], curve["learned"], lw=1, label=arm)
    low, high = min(curves[0][1]["exact"]), max(curves[0][1]["exact"])
    axis.set(xlabel="x at t = 10", ylabel="score", ylim=(1.3 * low, 1.3 * high))
    axis.legend(fontsize=7)
    return drawn


def frontier(runs: Runs) -> Figure:
    """Rate against distance, an arm a point, for each image world."""
    drawn = Figure(figsize=(7 * len(runs.images), 4.2), layout="constrained")
    for axis, world in zip(drawn.subplots(1, len(runs.images), squeeze=False)[0], runs.images, strict=True):
        for i, arm in enumerate(runs.of(world)):
            x, y = runs.mean(world, arm, "distance"), 100 * runs.mean(world, arm, "rate")
            marker = "s" if arm == "plain" else "o" if arm in runs.ours(world) else "x"
            axis.plot([x], [y], marker, color=f"C{i % 10}", ms=9 - i // 3, fillstyle="none", label=arm)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="boxed: plain, round: ours")
        axis.set(xscale="log", xlabel="Frechet distance", ylabel="hallucinated, %", title=world)
    return drawn
