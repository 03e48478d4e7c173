"""results/sharpen: summary.json and the plots, from the runs alone. The page is in sharpen_readme.

A reduction is 1 - rate / rate of the arm that it is held against, in percent, mean over seeds that share data, start,
batches and noise, with Student's t interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.claims import entry
from experiments.sharpen_mixture import reference_of
from fieldsmith.metrics.intervals import Interval, mean_interval
from fieldsmith.run import write_atomically

PAPER = "VSM, arXiv 2606.00377"
claim = partial(entry, PAPER)
Run = dict[str, Any]
IMAGES = ("columns", "cards", "chess")
AIM = 25.0
SLACK = {"distance": 1.1, "recall": 0.05, "coverage": 0.05}  # within which fidelity and diversity count as equal
PUBLISHED = "VSM 0.1"


class Runs:
    """Every run, by world and arm, seeds in order."""

    def __init__(self, files: Sequence[Path]):
        self.arms: dict[tuple[str, str], list[Run]] = {}
        self.judges: list[Run] = []
        self.oracle: Run = {}
        for path in files:
            run = json.loads(path.read_text())
            if "smoothed" in run:
                self.oracle = run
            elif "detection" in run:
                self.judges.append(run)
            else:
                self.arms.setdefault((run.get("world") or run["study"], run["arm"]), []).append(run)
        self.worlds = tuple(dict.fromkeys(world for world, _ in self.arms))
        self.images = tuple(world for world in IMAGES if world in self.worlds)

    def of(self, world: str) -> list[str]:
        return [arm for w, arm in self.arms if w == world]

    def ours(self, world: str) -> list[str]:
        """Arms of our search."""
        return [arm for arm in self.of(world) if arm.startswith(("steered", "neighbours", "Jacobian filter", "ours"))]

    def mean(self, world: str, arm: str, key: str) -> float:
        found = [run[key] for run in self.arms[world, arm] if run.get(key) is not None]
        return sum(found) / len(found) if found else math.nan


def rate(run: Run) -> float:
    """What share of an arm's law or images is hallucinated."""
    return float(run["rate"] if "rate" in run else run["beyond"])


def reduction(runs: Runs, world: str, arm: str, against: str) -> Interval:
    """In percent, over paired seeds."""
    pairs = zip(runs.arms[world, against], runs.arms[world, arm], strict=True)
    return mean_interval(torch.tensor([100 * (1 - rate(now) / rate(was)) for was, now in pairs], dtype=torch.float64))


def ratio(runs: Runs, world: str, arm: str, against: str) -> Interval:
    """rate / rate, geometric mean over paired seeds."""
    pairs = zip(runs.arms[world, against], runs.arms[world, arm], strict=True)
    logs = torch.tensor([math.log(rate(now) / rate(was)) for was, now in pairs], dtype=torch.float64)
    found = mean_interval(logs)
    return Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n)


def equal(runs: Runs, world: str, arm: str) -> bool:
    """Whether fidelity and diversity are those of 'plain', within SLACK, in means over seeds."""
    if runs.mean(world, arm, "distance") > SLACK["distance"] * runs.mean(world, "plain", "distance"):
        return False
    return all(
        not runs.mean(world, arm, key) < runs.mean(world, "plain", key) - SLACK[key] for key in ("recall", "coverage")
    )


def kept(runs: Runs, world: str, arm: str) -> str:
    """What became of fidelity and diversity, in words."""
    keys = ("distance", "precision", "recall", "fld")
    return ", ".join(f"{k} {runs.mean(world, 'plain', k):.2f} to {runs.mean(world, arm, k):.2f}" for k in keys)


def unspoilt(runs: Runs, world: str, arm: str) -> bool:
    """Whether precision and FLD, which are no part of `equal`, stayed too."""
    lost = runs.mean(world, "plain", "precision") - runs.mean(world, arm, "precision")
    return lost <= SLACK["recall"] and runs.mean(world, arm, "fld") <= runs.mean(world, "plain", "fld") + 2


def best(runs: Runs) -> dict[str, str]:
    """By world, our arm of the largest reduction at equal fidelity and diversity; {} where none is equal."""
    found = {}
    for world in runs.images:
        fair = [arm for arm in runs.ours(world) if equal(runs, world, arm)]
        if fair:
            found[world] = max(fair, key=lambda arm: reduction(runs, world, arm, "plain").value)
    return found


def claimed(runs: Runs, arm: str) -> list[str]:
    """The image worlds where an arm has fewer hallucinations beyond chance, at equal fidelity and diversity."""
    return [
        w for w in runs.images
        if (w, arm) in runs.arms and equal(runs, w, arm) and reduction(runs, w, arm, "plain").low > 0
    ]  # fmt: skip


def overall(runs: Runs) -> str | None:
    """Our arm that is claimed on most worlds and, of those, has the largest least reduction."""
    arms = {arm for w in runs.images for arm in runs.ours(w) if claimed(runs, arm)}

    def worth(arm: str) -> tuple[int, float]:
        worlds = claimed(runs, arm)
        return len(worlds), min(reduction(runs, w, arm, "plain").value for w in worlds)

    return max(sorted(arms), key=worth) if arms else None


def slope(runs: Runs) -> Interval:
    """Decades of hallucinated mass a decade of the ridge at t = 10, by least squares over the smoothed oracles."""
    rows = [row for row in runs.oracle["smoothed"] if row["h"] > 0]
    x = torch.tensor([math.log10(row["ridge"]["10"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log10(row["beyond"]) for row in rows], dtype=torch.float64)
    x0 = x - x.mean()
    found = float((x0 * y).sum() / x0.square().sum())
    residual = y - y.mean() - found * x0
    error = math.sqrt(float(residual.square().sum()) / (len(rows) - 2) / float(x0.square().sum()))
    half = 3.182 * error if len(rows) == 5 else 2.776 * error  # Student's t at 3 or 4 degrees of freedom
    return Interval(found, found - half, found + half, len(rows))


def graded(found: Interval, unspoilt: bool = True) -> str:
    """Reproduced where the whole interval meets the aim and nothing was paid for it, partly where the value does."""
    return "reproduced" if found.low >= AIM and unspoilt else "partly" if found.value >= AIM else "not"


def claims(runs: Runs, seeds: Sequence[int], command: str) -> list[dict[str, Any]]:
    """The issue's ids first, then one a world."""
    extra: dict[str, Any] = {"seeds": list(seeds), "command": command, "forward_equivalents": None}
    found: list[dict[str, Any]] = []
    chosen, arm = best(runs), overall(runs)
    if arm:
        worlds = claimed(runs, arm)
        worst = min(worlds, key=lambda w: reduction(runs, w, str(arm), "plain").value)
        value = reduction(runs, worst, arm, "plain")
        words = f"fewer hallucinated samples by '{arm}' at equal distance, recall and coverage, claimed on "
        words += f"{' and '.join(worlds)}; the worst, {worst}: {kept(runs, worst, arm)}"
        for w in runs.images:
            if w not in worlds:
                words += f"; not claimed on {w}: {reduction(runs, w, arm, 'plain').value:+.0f}%"
        verdict = graded(value, unspoilt(runs, worst, arm))
        found.append(claim("sharpen.best_reduction_percent", words, value, "%", verdict, extra))
    elif runs.images:
        worst = min(runs.images, key=lambda w: max(reduction(runs, w, a, "plain").value for a in runs.ours(w)))
        value = max((reduction(runs, worst, a, "plain") for a in runs.ours(worst)), key=lambda interval: interval.value)
        words = f"no arm of ours has fewer hallucinated samples beyond chance at equal fidelity; the best on {worst}"
        found.append(claim("sharpen.best_reduction_percent", words, value, "%", "not", extra))
    vsm = [w for w in runs.images if (w, PUBLISHED) in runs.arms]
    if vsm:
        each = [reduction(runs, w, PUBLISHED, "variance learning") for w in vsm]
        values = torch.tensor([interval.value for interval in each], dtype=torch.float64)
        value = mean_interval(values) if len(values) > 1 else each[0]
        words = f"fewer hallucinated samples by VSM at rho 0.1 against variance learning, mean over {', '.join(vsm)}"
        found.append(claim("sharpen.vsm_published_reduction_percent", words, value, "%", graded(value), extra))
    if runs.oracle:
        value = slope(runs)
        words = "decades of hallucinated mass a decade of ridge height, exact score smoothed by h = 0.01 to 0.12"
        verdict = "reproduced" if value.high < 0 else "not"
        found.append(claim("sharpen.smoothness_slope", words, value, "decades", verdict, extra))
    if runs.judges:
        low = min((v, f"{r['world']} {r['size']}: {k}") for r in runs.judges for k, v in r["detection"].items())
        n = runs.judges[0]["corrupted"]
        value = Interval(low[0], low[0], low[0], n)
        verdict = "reproduced" if low[0] >= 0.99 else "not"
        words = f"share of corruptions found, lowest: {low[1]}, of {n}"
        found.append(claim("sharpen.judge_detection", words, value, "share", verdict, extra))
        alarms = float(max(r["false alarms"] for r in runs.judges))
        value = Interval(alarms, alarms, alarms, runs.judges[0]["clean"])
        words = f"clean images refused of {value.n:,} a world, most over {len(runs.judges)} worlds and sizes"
        verdict = "not" if alarms else "reproduced"
        found.append(claim("sharpen.judge_false_alarms", words, value, "images", verdict, extra))
    if "line" in runs.worlds:
        for name, arm in (("l2", "L2 0.005"), ("points", "10k points"), ("vsm", PUBLISHED), ("vsm_low", "VSM 0.005"),
                          ("jacobian_floor", "jacobian-floor 0.01"), ("jacobian_match", "jacobian-match 0.01"),
                          ("neighbours", "neighbours, off path"), ("steered", "steered 2")):  # fmt: skip
            value = ratio(runs, "line", arm, reference_of(arm))
            words = f"line: mass beyond 6 deviations, '{arm}' over '{reference_of(arm)}' (exact push-forward)"
            better = name not in ("l2", "points")
            good = value.high < 1 if better else value.low > 1
            verdict = "reproduced" if good else "not"
            found.append(claim(f"sharpen.line_ratio_{name}", words, value, "ratio", verdict, extra))
    for world in runs.images:
        value = reduction(runs, world, PUBLISHED, "variance learning")
        words = f"{world}: fewer hallucinated samples by VSM at rho 0.1 against variance learning"
        name = f"sharpen.vsm_published_reduction_percent.{world}"
        found.append(claim(name, words, value, "%", graded(value), extra))
        if world in chosen:
            value = reduction(runs, world, chosen[world], "plain")
            words = f"{world}: our best at equal fidelity and diversity, '{chosen[world]}' "
            words += f"({kept(runs, world, chosen[world])})"
            verdict = graded(value, unspoilt(runs, world, chosen[world]))
            found.append(claim(f"sharpen.best_reduction_percent.{world}", words, value, "%", verdict, extra))
    return found


def summarise(files: Sequence[Path], folder: Path, seeds: Sequence[int], command: str) -> None:
    """Write summary.json, the plots and README.md from the runs in `files`."""
    from experiments.sharpen_readme import figures, readme

    runs = Runs(files)
    listed = claims(runs, seeds, command)
    summary = {"claims": listed, "best": best(runs), "overall": overall(runs)}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    figures(runs, folder)
    write_atomically(folder / "README.md", readme(runs, listed, command))
