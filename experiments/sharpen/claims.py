"""What the runs say: which arm hallucinates less at equal fidelity, and the claims with intervals and verdicts.

A reduction is 1 - rate / rate of the arm that it is compared with, in percent, mean over seeds that share data, start,
batches and noise, with Student's t interval.
"""

from __future__ import annotations

import math

import torch

from experiments.study import Claim, Record, Records, average, exactly, geometric, mean, verdict
from fieldsmith.measure.intervals import Interval

IMAGES = ("columns", "cards", "chess")
INDICES = (5, 10, 20)  # where ridges and errors are read
AIM = 25.0
SLACK = {"distance": 1.1, "recall": 0.05, "coverage": 0.05}  # within which fidelity and diversity count as equal
PUBLISHED = "VSM 0.1"


def reference_of(arm: str) -> str:
    """What an arm is compared with."""
    return "variance learning" if arm.startswith("VSM") else "plain"


class Runs:
    """Every run, by world and arm, seeds in order."""

    def __init__(self, records: Records):
        self.arms: dict[tuple[str, str], list[Record]] = {}
        self.judges: list[Record] = []
        self.oracle: Record = {}
        for run in records.values():
            if "smoothed" in run:
                self.oracle = run
            elif "detection" in run:
                self.judges.append(run)
            else:
                self.arms.setdefault((run.get("world") or run["study"], run["arm"]), []).append(run)
        self.worlds = tuple(dict.fromkeys(world for world, _ in self.arms))
        self.images = tuple(world for world in IMAGES if world in self.worlds)

    def of(self, world: str) -> list[str]:
        return [arm for of, arm in self.arms if of == world]

    def ours(self, world: str) -> list[str]:
        """Arms of our search."""
        return [arm for arm in self.of(world) if arm.startswith(("steered", "neighbours", "Jacobian filter", "ours"))]

    def mean(self, world: str, arm: str, key: str) -> float:
        values = [run[key] for run in self.arms[world, arm] if run.get(key) is not None]
        return average(values) if values else math.nan

    def ratios(self, world: str, arm: str, against: str) -> list[float]:
        """rate / rate, of paired seeds."""
        pairs = zip(self.arms[world, against], self.arms[world, arm], strict=True)
        return [rate(now) / rate(was) for was, now in pairs]

    def reduction(self, world: str, arm: str, against: str = "plain") -> Interval:
        """In percent, over paired seeds."""
        return mean(100 * (1 - ratio) for ratio in self.ratios(world, arm, against))

    def equal(self, world: str, arm: str) -> bool:
        """Whether fidelity and diversity are those of 'plain', within SLACK, in means over seeds."""
        if self.mean(world, arm, "distance") > SLACK["distance"] * self.mean(world, "plain", "distance"):
            return False
        return all(
            not self.mean(world, arm, key) < self.mean(world, "plain", key) - SLACK[key]
            for key in ("recall", "coverage")
        )

    def kept(self, world: str, arm: str) -> str:
        """What became of fidelity and diversity, in words."""
        keys = ("distance", "precision", "recall", "fld")
        return ", ".join(f"{k} {self.mean(world, 'plain', k):.2f} to {self.mean(world, arm, k):.2f}" for k in keys)

    def unspoilt(self, world: str, arm: str) -> bool:
        """Whether precision and FLD, which are no part of `equal`, stayed too."""
        lost = self.mean(world, "plain", "precision") - self.mean(world, arm, "precision")
        return lost <= SLACK["recall"] and self.mean(world, arm, "fld") <= self.mean(world, "plain", "fld") + 2

    def best(self) -> dict[str, str]:
        """By world, our arm of the largest reduction at equal fidelity and diversity; none where none is equal."""
        fair = {world: [arm for arm in self.ours(world) if self.equal(world, arm)] for world in self.images}
        return {w: max(arms, key=lambda arm: self.reduction(w, arm).value) for w, arms in fair.items() if arms}

    def claimed(self, arm: str) -> list[str]:
        """The image worlds where an arm has fewer hallucinations beyond chance, at equal fidelity and diversity."""
        there = [world for world in self.images if (world, arm) in self.arms]
        return [world for world in there if self.equal(world, arm) and self.reduction(world, arm).low > 0]

    def overall(self) -> str | None:
        """Our arm that is claimed on most worlds and, of those, has the largest least reduction."""
        arms = {arm for world in self.images for arm in self.ours(world) if self.claimed(arm)}

        def worth(arm: str) -> tuple[int, float]:
            worlds = self.claimed(arm)
            return len(worlds), min(self.reduction(world, arm).value for world in worlds)

        return max(sorted(arms), key=worth) if arms else None


def rate(run: Record) -> float:
    """What share of an arm's law or images is hallucinated."""
    return float(run["rate"] if "rate" in run else run["beyond"])


def slope(runs: Runs) -> Interval:
    """Decades of hallucinated mass a decade of the ridge at t = 10, by least squares over the smoothed oracles."""
    rows = [row for row in runs.oracle["smoothed"] if row["h"] > 0]
    x = torch.tensor([math.log10(row["ridge"]["10"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log10(row["beyond"]) for row in rows], dtype=torch.float64)
    x0 = x - x.mean()
    fitted = float((x0 * y).sum() / x0.square().sum())
    residual = y - y.mean() - fitted * x0
    error = math.sqrt(float(residual.square().sum()) / (len(rows) - 2) / float(x0.square().sum()))
    half = 3.182 * error if len(rows) == 5 else 2.776 * error  # Student's t at 3 or 4 degrees of freedom
    return Interval(fitted, fitted - half, fitted + half, len(rows))


def reduced(name: str, statement: str, value: Interval, unspoilt: bool = True) -> Claim:
    """Reproduced where the whole interval meets the aim and nothing was paid for it, partly where the value does."""
    grade = verdict(value.low >= AIM and unspoilt, value.value >= AIM)
    return Claim(f"sharpen.{name}", statement, value, "%", grade, None)


def claims(runs: Runs) -> list[Claim]:
    """The issue's ids first, then one a world."""
    made = [*best_claim(runs)]
    vsm = [world for world in runs.images if (world, PUBLISHED) in runs.arms]
    if vsm:
        each = [runs.reduction(world, PUBLISHED, "variance learning") for world in vsm]
        value = mean([one.value for one in each]) if len(each) > 1 else each[0]
        words = f"fewer hallucinated samples by VSM at rho 0.1 against variance learning, mean over {', '.join(vsm)}"
        made.append(reduced("vsm_published_reduction_percent", words, value))
    if runs.oracle:
        value = slope(runs)
        words = "decades of hallucinated mass a decade of ridge height, exact score smoothed by h = 0.01 to 0.12"
        made.append(Claim("sharpen.smoothness_slope", words, value, "decades", verdict(value.high < 0), None))
    if runs.judges:
        low, which = min((v, f"{r['world']} {r['size']}: {k}") for r in runs.judges for k, v in r["detection"].items())
        n = runs.judges[0]["corrupted"]
        words = f"share of corruptions found, lowest: {which}, of {n}"
        made.append(Claim("sharpen.judge_detection", words, exactly(low, n), "share", verdict(low >= 0.99), None))
        alarms, n = float(max(r["false alarms"] for r in runs.judges)), runs.judges[0]["clean"]
        words = f"clean images refused of {n:,} a world, most over {len(runs.judges)} worlds and sizes"
        made.append(Claim("sharpen.judge_false_alarms", words, exactly(alarms, n), "images", verdict(not alarms), None))
    if "line" in runs.worlds:
        made += line_claims(runs)
    chosen = runs.best()
    for world in runs.images:
        value = runs.reduction(world, PUBLISHED, "variance learning")
        words = f"{world}: fewer hallucinated samples by VSM at rho 0.1 against variance learning"
        made.append(reduced(f"vsm_published_reduction_percent.{world}", words, value))
        if world in chosen:
            arm = chosen[world]
            words = f"{world}: our best at equal fidelity and diversity, '{arm}' ({runs.kept(world, arm)})"
            value, unspoilt = runs.reduction(world, arm), runs.unspoilt(world, arm)
            made.append(reduced(f"best_reduction_percent.{world}", words, value, unspoilt))
    return made


def best_claim(runs: Runs) -> list[Claim]:
    """Of the arm that is claimed on most worlds, on the worst of them; or that none is."""
    arm = runs.overall()
    if arm:
        worlds = runs.claimed(arm)
        worst = min(worlds, key=lambda world: runs.reduction(world, arm).value)
        words = f"fewer hallucinated samples by '{arm}' at equal distance, recall and coverage, claimed on "
        words += f"{' and '.join(worlds)}; the worst, {worst}: {runs.kept(worst, arm)}"
        for world in (world for world in runs.images if world not in worlds):
            words += f"; not claimed on {world}: {runs.reduction(world, arm).value:+.0f}%"
        return [reduced("best_reduction_percent", words, runs.reduction(worst, arm), runs.unspoilt(worst, arm))]
    if runs.images:
        most = {w: max((runs.reduction(w, a) for a in runs.ours(w)), key=lambda one: one.value) for w in runs.images}
        worst = min(most, key=lambda world: most[world].value)
        words = f"no arm of ours has fewer hallucinated samples beyond chance at equal fidelity; the best on {worst}"
        return [Claim("sharpen.best_reduction_percent", words, most[worst], "%", "not", None)]
    return []


def line_claims(runs: Runs) -> list[Claim]:
    made = []
    for name, arm in (("l2", "L2 0.005"), ("points", "10k points"), ("vsm", PUBLISHED), ("vsm_low", "VSM 0.005"),
                      ("jacobian_floor", "jacobian-floor 0.01"), ("jacobian_match", "jacobian-match 0.01"),
                      ("neighbours", "neighbours, off path"), ("steered", "steered 2")):  # fmt: skip
        against = reference_of(arm)
        value = geometric(runs.ratios("line", arm, against))
        words = f"line: mass beyond 6 deviations, '{arm}' over '{against}' (exact push-forward)"
        good = value.low > 1 if name in ("l2", "points") else value.high < 1
        made.append(Claim(f"sharpen.line_ratio_{name}", words, value, "ratio", verdict(good), None))
    return made
