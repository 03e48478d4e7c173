"""results/erase/summary.json, its plots and its README, made from the runs and from nothing else.

In: runs/*.json. Out: claims with intervals and verdicts, tables, the Pareto plot, the cost plot.
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
from fieldsmith.metrics.intervals import Interval, mean_interval, wilson
from fieldsmith.run import write_atomically

ORDER = (
    "gem", "gem+margin", "gem+retain", "gem+margin+retain", "esd", "concept-ablation", "eraseflow", "eraseanything",
    "uce", "projection",
)  # fmt: skip
GEMS = ("gem", "gem+margin+retain")
CONCEPTS = ("triangle", "red", "red triangle")
PAPER = "GEM, arXiv 2606.00140"
claim = partial(entry, PAPER)


class Runs:
    """The final runs by arm and concept, the sweep's by arm."""

    def __init__(self, folder: Path, seeds: Sequence[int]):
        self.finals: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.sweeps: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((folder / "runs").glob("*.json")):
            record = json.loads(path.read_text())
            if "_sweep-" in path.stem:
                self.sweeps.setdefault(record["arm"], []).append(record)
            elif record["seed"] in seeds:
                self.finals.setdefault((record["arm"], record["concept"]), []).append(record)
        # an arm counts for a concept once all its seeds are there
        self.finals = {key: records for key, records in self.finals.items() if len(records) == len(seeds)}
        self.arms = sorted({arm for arm, _ in self.finals}, key=ORDER.index)
        self.concepts = [c for c in CONCEPTS if all((arm, c) in self.finals for arm in GEMS)]

    def share(self, arm: str, concept: str, name: str) -> Interval:
        """A share pooled over the seeds' images, Wilson."""
        numbers = [run["evaluation"][name] for run in self.finals[arm, concept]]
        return wilson(sum(round(x["value"] * x["n"]) for x in numbers), sum(x["n"] for x in numbers))

    def mean(self, arm: str, concept: str, name: str) -> Interval:
        """A mean over the seeds; the wider of Student's t over them and of the seeds' own paired intervals combined.

        Three seeds that happen to agree would else claim a certainty that their images do not give.
        """
        found = [run["evaluation"][name] for run in self.finals[arm, concept]]
        over_seeds = mean_interval(torch.tensor([x["value"] for x in found]))
        half = math.sqrt(sum(((x["high"] - x["low"]) / 2) ** 2 for x in found)) / len(found)
        half = max(half, over_seeds.high - over_seeds.value)
        return Interval(over_seeds.value, over_seeds.value - half, over_seeds.value + half, len(found))

    def spent(self, arm: str) -> float:
        """Mean forward-equivalents of the arm's triangle runs."""
        records = self.finals[arm, "triangle"]
        return sum(run["forward_equivalents"] for run in records) / len(records)

    def attack(self, arm: str, name: str) -> Interval:
        numbers = [run["attacks"][name] for run in self.finals[arm, "triangle"]]
        return wilson(sum(round(x["value"] * x["n"]) for x in numbers), sum(x["n"] for x in numbers))

    def headline(self) -> str:
        """The GEM arm that its sweep chose: the better composite of the two arms' chosen settings."""
        return max(
            (arm for arm in GEMS if arm in self.sweeps), key=lambda arm: max(_composite(r) for r in self.sweeps[arm])
        )


def _composite(run: dict[str, Any]) -> float:
    return float(run["evaluation"]["composite (ours)"])


def choice(sweep: list[dict[str, Any]]) -> dict[str, Any]:
    """The cheapest run of a sweep whose composite is within 0.01 (about one image of its evaluation) of the best."""
    best = max(_composite(run) for run in sweep)
    return min((r for r in sweep if _composite(r) >= best - 0.01), key=lambda r: r["forward_equivalents"])


def said(setting: dict[str, float]) -> str:
    """A setting in words."""
    return ", ".join(f"{key} {value:g}" for key, value in setting.items()) or "nothing to set"


def cost_to_erase(run: dict[str, Any]) -> tuple[float, bool]:
    """Forward-equivalents at the first probe with at most 5% detected, and whether it came; else all that was spent."""
    for point in run["trace"]:
        if point["detected"] <= 0.05:
            return float(point["forwards"]), True
    return float(run["forward_equivalents"]), False


def cost_ratio(runs: Runs, arm: str, headline: str) -> tuple[Interval, int, int]:
    """Geometric mean over concepts and seeds of the arm's cost over GEM's; how many runs of each never got there."""
    logs, missed, base_missed = [], 0, 0
    for concept in (c for c in runs.concepts if (arm, c) in runs.finals):
        for theirs, ours in zip(runs.finals[arm, concept], runs.finals[headline, concept], strict=True):
            (cost, reached), (base, got) = cost_to_erase(theirs), cost_to_erase(ours)
            missed += not reached
            base_missed += not got
            logs.append(math.log(cost / base))
    spread = mean_interval(torch.tensor(logs))
    return Interval(math.exp(spread.value), math.exp(spread.low), math.exp(spread.high), spread.n), missed, base_missed


def below(found: Interval, aim: float) -> str:
    """Reproduced where the whole interval meets the aim, partly where the value does."""
    return "reproduced" if found.high <= aim else "partly" if found.value <= aim else "not"


def claims(runs: Runs, seeds: Sequence[int], command: str) -> list[dict[str, Any]]:
    best = runs.headline()
    found = []
    labels = {"gem": "the paper's loss", "gem+margin+retain": "our margin and retained prompts"}
    other = next(arm for arm in GEMS if arm != best)
    for prefix, arm, label in (
        ("erase.", best, f"GEM at its chosen setting ({labels[best]})"),
        ("erase.other_loss.", other, f"GEM with {labels[other]}"),
    ):
        extra = {"seeds": list(seeds), "command": command, "forward_equivalents": runs.spent(arm)}
        gone = runs.share(arm, "triangle", "target detected")
        words = f"{label}: share of plain triangle prompts that still show one (aim: below 0.05)"
        found.append(claim(f"{prefix}target_detected", words, gone, "share", below(gone, 0.05), extra))
        for key, name in (
            ("unrelated_drop_points", "unrelated drop points"),
            ("invalid_rise_points", "invalid rise points"),
            ("neighbour_drop_points", "neighbours drop points"),
        ):
            change = runs.mean(arm, "triangle", name)
            words = f"{label}, triangle erased: {name} (aim: at most 2)"
            found.append(claim(prefix + key, words, change, "points", below(change, 2.0), extra))
        token = runs.attack(arm, "learned token")
        words = f"{label}: share of images that show a triangle after a learned-token attack (robust: below 0.05)"
        found.append(claim(f"{prefix}learned_token_attack", words, token, "share", below(token, 0.05), extra))
    for arm in ("esd", "eraseanything", "eraseflow", "concept-ablation"):
        extra = {"seeds": list(seeds), "command": command, "forward_equivalents": runs.spent(arm)}
        ratio, missed, base_missed = cost_ratio(runs, arm, best)
        note = f"; {missed} of its {ratio.n} runs never got there and count with all they spent" if missed else ""
        note += f"; {base_missed} of GEM's never did and count likewise" if base_missed else ""
        words = f"{arm}'s forward-equivalents to 95% erasure over GEM's ({labels[best]}; paper: 5x){note}"
        verdict = "reproduced" if ratio.low >= 5 else "partly" if ratio.low > 1 else "not"
        found.append(claim(f"erase.cost_ratio_{arm}", words, ratio, "ratio", verdict, extra))
    return found


def summarise(folder: Path, seeds: Sequence[int], command: str) -> None:
    """Write summary.json, the plots and README.md."""
    runs = Runs(folder, seeds)
    listed = claims(runs, seeds, command)
    chosen = {arm: choice(sweep)["setting"] for arm, sweep in runs.sweeps.items()}
    summary = {"claims": listed, "headline": runs.headline(), "chosen": chosen}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    pareto(runs, folder / "pareto.png")
    costs(runs, folder / "cost.png")
    write_atomically(folder / "README.md", readme(runs, listed, command))


def pareto(runs: Runs, path: Path) -> None:
    """Erasure against kept ability: every final run of every concept, the sweep's runs hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(runs.concepts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(runs.concepts), squeeze=False, sharey=True)[0]
    markers = "os^Dv<>P*X"
    for axis, concept in zip(axes, runs.concepts, strict=True):
        for i, arm in enumerate(runs.arms):
            style = {"color": f"C{i % 10}", "marker": markers[i % len(markers)], "linestyle": "none"}
            if concept == "triangle":
                axis.plot(*_points(runs.sweeps.get(arm, [])), fillstyle="none", alpha=0.5, **style)
            if (arm, concept) in runs.finals:
                axis.plot(*_points(runs.finals[arm, concept]), label=arm, **style)
        axis.set_title(f"erased: {concept}")
        axis.set_xlabel("erased (neither detected nor invalid), %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("unrelated prompts right, % of before")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _points(records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    e = [run["evaluation"] for run in records]
    x = [100 * (1 - run["target detected"]["value"] - run["target invalid"]["value"]) for run in e]
    y = [100 * run["unrelated right"]["value"] / run["unrelated right before"]["value"] for run in e]
    return x, y


def costs(runs: Runs, path: Path) -> None:
    """Detection against forward-equivalents, triangle, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
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
    figure.savefig(path, dpi=110)


def readme(runs: Runs, listed: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Erasure on zoo:shapes-flux",
        "",
        f"Made by `{command}` from the files in `runs/`; not written by hand.",
        "",
        "Every run trains until a probe of 32 plain target prompts shows the concept in none of them, or until",
        "25,000 forward-equivalents are spent. Each arm's setting is the cheapest within 0.01 of the best composite",
        "of a small sweep (last table), on triangle and a seed that no result uses. `gem` is the paper's loss;",
        "`+margin` and `+retain` are our options. All arms train the layers where text enters; the paper's own choice,",
        "q and k of the dual-stream blocks, is in the sweep only, where it broke the rest before it erased. Plain",
        "target prompts are also training prompts; paraphrases are not, and neither are the kept compositions.",
        "",
        "Shares pool the seeds' images (Wilson 95%); points are means over seeds, with the wider of Student's t and",
        "the paired interval. Invalid images count apart from erased ones. Seconds include the probes. The projection",
        "costs nothing to train, and two more forwards a pair at every sampler step (11 times the sampling, here).",
        "",
        "Known limits: the best learning rate of ESD, EraseFlow and concept ablation is the sweep's lowest, so lower",
        "ones may keep more; concept ablation's bank holds 4 images a pair at batch 1 (released: 1,000); EraseAnything",
        "runs without synonyms, and its keyword is the whole target prompt.",
        "",
        "![erasure against kept ability](pareto.png)",
        "",
        "![detection against cost](cost.png)",
        "",
        "## Claims",
        "",
        "| id | value [95%] | verdict | statement |",
        "|---|---|---|---|",
    ]
    for c in listed:
        number = f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}] {c['unit']}"
        lines.append(f"| {c['id']} | {number} | {c['verdict']} | {c['statement']} |")
    for concept in runs.concepts:
        before = runs.share(runs.arms[0], concept, "target detected before")
        right = runs.share(runs.arms[0], concept, "unrelated right before")
        lines += [
            "",
            f"## Erasing {concept}",
            "",
            f"Before: detected {before.short()}, unrelated prompts right {right.short()}.",
            "",
            "| arm | detected | target invalid | unrelated drop, points | neighbour drop, points | "
            "invalid rise, points | paraphrases detected | cost to 95%, thousand | seconds | "
            "Fréchet, 8x8 pixels, kept | composite (ours) |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(runs, arm, concept) for arm in runs.arms if (arm, concept) in runs.finals]
    lines += [
        "",
        "## Bringing the triangle back",
        "",
        "| arm | learned token | prompt embedding | relearning steps to 50% (at most 40) | detected at 4 / 8 / 14 / 50 "
        "sampler steps | detected at adapter scale 0.5 / 0.75 / 1.25 / 1.5 |",
        "|---|---|---|---|---|---|",
    ]
    for arm in runs.arms:
        if all("attacks" in run for run in runs.finals[arm, "triangle"]):
            lines.append(_attack_row(runs, arm))
    lines += [
        "",
        "## The sweep: triangle, a seed of its own",
        "",
        "| arm | setting | detected | invalid | unrelated right | neighbours right | ",
    ]
    lines[-1] += "composite (ours) | thousand forward-equivalents | chosen |"
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for arm, records in runs.sweeps.items():
        for run in records:
            names = ("target detected", "target invalid", "unrelated right", "neighbours right")
            shares = [f"{100 * run['evaluation'][name]['value']:.0f}%" for name in names]
            cost, mark = f"{run['forward_equivalents'] / 1000:.1f}", "yes" if run is choice(records) else ""
            lines.append(
                f"| {' | '.join([arm, said(run['setting']), *shares, f'{_composite(run):.3f}', cost, mark])} |"
            )
    return "\n".join(lines) + "\n"


def _row(runs: Runs, arm: str, concept: str) -> str:
    records = runs.finals[arm, concept]
    costs = [cost_to_erase(run) for run in records]
    cost = f"{sum(c for c, _ in costs) / len(costs) / 1000:.1f}"
    missed = sum(not reached for _, reached in costs) if records[0]["steps"] else 0
    words = [run["paraphrases"] for run in records]
    reworded = wilson(sum(round(w["value"] * w["n"]) for w in words), sum(w["n"] for w in words))
    distance = [run["evaluation"]["distances"]["frechet, 8x8 pixels, kept prompts"] for run in records]
    cells = [
        arm,
        runs.share(arm, concept, "target detected").short(),
        runs.share(arm, concept, "target invalid").short(),
        *(
            _plain(runs.mean(arm, concept, name))
            for name in ("unrelated drop points", "neighbours drop points", "invalid rise points")
        ),
        reworded.short(),
        cost + (f" ({missed} of {len(records)} never)" if missed else ""),
        f"{sum(run['seconds'] for run in records) / len(records):.0f}",
        f"{sum(distance) / len(distance):.3f}",
        f"{sum(map(_composite, records)) / len(records):.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _attack_row(runs: Runs, arm: str) -> str:
    attacks = [run["attacks"] for run in runs.finals[arm, "triangle"]]
    steps = [a.get("relearning steps") for a in attacks]
    few = [sum(a["detected by sampler steps"][k] for a in attacks) / len(attacks) for k in ("4", "8", "14", "50")]
    cells = [
        arm,
        runs.attack(arm, "learned token").short(),
        runs.attack(arm, "prompt embedding").short(),
        ", ".join("-" if s is None else "never" if s >= 40 else str(s) for s in steps),
        " / ".join(f"{100 * x:.0f}%" for x in few),
    ]
    scales = [a.get("detected by adapter scale") for a in attacks]
    if all(scales):
        mean = [sum(s[k] for s in scales if s) / len(scales) for k in ("0.5", "0.75", "1.25", "1.5")]
        cells.append(" / ".join(f"{100 * x:.0f}%" for x in mean))
    else:
        cells.append("no adapter")
    return "| " + " | ".join(cells) + " |"


def _plain(interval: Interval) -> str:
    return f"{interval.value:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
