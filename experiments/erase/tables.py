"""What the runs say: claims with intervals and verdicts, the page's rows, erasure against kept ability and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.study import (
    SINGLE,
    Claim,
    Reached,
    Record,
    Records,
    StudyConfig,
    Tables,
    at_most,
    average,
    cost_ratio,
    in_words,
    mean,
    verdict,
)
from fieldsmith.measure.intervals import Interval, wilson

ORDER = (
    "gem", "gem+margin", "gem+retain", "gem+margin+retain", "esd", "concept-ablation", "eraseflow", "eraseanything",
    "uce", "projection",
)  # fmt: skip
GEMS = {"gem": "the paper's loss", "gem+margin+retain": "our margin and retained prompts"}
CONCEPTS = ("triangle", "red", "red triangle")
CHANGES = ("unrelated drop points", "neighbours drop points", "invalid rise points")
MARKERS = "os^Dv<>P*X"


class Runs:
    """The final runs by arm and concept, the sweep's by arm."""

    def __init__(self, records: Records):
        self.finals: dict[tuple[str, str], list[Record]] = {}
        self.sweeps: dict[str, list[Record]] = {}
        for name, record in sorted(records.items()):
            if "_sweep-" in name:
                self.sweeps.setdefault(record["arm"], []).append(record)
            else:
                self.finals.setdefault((record["arm"], record["concept"]), []).append(record)
        self.arms = sorted({arm for arm, _ in self.finals}, key=ORDER.index)
        self.concepts = [c for c in CONCEPTS if all((arm, c) in self.finals for arm in GEMS)]
        # the GEM arm that its sweep chose: the better composite of the two arms' chosen settings
        self.headline = max(
            (arm for arm in GEMS if arm in self.sweeps), key=lambda a: max(map(composite, self.sweeps[a]))
        )

    def share(self, arm: str, concept: str, name: str) -> Interval:
        """A share pooled over the seeds' images, Wilson."""
        return pooled([run["evaluation"][name] for run in self.finals[arm, concept]])

    def mean(self, arm: str, concept: str, name: str) -> Interval:
        """A mean over the seeds; the wider of Student's t over them and of the seeds' own paired intervals combined.

        Three seeds that happen to agree would else claim a certainty that their images do not give.
        """
        each = [run["evaluation"][name] for run in self.finals[arm, concept]]
        over_seeds = mean([x["value"] for x in each], SINGLE)
        half = math.sqrt(sum(((x["high"] - x["low"]) / 2) ** 2 for x in each)) / len(each)
        half = max(half, over_seeds.high - over_seeds.value)
        return Interval(over_seeds.value, over_seeds.value - half, over_seeds.value + half, len(each))

    def cost(self, arm: str) -> float:
        """Mean forward-equivalents of the arm's triangle runs."""
        return average(run["forward_equivalents"] for run in self.finals[arm, "triangle"])

    def attack(self, arm: str, name: str) -> Interval:
        return pooled([run["attacks"][name] for run in self.finals[arm, "triangle"]])


def pooled(shares: Sequence[Mapping[str, float]]) -> Interval:
    return wilson(sum(round(x["value"] * x["n"]) for x in shares), sum(int(x["n"]) for x in shares))


def composite(run: Record) -> float:
    return float(run["evaluation"]["composite (ours)"])


def choice(sweep: Sequence[Record]) -> Record:
    """The cheapest run of a sweep whose composite is within 0.01 (about one image of its evaluation) of the best."""
    best = max(map(composite, sweep))
    return min((run for run in sweep if composite(run) >= best - 0.01), key=lambda run: run["forward_equivalents"])


def cost_to_erase(run: Record) -> Reached:
    """Forward-equivalents at the first probe with at most 5% detected, and whether it came; else all that was spent."""
    for point in run["trace"]:
        if point["detected"] <= 0.05:
            return float(point["forwards"]), True
    return float(run["forward_equivalents"]), False


def claims(runs: Runs) -> list[Claim]:
    best = runs.headline
    other = next(arm for arm in GEMS if arm != best)
    made = []
    for prefix, arm, label in (
        ("erase.", best, f"GEM at its chosen setting ({GEMS[best]})"),
        ("erase.other_loss.", other, f"GEM with {GEMS[other]}"),
    ):
        gone, cost = runs.share(arm, "triangle", "target detected"), runs.cost(arm)
        words = f"{label}: share of plain triangle prompts that still show one (aim: below 0.05)"
        made.append(Claim(f"{prefix}target_detected", words, gone, "share", at_most(gone, 0.05), cost))
        for key, name in (
            ("unrelated_drop_points", "unrelated drop points"),
            ("invalid_rise_points", "invalid rise points"),
            ("neighbour_drop_points", "neighbours drop points"),
        ):
            change = runs.mean(arm, "triangle", name)
            words = f"{label}, triangle erased: {name} (aim: at most 2)"
            made.append(Claim(prefix + key, words, change, "points", at_most(change, 2.0), cost))
        token = runs.attack(arm, "learned token")
        words = f"{label}: share of images that show a triangle after a learned-token attack (robust: below 0.05)"
        made.append(Claim(f"{prefix}learned_token_attack", words, token, "share", at_most(token, 0.05), cost))
    for arm in ("esd", "eraseanything", "eraseflow", "concept-ablation"):
        both = [concept for concept in runs.concepts if (arm, concept) in runs.finals]
        costs = ([cost_to_erase(run) for c in both for run in runs.finals[one, c]] for one in (arm, best))
        ratio, missing, _ = cost_ratio(*costs, "GEM")
        words = f"{arm}'s forward-equivalents to 95% erasure over GEM's ({GEMS[best]}; paper: 5x){missing}"
        grade = verdict(ratio.low >= 5, ratio.low > 1)
        made.append(Claim(f"erase.cost_ratio_{arm}", words, ratio, "ratio", grade, runs.cost(arm)))
    return made


def tables(config: StudyConfig, records: Records) -> Tables:
    runs = Runs(records)
    summary = {
        "headline": runs.headline,
        "chosen": {arm: choice(sweep)["setting"] for arm, sweep in runs.sweeps.items()},
    }
    concepts = [
        {
            "name": concept,
            "detected": runs.share(runs.arms[0], concept, "target detected before").short(),
            "right": runs.share(runs.arms[0], concept, "unrelated right before").short(),
            "rows": [erasure_row(runs, arm, concept) for arm in runs.arms if (arm, concept) in runs.finals],
        }
        for concept in runs.concepts
    ]
    attacked = [arm for arm in runs.arms if all("attacks" in run for run in runs.finals[arm, "triangle"])]
    page = {
        "concepts": concepts,
        "attacks": [attack_row(runs, arm) for arm in attacked],
        "sweep": [sweep_row(arm, run, sweep) for arm, sweep in runs.sweeps.items() for run in sweep],
    }
    return Tables(claims(runs), summary, page, {"pareto.png": pareto(runs), "cost.png": costs(runs)})


def erasure_row(runs: Runs, arm: str, concept: str) -> list[str]:
    records = runs.finals[arm, concept]
    costs = [cost_to_erase(run) for run in records]
    missed = sum(not reached for _, reached in costs) if records[0]["steps"] else 0
    changes = [runs.mean(arm, concept, name) for name in CHANGES]
    return [
        arm,
        runs.share(arm, concept, "target detected").short(),
        runs.share(arm, concept, "target invalid").short(),
        *(f"{x.value:+.1f} [{x.low:+.1f}, {x.high:+.1f}]" for x in changes),
        pooled([run["paraphrases"] for run in records]).short(),
        f"{average(c for c, _ in costs) / 1000:.1f}" + (f" ({missed} of {len(records)} never)" if missed else ""),
        f"{average(run['seconds'] for run in records):.0f}",
        f"{average(run['evaluation']['distances']['frechet, 8x8 pixels, kept prompts'] for run in records):.3f}",
        f"{average(map(composite, records)):.3f}",
    ]


def attack_row(runs: Runs, arm: str) -> list[str]:
    attacks = [run["attacks"] for run in runs.finals[arm, "triangle"]]

    def detected(by: str, at: Sequence[str]) -> str:
        return " / ".join(f"{100 * average(attack[by][key] for attack in attacks):.0f}%" for key in at)

    steps = [attack.get("relearning steps") for attack in attacks]
    scaled = all(attack.get("detected by adapter scale") for attack in attacks)
    return [
        arm,
        runs.attack(arm, "learned token").short(),
        runs.attack(arm, "prompt embedding").short(),
        ", ".join("-" if s is None else "never" if s >= 40 else str(s) for s in steps),
        detected("detected by sampler steps", ("4", "8", "14", "50")),
        detected("detected by adapter scale", ("0.5", "0.75", "1.25", "1.5")) if scaled else "no adapter",
    ]


def sweep_row(arm: str, run: Record, sweep: Sequence[Record]) -> list[str]:
    names = ("target detected", "target invalid", "unrelated right", "neighbours right")
    shares = [f"{100 * run['evaluation'][name]['value']:.0f}%" for name in names]
    cost = f"{run['forward_equivalents'] / 1000:.1f}"
    setting = in_words(run["setting"]) or "nothing to set"
    return [arm, setting, *shares, f"{composite(run):.3f}", cost, "yes" if run is choice(sweep) else ""]


def pareto(runs: Runs) -> Figure:
    """Erasure against kept ability: every final run of every concept, the sweep's runs hollow."""
    figure = Figure(figsize=(4.2 * len(runs.concepts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(runs.concepts), squeeze=False, sharey=True)[0]
    for axis, concept in zip(axes, runs.concepts, strict=True):
        for i, arm in enumerate(runs.arms):
            style = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}
            if concept == "triangle":
                axis.plot(*_points(runs.sweeps.get(arm, [])), fillstyle="none", alpha=0.5, **style)
            if (arm, concept) in runs.finals:
                axis.plot(*_points(runs.finals[arm, concept]), label=arm, **style)
        axis.set_title(f"erased: {concept}")
        axis.set_xlabel("erased (neither detected nor invalid), %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("unrelated prompts right, % of before")
    axes[0].legend(fontsize=7)
    return figure


def _points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    e = [run["evaluation"] for run in records]
    x = [100 * (1 - run["target detected"]["value"] - run["target invalid"]["value"]) for run in e]
    y = [100 * run["unrelated right"]["value"] / run["unrelated right before"]["value"] for run in e]
    return x, y


def costs(runs: Runs) -> Figure:
    """Detection against forward-equivalents, triangle, mean over seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis: Axes = figure.subplots()
    for i, arm in enumerate(runs.arms):
        for k, run in enumerate(runs.finals[arm, "triangle"]):
            if len(run["trace"]) > 1:
                x = [p["forwards"] / 1000 for p in run["trace"]]
                y = [100 * p["detected"] for p in run["trace"]]
                axis.plot(x, y, color=f"C{i % 10}", alpha=0.8, label=arm if k == 0 else None)
    axis.axhline(5, color="0.5", linewidth=0.8)
    axis.set_xlabel("training cost, thousand forward-equivalents")
    axis.set_ylabel("triangle detected, % of probe")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return figure
