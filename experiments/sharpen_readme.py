"""The page of results/sharpen: claims, the mechanism, the line and the lattice, the image worlds, the verdict.

In: the runs and the claims. Out: Markdown, and the figures beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.claims import opening, table
from experiments.sharpen_mixture import INDICES, reference_of
from experiments.sharpen_summary import Runs, best, equal, rate, ratio, reduction
from fieldsmith.metrics.hallucination import hallucination
from fieldsmith.metrics.intervals import Interval


def readme(runs: Runs, listed: list[dict[str, Any]], command: str) -> str:
    """All of it."""
    lines = opening("sharpen", listed, command)
    if runs.oracle:
        lines += mechanism(runs)
    if "line" in runs.worlds:
        lines += on_the_line(runs)
    if "lattice" in runs.worlds:
        lines += on_the_lattice(runs)
    for world in runs.images:
        lines += of_images(runs, world)
    if runs.judges:
        lines += of_judges(runs)
    return "\n".join(lines).rstrip() + "\n"


def mechanism(runs: Runs) -> list[str]:
    rows = [
        (f"{row['h']:g}", f"{row['beyond']:.3g}", " / ".join(f"{row['ridge'][str(i)]:.1f}" for i in INDICES))
        for row in runs.oracle["smoothed"]
    ]
    variances = [
        (kind, f"{v['beyond 4']:.2g}", f"{v['beyond 6']:.2g}", f"{v['deviation']:.4f}")
        for kind, v in runs.oracle["variances"].items()
    ]
    return [
        "## A smooth score hallucinates: no training",
        "",
        "The exact score of three modes on a line, convolved with N(0, h^2), sampled by 300 ancestral steps and pushed "
        "forward exactly. The ridge is the largest normalised Jacobian between modes.",
        "",
        "![mass against ridge](mechanism.png)",
        "",
        *table(("h", "mass beyond 6 deviations", f"ridge at t = {' / '.join(map(str, INDICES))}"), rows),
        "The exact score under each sampling variance (true deviation 0.05):",
        "",
        *table(("variance", "beyond 4", "beyond 6", "deviation of modes"), variances),
    ]


def _times(value: Interval) -> str:
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _mean(runs: Sequence[dict[str, Any]], *keys: str) -> float:
    values = []
    for run in runs:
        found: Any = run
        for key in keys:
            found = found[key]
        values.append(float(found))
    return sum(values) / len(values)


def on_the_line(runs: Runs) -> list[str]:
    rows = []
    for arm in runs.of("line"):
        found = runs.arms["line", arm]
        against = reference_of(arm)
        if "errors" in found[0]:
            ridge = " / ".join(f"{_mean(found, 'errors', str(i), 'ridge'):.1f}" for i in INDICES)
            between, at_data = (
                f"{_mean(found, 'errors', '10', key):.3f}" for key in ("eps error between", "eps error at data")
            )
        else:
            ridge, between, at_data = f"AUROC {_mean(found, 'auroc'):.3f}", "", ""
        deviation = torch.tensor([run["deviations"] for run in found]).mean() if "deviations" in found[0] else None
        over = ("", "") if arm == against else (_times(ratio(runs, "line", arm, against)), against)
        width = "" if deviation is None else f"{deviation:.4f}"
        rows.append((arm, f"{_rate(found):.2e}", *over, ridge, between, at_data, width, _share(found)))
    swaps = [
        (arm, *(f"{_mean(found, 'swap', kind):.2e}" for kind in ("small", "large")), f"{_rate(found):.2e}")
        for arm, found in ((arm, runs.arms["line", arm]) for arm in runs.of("line"))
        if all("swap" in run for run in found)
    ]
    n = len(runs.arms["line", "plain"])
    return [
        "## Three modes on a line",
        "",
        f"{n} seeds, paired; mass beyond 6 deviations of every mode, pushed forward exactly; geometric mean ratios. "
        "Errors of eps at t = 10: evenly between the modes, and at data's own states. The share is the length of the "
        "term's gradient over the rest's.",
        "",
        "![score against exact score](scores.png)",
        "",
        *table(("arm", "mass", "ratio", "over", f"ridge at t = {' / '.join(map(str, INDICES))}", "eps error between",
                "at data", "deviation", "share"), rows),
        "The same weights under other sampling variances:",
        "",
        *table(("arm", "small", "large", "learned"), swaps),
    ]  # fmt: skip


def _rate(found: Sequence[dict[str, Any]]) -> float:
    return sum(map(rate, found)) / len(found)


def _share(found: Sequence[dict[str, Any]]) -> str:
    shares = [run["share"] for run in found if run.get("share") is not None]
    return f"{sum(shares) / len(shares):.1e}" if shares else ""


def on_the_lattice(runs: Runs) -> list[str]:
    rows = []
    for arm in runs.of("lattice"):
        found, against = runs.arms["lattice", arm], reference_of(arm)
        missing = sum(sum(m < 0.01 for m in run["masses"]) for run in found) / len(found) if "masses" in found[0] else 0
        rows.append(
            (arm, f"{100 * _rate(found):.2f}%",
             "" if arm == against else _times(ratio(runs, "lattice", arm, against)), "" if arm == against else against,
             f"{missing:.1f}", f"{_mean(found, 'errors', '10', 'eps error between'):.3f}" if "errors" in found[0] else
             f"AUROC {_mean(found, 'auroc'):.3f}", _share(found))
        )  # fmt: skip
    chains = runs.arms["lattice", "plain"][0]["chains"]
    n = len(runs.arms["lattice", "plain"])
    return [
        "## Twenty-five modes on a lattice",
        "",
        f"{n} seeds, {chains:,} chains each; a mode is missed below a quarter of its share.",
        "",
        *table(("arm", "beyond 6 deviations", "ratio", "over", "modes missed", "eps error between", "share"), rows),
    ]


def of_images(runs: Runs, world: str) -> list[str]:
    rows = []
    plain = runs.arms[world, "plain"]
    base = _mean(plain, "training seconds")
    for arm in runs.of(world):
        found = runs.arms[world, arm]
        flags = [_flags(run) for run in found]
        rates = hallucination(flags, torch.Generator().manual_seed(0))
        low, high = (rates.clustered or rates.pooled).low, (rates.clustered or rates.pooled).high
        less = "" if arm == "plain" else _points(reduction(runs, world, arm, "plain"))
        shown = [f"{runs.mean(world, arm, key):.3g}" for key in ("distance", "precision", "recall", "fld")]
        variety = [f"{runs.mean(world, arm, key):.2f}" if key in found[0] else "" for key in ("different", "novel")]
        rows.append(
            (f"**{arm}**" if arm != "plain" and equal(runs, world, arm) else arm,
             f"{100 * rates.pooled.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]", less, *shown, *variety,
             f"{runs.mean(world, arm, 'evaluations a step'):.2f}",
             "" if "of" in found[0]["settings"] else f"{_mean(found, 'training seconds') / base:.2f}", _share(found))
        )  # fmt: skip
    images, seeds = plain[0]["images"], len(plain)
    pooled = hallucination([_flags(run) for run in plain], torch.Generator().manual_seed(0))
    swaps = [
        (arm, *(f"{100 * _mean(runs.arms[world, arm], 'swap', kind):.1f}%" for kind in ("small", "large")),
         f"{100 * _mean(runs.arms[world, arm], 'rate'):.1f}%")
        for arm in runs.of(world) if all("swap" in run for run in runs.arms[world, arm])
    ]  # fmt: skip
    reasons: dict[str, int] = {}
    for run in plain:
        for word, count in run["reasons"].items():
            reasons[word] = reasons.get(word, 0) + count
    common = ", ".join(f"{word} ({count})" for word, count in sorted(reasons.items(), key=lambda item: -item[1])[:6])
    aurocs = [
        f"{arm}: AUROC {_mean(runs.arms[world, arm], 'auroc'):.2f}"
        for arm in runs.of(world) if all("auroc" in run for run in runs.arms[world, arm])
    ]  # fmt: skip
    chosen = best(runs).get(world)
    study = plain[0]["told"]["study"]
    return [
        f"## {world.capitalize()}",
        "",
        f"{seeds} seeds of {images} images at {study['size']} pixels, {study['sampler_steps']} ancestral steps; the "
        f"base took {study['steps']:,} updates, every arm {study['more']} more. Rates with a bootstrap over seeds, "
        f"then images; differences below {100 * pooled.detectable:.1f} points are not to be seen at this n. Reduction: "
        "against 'plain', paired seeds, Student's t. Distance (Frechet), precision, recall and FLD on "
        f"a classifier of the world's own images. Bold: fidelity and diversity equal to plain's. Our best: {chosen}.",
        "",
        *table(("arm", "hallucinated", "reduction %", "distance", "precision", "recall", "FLD", "different", "novel",
                "forwards a step", "training time", "share"), rows),
        f"Why plain's images were refused: {common}.",
        "",
        *([f"What watches a path: {'; '.join(aurocs)}.", ""] if aurocs else []),
        "The same weights under other sampling variances:",
        "",
        *table(("arm", "small", "large", "learned"), swaps),
    ]  # fmt: skip


def _flags(run: dict[str, Any]) -> Tensor:
    """(images,), true where hallucinated."""
    return torch.tensor([mark == "1" for mark in run["flags"]])


def _points(value: Interval) -> str:
    return f"{value.value:+.0f} [{value.low:+.0f}, {value.high:+.0f}]"


def of_judges(runs: Runs) -> list[str]:
    rows = []
    for run in runs.judges:
        worst = min(run["detection"], key=run["detection"].get)
        rows.append(
            (f"{run['world']} {run['size']}", run["false alarms"], f"{run['clean']:,}", len(run["detection"]),
             f"{100 * run['detection'][worst]:.2f}%", worst, f"{run['corrupted']:,}")
        )  # fmt: skip
    return [
        "## The judges",
        "",
        *table(
            ("world, pixels", "false alarms", "of clean", "kinds of corruption", "least found", "which", "of each"),
            rows,
        ),
    ]


def figures(runs: Runs, folder: Path) -> None:
    """mechanism.png, scores.png and images.png."""
    from matplotlib.figure import Figure

    if runs.oracle:
        drawn = Figure(figsize=(9, 3.6), layout="constrained")
        axes = drawn.subplots(1, 2)
        rows = runs.oracle["smoothed"]
        axes[0].plot([row["h"] for row in rows], [row["beyond"] for row in rows], "o-")
        axes[0].set(yscale="log", xlabel="smoothing h", ylabel="mass beyond 6 deviations")
        for i in INDICES:
            axes[1].plot(
                [row["ridge"][str(i)] for row in rows], [row["beyond"] for row in rows], "o-", label=f"t = {i}"
            )
        for (world, _arm), found in runs.arms.items():
            if world == "line" and "errors" in found[0]:
                x = [run["errors"]["10"]["ridge"] for run in found]
                axes[1].plot(x, [rate(run) for run in found], ".", color="0.7", ms=3, zorder=0)
        axes[1].plot([], [], ".", color="0.7", label="trained networks, t = 10")
        axes[1].set(yscale="log", xlabel="ridge: largest normalised Jacobian between modes")
        axes[1].legend(fontsize=7)
        drawn.savefig(folder / "mechanism.png", dpi=110)
    curves = [
        (arm, run["score"])
        for (world, arm), found in runs.arms.items()
        if world == "line"
        for run in found
        if "score" in run
    ]
    if curves:
        drawn = Figure(figsize=(9, 3.6), layout="constrained")
        axis = drawn.subplots()
        axis.plot(curves[0][1]["x"], curves[0][1]["exact"], color="k", lw=2, label="exact")
        for arm, curve in curves:
            axis.plot(curve["x"], curve["learned"], lw=1, label=arm)
        low, high = min(curves[0][1]["exact"]), max(curves[0][1]["exact"])
        axis.set(xlabel="x at t = 10", ylabel="score", ylim=(1.3 * low, 1.3 * high))
        axis.legend(fontsize=7)
        drawn.savefig(folder / "scores.png", dpi=110)
    if runs.images:
        _frontier(runs, folder / "images.png")


def _frontier(runs: Runs, path: Path) -> None:
    """Rate against distance, an arm a point, for each image world."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7 * len(runs.images), 4.2), layout="constrained")
    for axis, world in zip(drawn.subplots(1, len(runs.images), squeeze=False)[0], runs.images, strict=True):
        for i, arm in enumerate(runs.of(world)):
            x, y = runs.mean(world, arm, "distance"), 100 * runs.mean(world, arm, "rate")
            marker = "s" if arm == "plain" else "o" if arm in runs.ours(world) else "x"
            axis.plot([x], [y], marker, color=f"C{i % 10}", ms=9 - i // 3, fillstyle="none", label=arm)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="boxed: plain, round: ours")
        axis.set(xscale="log", xlabel="Frechet distance", ylabel="hallucinated, %", title=world)
    drawn.savefig(path, dpi=110)
