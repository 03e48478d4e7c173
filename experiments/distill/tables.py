"""What the runs say: claims with intervals and verdicts, the rows of the page, the factorial of DASH's three parts with
leave-one-out and Shapley shares, quality against cost and against the guidance scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from matplotlib.figure import Figure

from experiments.study import (
    SINGLE,
    Claim,
    Record,
    Records,
    StudyConfig,
    Tables,
    at_most,
    exactly,
    geometric,
    mean,
    verdict,
)
from fieldsmith.measure.intervals import Interval
from fieldsmith.measure.sweep import best

Measure = Callable[[Record], float]
SCALES = (1.0, 1.5, 2.0)  # of guidance, at which every arm is sampled
FINE = (1.0, 1.25, 1.5, 2.0)  # for the teacher, for ours, and for what the costs of ours are compared with
FACTORIAL = {  # (unconditional loss, TIRT, anchor) -> arm
    (0, 0, 0): "conditional", (0, 0, 1): "anchor only", (0, 1, 0): "TIRT only",
    (0, 1, 1): "dash w/o unconditional", (1, 0, 0): "unconditional only", (1, 0, 1): "dash, no TIRT",
    (1, 1, 0): "dash w/o anchor", (1, 1, 1): "dash",
}  # fmt: skip
PARTS = ("unconditional loss", "TIRT", "anchor")
PUBLISHED = "dash, no TIRT, equal steps"  # 64 pairs a step, the teacher asked at every step: the paper's own protocol
FAIR = "dash, no TIRT"  # the better of DASH's forms here, at half of that cost a step
COPIED = "dash, no TIRT, copied start"
MATCHED = "matched-dropout 10%"
MOST = 0.4  # of the cost of DASH as published: what our student may cost


def distance(run: Record) -> float:
    """To the data, at the best of the guidance scales that all runs have."""
    common = {str(w): run["curve"][str(w)] for w in SCALES}
    return float(common[best(common)]["distance"])


def closest(run: Record) -> float:
    """To the data, at the best guidance scale of all that the run has."""
    return float(run["curve"][best(run["curve"])]["distance"])


def guided_error(run: Record, states: str = "noised", w: str = "2") -> float:
    return float(run["guided error"][states][w])


def worst_rho(run: Record) -> float:
    return float(run["noised"]["worst_rho"] or math.inf)


class Runs:
    """Teachers by world, students by (world, arm)."""

    def __init__(self, records: Records):
        self.teachers: dict[str, Record] = {}
        self.arms: dict[tuple[str, str], list[Record]] = {}
        for record in records.values():
            if record["arm"] == "teacher":
                self.teachers[record["world"]] = record
            else:
                self.arms.setdefault((record["world"], record["arm"]), []).append(record)

    @property
    def worlds(self) -> list[str]:
        return list(self.teachers)

    def of(self, world: str) -> list[str]:
        return [arm for of, arm in self.arms if of == world]

    def mean(self, world: str, arm: str, measure: Measure) -> Interval:
        return mean([measure(run) for run in self.arms[world, arm]], SINGLE)

    def ratio(self, world: str, arm: str, over: str, measure: Measure) -> Interval:
        """Geometric mean over seeds of one arm's number over another's, at equal seeds."""
        pairs = zip(self.arms[world, arm], self.arms[world, over], strict=True)
        return geometric([measure(a) / measure(b) for a, b in pairs])

    def cost(self, world: str, arm: str) -> float:
        return float(self.arms[world, arm][0]["price"])

    def published(self, world: str) -> float:
        """What DASH as published costs here: 64 pairs a step, of student and teacher."""
        run = self.arms[world, FAIR][0]
        return float(run["steps"] * 128 * (3 + run["teacher cost"]))

    def ours(self, world: str) -> list[str]:
        """Our recipe at every budget, the cheapest first."""
        some = [arm for arm in self.of(world) if arm == "ours" or arm.startswith("ours x")]
        return sorted(some, key=lambda arm: self.cost(world, arm))

    def affordable(self, world: str) -> str:
        """Our largest budget within the allowed share of the cost of DASH as published."""
        most = MOST * self.published(world)
        some = [arm for arm in self.ours(world) if self.cost(world, arm) <= most]
        return (some or self.ours(world)[:1])[-1]


def cost_at_equal(runs: Runs, world: str, than: str, measure: Measure) -> tuple[Interval, int]:
    """Our cost where we are as good as the other arm ends, over its cost, by seed; how many seeds never get there.

    Each budget is a run of its own with its own schedule. Between budgets log-cost is linear in the measure; a seed
    that is as good at the smallest budget counts with that budget, one that never is with the largest.
    """
    arms, ratios, missed = runs.ours(world), [], 0
    for seed, other in enumerate(runs.arms[world, than]):
        points = [(runs.arms[world, arm][seed]["price"], measure(runs.arms[world, arm][seed])) for arm in arms]
        aim, cost = measure(other), points[-1][0]
        reached = next((i for i, (_, value) in enumerate(points) if value <= aim), None)
        if reached is None:
            missed += 1
        elif reached == 0:
            cost = points[0][0]
        else:
            (c0, v0), (c1, v1) = points[reached - 1], points[reached]
            cost = math.exp(math.log(c0) + (v0 - aim) / (v0 - v1) * (math.log(c1) - math.log(c0)))
        ratios.append(cost / other["price"])
    return geometric(ratios), missed


def shapley(values: dict[tuple[int, ...], float]) -> list[float]:
    """Each part's Shapley share of the drop from all-off to all-on: its mean drop over all orders of switching on."""
    n = len(next(iter(values)))
    total = [0.0] * n
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        on = [0] * n
        for part in order:
            before = values[tuple(on)]
            on[part] = 1
            total[part] += before - values[tuple(on)]
    return [one / len(orders) for one in total]


def factorial(runs: Runs, world: str, measure: Measure, tirt: int | None = None) -> Record | None:
    """Leave-one-out and Shapley drops by part, a dict a seed; None where arms are missing.

    With `tirt` fixed at 0 or 1 the parts are unconditional loss and anchor. `measurable`: whether the whole gain
    exceeds three seed deviations, the larger of the reference's and the full method's.
    """
    arms: dict[tuple[int, ...], str] = {}
    for on, arm in FACTORIAL.items():
        if tirt is None:
            arms[on] = arm
        elif on[1] == tirt:
            arms[on[0], on[2]] = arm
    if any((world, arm) not in runs.arms for arm in arms.values()):
        return None
    n = len(next(iter(arms)))
    off, full = (0,) * n, (1,) * n
    tables: list[dict[tuple[int, ...], float]] = [
        {on: measure(runs.arms[world, arm][seed]) for on, arm in arms.items()}
        for seed in range(len(runs.arms[world, FAIR]))
    ]
    seeds = [
        {
            "shapley": shapley(values),
            "left out": [values[tuple(int(i != part) for i in range(n))] - values[full] for part in range(n)],
            "gain": [values[off] - values[full]],
        }
        for values in tables
    ]
    gain = sum(one["gain"][0] for one in seeds) / len(seeds)
    spread = max(float(torch.tensor([table[key] for table in tables]).std()) for key in (off, full))
    return {"seeds": seeds, "gain": gain, "measurable": gain > 3 * spread, "ends": (arms[off], arms[full])}


def claims(runs: Runs) -> list[Claim]:
    """Each world's claims, and before them the issue's ids: the worse of the worlds that have one."""
    made = [one for world in runs.worlds for one in of_world(runs, world)]
    worst = []
    for name in dict.fromkeys(one.id.rpartition(".")[0] for one in made):
        some = [one for one in made if one.id.rpartition(".")[0] == name]
        one = max(some, key=partial(badness, name))
        words = f"{one.statement} (the worse of {len(some)} worlds)" if len(some) > 1 else one.statement
        worst.append(replace(one, id=name, statement=words))
    return [*worst, *made]


def badness(name: str, one: Claim) -> tuple[int, float]:
    value = one.interval.value
    rank = {"distill.compression": -value, "distill.rho": abs(math.log(value))}.get(name, value)
    return ("reproduced", "partly", "not").index(one.verdict), rank


def of_world(runs: Runs, world: str) -> list[Claim]:
    ours, teacher = runs.affordable(world), runs.teachers[world]
    cost = runs.cost(world, ours)
    ratio = teacher["parameters"] / runs.arms[world, ours][0]["parameters"]
    closeness = geometric([closest(run) / closest(teacher) for run in runs.arms[world, ours]])
    rhos = sorted((worst_rho(run) for run in runs.arms[world, ours]), key=lambda rho: abs(math.log(rho)))
    inside = [0.9 <= one <= 1.1 for one in rhos]
    recipe = f"our recipe ({ours}) at {100 * cost / runs.published(world):.0f}% of the cost of DASH as published:"
    made = [
        Claim(f"distill.compression.{world}", f"{world}: parameters of the teacher over the student's (aim: 5.7)",
              exactly(ratio, 1), "ratio", verdict(ratio >= 5.7), cost),
        Claim(f"distill.distance_ratio_best.{world}", f"{world}: {recipe} distance to data over the teacher's, each "
              "at its best guidance scale (aim: at most 1.25)", closeness, "ratio", at_most(closeness, 1.25), cost),
        Claim(f"distill.rho.{world}", f"{world}: {recipe} size of the guidance gap over the teacher's in the worst "
              "time bin that matters, of the worst seed; the interval is the range over seeds (aim: 0.9 to 1.1)",
              Interval(rhos[-1], min(rhos), max(rhos), len(rhos)), "ratio", verdict(all(inside), any(inside)), cost),
    ]  # fmt: skip
    for name, than, what in (
        ("cost_vs_dash", PUBLISHED, "the better of DASH's forms, 64 pairs a step as published"),
        ("cost_vs_dash_equal_compute", FAIR, "the same with as many evaluations of the student a step as ours"),
        ("cost_vs_dash_copied", COPIED, "the same that starts from the teacher's weights as ours does"),
        ("cost_vs_matched_dropout", MATCHED, "label dropout, fresh start, teacher asked at every step"),
    ):
        if (world, than) not in runs.arms:
            continue
        fine = len(runs.arms[world, than][0]["curve"]) == len(FINE)
        for kind, equal, measure in (
            ("", "distance", closest if fine else distance),
            ("_guided_error", "guided error G(2)", guided_error),
        ):
            value, missed = cost_at_equal(runs, world, than, measure)
            words = f"{world}: cost of our recipe (copied start, cached teacher) at equal {equal} over that of {than}, "
            words += f"{what} (aim for DASH: at most 0.4)"
            words += f"; {missed} of {value.n} seeds never got there and count with all they spent" if missed else ""
            grade = "not" if missed else at_most(value, MOST)
            made.append(Claim(f"distill.{name}{kind}.{world}", words, value, "ratio", grade, cost))
    for name, arm, over in (
        ("dash_vs_conditional", FAIR, "conditional"),
        ("matched_dropout_vs_dash", MATCHED, FAIR),
        ("tirt", "dash", FAIR),
        ("asked_at_every_step", f"{FAIR}, asked at every step", FAIR),
        ("ours_vs_matched_dropout", "ours", MATCHED),
    ):
        if not {(world, arm), (world, over)} <= runs.arms.keys():
            continue
        for kind, measure in (("", distance), ("_guided_error", guided_error)):
            value = runs.ratio(world, arm, over, measure)
            what = "guided error G(2)" if kind else "distance at the best scale"
            words = f"{world}: {what} of {arm} over that of {over}, equal student compute (below 1: better)"
            grade = verdict(value.high < 1, value.value < 1)
            made.append(Claim(f"distill.{name}{kind}.{world}", words, value, "ratio", grade, runs.cost(world, arm)))
    return [*made, *share_claims(runs, world, cost)]


def share_claims(runs: Runs, world: str, cost: float) -> list[Claim]:
    """The unconditional loss's share: among DASH's three parts, or, where those gain nothing, without TIRT."""
    three, two = "unconditional loss, TIRT and anchor", "unconditional loss and anchor, without TIRT,"
    for fixed, parts in ((None, three), (0, two)):
        made = factorial(runs, world, guided_error, fixed)
        if made and made["measurable"]:
            value = mean([one["shapley"][0] / one["gain"][0] for one in made["seeds"]], SINGLE)
            words = f"{world}: Shapley share of the unconditional loss in what {parts} take off G(2) of "
            words += "conditional-only (paper: more than 0.6 of its gain)"
            grade = verdict(value.low > 0.6, value.value > 0.6)
            return [Claim(f"distill.unconditional_share.{world}", words, value, "share", grade, cost)]
    return []


def tables(config: StudyConfig, records: Records) -> Tables:
    runs = Runs(records)
    summary = {"ours": {world: runs.affordable(world) for world in runs.worlds}}
    page = {"worlds": [section(runs, world) for world in runs.worlds]}
    return Tables(claims(runs), summary, page, {f"{world}.png": figure(runs, world) for world in runs.worlds})


def section(runs: Runs, world: str) -> Record:
    """A world's part of the page; `right` is the largest share of images as asked that any student reaches."""
    teacher, by_distance = (
        runs.teachers[world],
        sorted(runs.of(world), key=lambda a: runs.mean(world, a, distance).value),
    )
    curves = [run["curve"] for arm in runs.of(world) for run in runs.arms[world, arm]]
    return {
        "name": world,
        "teacher": teacher,
        "scale": best(teacher["curve"]),
        "curve": [(w, f"{s['distance']:.3f}", f"{100 * s['accuracy']:.1f}%") for w, s in teacher["curve"].items()],
        "right": max(float(curve[best(curve)]["accuracy"]) for curve in curves),
        "quality": [quality_row(runs, world, arm) for arm in by_distance],
        # a student that takes the guidance scale itself has no branches
        "branches": [branch_row(runs, world, arm) for arm in by_distance if "noised" in runs.arms[world, arm][0]],
        "factorial": factorial_section(runs, world),
    }


def short(runs: Runs, world: str, arm: str, measure: Measure) -> str:
    found = runs.mean(world, arm, measure)
    return f"{found.value:.3g} ± {found.high - found.value:.2g}"


def quality_row(runs: Runs, world: str, arm: str) -> list[str]:
    def at(w: str, key: str) -> str:
        if w not in runs.arms[world, arm][0]["curve"]:
            return "-"
        return short(runs, world, arm, lambda run: run["curve"][w][key])

    def right(run: Record) -> float:
        return 100 * float(run["curve"][best(run["curve"])]["accuracy"])

    distances = [short(runs, world, arm, distance), *(at(w, "distance") for w in ("1.0", "1.5", "2.0"))]
    cost = f"{runs.cost(world, arm) / 1000:,.0f}"
    return [arm, *distances, short(runs, world, arm, right), at("1.5", "drift"), cost]


def branch_row(runs: Runs, world: str, arm: str) -> list[str]:
    def pooled(key: str) -> str:
        return short(runs, world, arm, lambda run: run["noised"]["pooled"][key])

    verdicts = sorted({run["noised"]["verdict"] for run in runs.arms[world, arm]})
    return [
        arm, pooled("rho"), short(runs, world, arm, worst_rho), pooled("weighted_cosine"), pooled("gap_mse"),
        pooled("e_c"), pooled("e_u"), short(runs, world, arm, guided_error),
        short(runs, world, arm, lambda run: guided_error(run, "path")), ", ".join(verdicts),
    ]  # fmt: skip


def factorial_section(runs: Runs, world: str) -> list[Record]:
    """Shares of the gain by part; no rows where there is no gain to share, nothing where arms are missing."""
    sections = []
    for name, measure in (("G(2)", guided_error), ("distance at the best scale", distance)):
        for tirt, parts in ((None, PARTS), (0, (PARTS[0], PARTS[2]))):
            made = factorial(runs, world, measure, tirt)
            if made is None:
                return []
            rows = []
            for i, part in enumerate(parts if made["measurable"] else ()):
                cells = []
                for key in ("shapley", "left out"):
                    share = torch.tensor([one[key][i] / one["gain"][0] for one in made["seeds"]]).mean()
                    cells += [mean([one[key][i] for one in made["seeds"]], SINGLE).short(), f"{100 * share:.0f}%"]
                rows.append((part, *cells))
            ends = [{"arm": arm, "value": runs.mean(world, arm, measure).short()} for arm in made["ends"]]
            sections.append({"measure": name, "tirt": tirt is None, "ends": ends, "rows": rows})
    return sections


DRAWN = ("conditional", MATCHED, FAIR, "dash", "gap", "multi-w", "ours")


def figure(runs: Runs, world: str) -> Figure:
    """Distance and accuracy against the scale, size of the gap by time, distance against cost."""
    drawn = Figure(figsize=(17, 4.2), layout="constrained")
    axes = drawn.subplots(1, 4)
    arms = [arm for arm in DRAWN if (world, arm) in runs.arms]
    for i, arm in enumerate(["teacher", *arms]):
        some = [runs.teachers[world]] if arm == "teacher" else runs.arms[world, arm]
        scales = list(some[0]["curve"])
        colour = "black" if arm == "teacher" else f"C{i - 1}"
        for axis, key in zip(axes[:2], ("distance", "accuracy"), strict=True):
            means = [sum(run["curve"][w][key] for run in some) / len(some) for w in scales]
            axis.plot([float(w) for w in scales], means, "o-", ms=3, color=colour, label=arm)
        if arm != "teacher":
            bins = [b for b in some[0]["noised"]["bins"] if b["share"] > 0.01]
            at = [(b["t_low"] + b["t_high"]) / 2 for b in bins]
            axes[2].plot(at, [b["rho"] for b in bins], "o-", ms=3, color=colour)
    named = [arm for arm in ("scratch", "conditional", MATCHED, FAIR, COPIED, PUBLISHED) if (world, arm) in runs.arms]
    least = min(distance(run) for arm in runs.of(world) for run in runs.arms[world, arm])
    for arm in runs.of(world):
        costs = [runs.cost(world, arm)] * len(runs.arms[world, arm])
        values = [distance(run) for run in runs.arms[world, arm]]
        if min(values) > 50 * least:  # gap alone, which would squeeze all others into a corner
            continue
        mine, known = arm in runs.ours(world), arm in named
        style = {"color": "C6" if mine else f"C{named.index(arm)}" if known else "0.8", "zorder": 1 + mine + known}
        label = "ours, all budgets" if arm == "ours" else arm if known else None
        axes[3].plot(costs, values, "o" if mine else "x", ms=5, label=label, **style)
    axes[3].legend(fontsize=6)
    axes[0].set(yscale="log", xlabel="guidance scale", ylabel="Frechet distance to data")
    axes[1].set(xlabel="guidance scale", ylabel="share of classes right")
    axes[2].axhspan(0.9, 1.1, color="0.9")
    axes[2].set(xlabel="t", ylabel="rho: gap over the teacher's (seed 0)", yscale="log")
    axes[3].set(xscale="log", yscale="log", xlabel="cost, student forwards", ylabel="distance at best scale")
    axes[0].legend(fontsize=6)
    return drawn
