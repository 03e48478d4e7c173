"""results/distill/README.md: claims, every arm's row, the factorial, both worlds.

In: the runs of distill_summary. Out: Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from experiments.claims import opening, table
from experiments.distill_summary import (
    PARTS,
    Measure,
    Run,
    Runs,
    distance,
    factorial,
    guided_error,
    worst_rho,
)
from fieldsmith.diagnose.sweep import best
from fieldsmith.metrics.intervals import mean_interval

HEADERS = ("arm", "distance, best w", "w=1", "w=1.5", "w=2", "right, best w", "drift, w=1.5", "cost")
BRANCHES = ("arm", "rho", "worst rho", "cosine", "gap error", "E_c", "E_u", "G(2)", "G(2) on its path", "verdict")


def readme(runs: Runs, listed: list[dict[str, Any]], command: str) -> str:
    """All of it, in the order of the issue's claims."""
    lines = opening("distill", listed, command)
    for world in runs.worlds:
        lines += section(runs, world)
    return "\n".join(lines).rstrip() + "\n"


def section(runs: Runs, world: str) -> list[str]:
    teacher = runs.teachers[world]
    curve = teacher["curve"]
    at = curve[best(curve)]
    judged = f", {100 * at['judged right']:.1f}% by the world's own judge" if "judged right" in at else ""
    return [
        f"## {world}",
        "",
        f"The teacher has {teacher['parameters']:,} parameters. At its best scale (w = {best(curve)}) its distance is",
        f"{at['distance']:.3f} and the classifier names {100 * at['accuracy']:.1f}% of its images as asked{judged}:",
        "",
        *table(
            ("w", "distance", "right"),
            [(w, f"{s['distance']:.3f}", f"{100 * s['accuracy']:.1f}%") for w, s in teacher["curve"].items()],
        ),
        f"Distances are Frechet distances of {teacher['images']} images to all the data on 64 features of a classifier",
        f"trained on the data; as many real images are at {teacher['floor']:.3f}. Drift is the mean squared difference",
        "from the teacher's images at equal noise. Cost is in thousands of student forwards: ours with its cache of",
        "both branches, all others with the teacher asked at every step, as published, though they too read the cache,",
        "to save time. Arms that say nothing else train at equal student compute from fresh weights; ours and those of",
        "a copied start begin with a selection of the teacher's. Seeds share the cache and the noise of the images, so",
        "that intervals cover training alone.",
        "",
        *unreadable(runs, world),
        *table(HEADERS, [quality(runs, world, arm) for arm in by_distance(runs, world)]),
        "Branches against the teacher's on held-out noised data (G(2) on its guided path too); errors per pixel.",
        "",
        *table(BRANCHES, [branch_row(runs, world, arm) for arm in by_distance(runs, world, with_branches=True)]),
        f"![{world}]({world}.png)",
        "",
        *factorial_section(runs, world),
    ]  # fmt: skip


def unreadable(runs: Runs, world: str) -> list[str]:
    """A warning where not even the best student draws what is asked: then distances compare failures."""
    curves = [run["curve"] for arm in runs.of(world) for run in runs.arms[world, arm]]
    right = max(float(curve[best(curve)]["accuracy"]) for curve in curves)
    if right > 0.5:
        return []
    return [
        f"No student draws images that can be read here: at most {100 * right:.0f}% are as asked. So few updates do",
        "not do for this world: the distances compare failures and say nothing of the objectives, the errors of the",
        "branches below still do.",
        "",
    ]


def by_distance(runs: Runs, world: str, with_branches: bool = False) -> list[str]:
    """Arms, the best first; a student that takes the guidance scale itself has no branches."""
    some = [arm for arm in runs.of(world) if not with_branches or "noised" in runs.arms[world, arm][0]]
    return sorted(some, key=lambda arm: runs.mean(world, arm, distance).value)


def short(runs: Runs, world: str, arm: str, measure: Measure) -> str:
    found = runs.mean(world, arm, measure)
    return f"{found.value:.3g} ± {found.high - found.value:.2g}"


def quality(runs: Runs, world: str, arm: str) -> Sequence[str]:
    def at(w: str, key: str) -> str:
        if w not in runs.arms[world, arm][0]["curve"]:
            return "-"
        return short(runs, world, arm, lambda run: run["curve"][w][key])

    def right(run: Run) -> float:
        return 100 * float(run["curve"][best(run["curve"])]["accuracy"])

    cells = [at("1.0", "distance"), at("1.5", "distance"), at("2.0", "distance")]
    cost = f"{runs.cost(world, arm) / 1000:,.0f}"
    return (arm, short(runs, world, arm, distance), *cells, short(runs, world, arm, right), at("1.5", "drift"), cost)


def branch_row(runs: Runs, world: str, arm: str) -> Sequence[str]:
    def pooled(key: str) -> str:
        return short(runs, world, arm, lambda run: run["noised"]["pooled"][key])

    verdicts = sorted({run["noised"]["verdict"] for run in runs.arms[world, arm]})
    return (
        arm, pooled("rho"), short(runs, world, arm, worst_rho), pooled("weighted_cosine"), pooled("gap_mse"),
        pooled("e_c"), pooled("e_u"), short(runs, world, arm, guided_error),
        short(runs, world, arm, lambda run: guided_error(run, "path")), ", ".join(verdicts),
    )  # fmt: skip


def factorial_section(runs: Runs, world: str) -> list[str]:
    """Shares of the gain by part, printed only where there is a gain to share."""
    lines = ["### DASH's three parts", ""]
    for name, measure in (("G(2)", guided_error), ("distance at the best scale", distance)):
        for tirt, parts in ((None, PARTS), (0, (PARTS[0], PARTS[2]))):
            made = factorial(runs, world, measure, tirt)
            if made is None:
                return []
            off, full = (runs.mean(world, arm, measure) for arm in made["ends"])
            without = "" if tirt is None else ", without TIRT"
            lines += [f"{name}{without}: {made['ends'][0]} {off.short()}, {made['ends'][1]} {full.short()}.", ""]
            if not made["measurable"]:
                lines += ["No measurable gain: the difference is within three seed deviations, or a loss.", ""]
                continue
            rows = []
            for i, part in enumerate(parts):
                cells = []
                for key in ("shapley", "left out"):
                    numbers = torch.tensor([one[key][i] for one in made["seeds"]])
                    shares = torch.tensor([one[key][i] / one["gain"][0] for one in made["seeds"]])
                    cells += [mean_interval(numbers).short(), f"{100 * shares.mean():.0f}%"]
                rows.append((part, *cells))
            headers = ("part", "Shapley drop", "share of the gain", "rise when left out", "share of the gain")
            lines += table(headers, rows)
    return lines
