"""results/edit: summary.json, README.md and the plots, from the runs alone.

Differences are of percentage points, mean over seeds whose arms share held-out sessions and noise, with Student's t.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.claims import entry, opening, table
from fieldsmith.metrics.intervals import Interval, mean_interval
from fieldsmith.run import write_atomically

PAPER = "MT-EditFlow, arXiv 2606.01985"
claim = partial(entry, PAPER)
Record = dict[str, Any]
TURN = 2  # the third
BASE, PAPERS, CLEAN, LOCAL = "base", "NFT, broadcast", "NFT, clean sources", "NFT, turn-local"
GRPO, SUMMED = "GRPO, broadcast", "NFT, rewards summed"
STEEP, STEEP_SUMMED = "NFT, consistency 0-10", "NFT, consistency 0-10, rewards summed"
PLANNED = (BASE, "supervised, clean", CLEAN)  # arms that train on planned images, or not at all
MAIN, SHORT = "long", "short"
WORDS = {
    MAIN: "Most turns refer to what an earlier one made (dependency 0.7)",
    SHORT: "Ablations: the same, a third of the cost",
    "independent": "No turn refers to an earlier one (dependency 0), the negative control; a third of the cost",
}


class Runs:
    """Every run, by arm and setting, seeds in order."""

    def __init__(self, files: Sequence[Path]):
        self.arms: dict[tuple[str, str], list[Record]] = {}
        for path in files:
            run = json.loads(path.read_text())
            self.arms.setdefault((run["arm"], run["setting"]), []).append(run)

    def of(self, setting: str) -> list[str]:
        return [arm for arm, one in self.arms if one == setting]

    def difference(self, key: str, arm: str, against: str, turn: int = TURN, setting: str = MAIN) -> Interval:
        """Of percentage points at a turn, paired by seed."""
        pairs = zip(self.arms[arm, setting], self.held_against(against, setting), strict=True)
        return mean_interval(torch.tensor([100 * (a[key][turn] - b[key][turn]) for a, b in pairs], dtype=torch.float64))

    def held_against(self, arm: str, setting: str) -> list[Record]:
        """An arm's runs; the base, which nothing trains, is the same in both settings of dependency 0.7."""
        return self.arms[arm, MAIN if arm == BASE and setting == SHORT else setting]

    def ratio(self, value: Callable[[Record], float], arm: str, against: str, setting: str = MAIN) -> Interval:
        """Of a number of each run, mean over paired seeds."""
        pairs = zip(self.arms[arm, setting], self.arms[against, setting], strict=True)
        return mean_interval(torch.tensor([value(a) / value(b) for a, b in pairs], dtype=torch.float64))

    def best(self) -> str:
        """The trained arm with own sources of the highest mean overall score at turn 3: no control."""
        arms = [arm for arm in self.of(MAIN) if arm not in PLANNED]
        return max(arms, key=lambda arm: self.difference("overall", arm, BASE).value)


def gap(run: Record) -> float:
    """The exposure gap, mean of turns 2 and 3."""
    return float(run["gap"][1] + run["gap"][TURN]) / 2


def summarise(
    files: Sequence[Path], folder: Path, seeds: Sequence[int], command: str, left: Sequence[str] = ()
) -> None:
    """Write summary.json, README.md and edit.png; `left` are arms that were not run to their end."""
    runs = Runs(files)
    listed = claims(runs, seeds, command)
    write_atomically(folder / "summary.json", json.dumps({"claims": listed, "best": runs.best()}, indent=1) + "\n")
    figures(runs, folder)
    write_atomically(folder / "README.md", readme(runs, listed, command, left))


def claims(runs: Runs, seeds: Sequence[int], command: str) -> list[dict[str, Any]]:
    best = runs.best()
    cost = sum(
        run["training"]["forward_equivalents"] for found in runs.arms.values() for run in found if "training" in run
    )
    extra = {"seeds": list(seeds), "command": command, "forward_equivalents": cost}
    gain = runs.difference("overall", best, BASE)
    control = runs.difference("overall", best, CLEAN)
    first = runs.difference("following", best, BASE, 0)
    closed = runs.ratio(gap, best, BASE)
    local = runs.difference("overall", PAPERS, LOCAL)
    fused = runs.difference("overall", STEEP, STEEP_SUMMED, setting=SHORT)
    plain = runs.difference("overall", PAPERS, SUMMED, setting=SHORT)
    found = [
        claim(
            "edit.turn3_overall_gain_points",
            f"'{best}', best of the arms on own sources, less the base: overall, turn 3",
            gain,
            "points",
            "reproduced" if gain.low >= 7 else "partly" if gain.low > 0 else "not",
            extra,
        ),
        claim(
            "edit.exposure_gap_ratio",
            f"exposure gap (turns 2 and 3) of '{best}' over the base's",
            closed,
            "ratio",
            "reproduced" if closed.high <= 0.5 else "partly" if closed.value <= 0.5 else "not",
            extra,
        ),
        claim(
            "edit.turn1_change_points",
            f"'{best}' less the base: turn 1 done",
            first,
            "points",
            "reproduced" if first.low >= -1 else "partly" if first.value >= -1 else "not",
            extra,
        ),
        claim(
            "edit.gain_over_clean_control_points",
            f"'{best}' less RL on clean sources at equal cost: overall at turn 3",
            control,
            "points",
            "reproduced" if control.low > 0 else "partly" if control.value > 0 else "not",
            extra,
        ),
        claim(
            "edit.broadcast_vs_turn_local_points",
            "broadcast less turn-local credit, NFT: overall at turn 3",
            local,
            "points",
            "reproduced" if local.low > 0 else "not",
            extra,
        ),
        claim(
            "edit.advantage_vs_reward_fusion_points",
            "advantage-level less reward-level fusion where consistency is judged from 0 to 10 and steeply: overall at "
            f"turn 3; with scores of like size: {plain.value:+.1f} [{plain.low:+.1f}, {plain.high:+.1f}]",
            fused,
            "points",
            "reproduced" if fused.low > 0 else "not",
            extra,
        ),
    ]
    gains = [
        [
            a["overall"][TURN] - b["overall"][TURN]
            for a, b in zip(runs.arms[arm, MAIN], runs.arms[BASE, MAIN], strict=True)
        ]
        for arm in (GRPO, PAPERS)
    ]
    if min(gains[1]) > 0.01:
        each = [slow / fast for slow, fast in zip(*gains, strict=True)]
        words = "what a point of overall at turn 3 costs NFT over what it costs GRPO, at equal forward-equivalents"
    else:  # hardly any gain to divide by
        each = [
            nft["history"][0]["forwards"] / grpo["history"][0]["forwards"]
            for nft, grpo in zip(runs.arms[PAPERS, MAIN], runs.arms[GRPO, MAIN], strict=True)
        ]
        words = "forwards of a collection, NFT over GRPO; NFT's gain is too small to ask what a point costs"
    ratio = mean_interval(torch.tensor(each, dtype=torch.float64))
    verdict = "reproduced" if ratio.high < 1 else "partly" if ratio.value < 1 else "not"
    found.append(claim("edit.nft_vs_grpo_cost_ratio", words, ratio, "ratio", verdict, extra))
    return found


def _cell(found: Interval) -> str:
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def _mean(found: Sequence[Record], key: str, turn: int) -> float:
    return 100 * sum(float(run[key][turn]) for run in found) / len(found)


def readme(runs: Runs, listed: Sequence[dict[str, Any]], command: str, left: Sequence[str] = ()) -> str:
    base = runs.arms[BASE, MAIN]
    turns = len(base[0]["following"])
    lines = opening("edit", listed, command)
    lines += [
        "## The base",
        "",
        f"zoo:scenes-kontext on {base[0]['sessions']} held-out sessions, dependency 0.7; percent, turns 1 to {turns}.",
        "",
        *table(
            ("measure", *(f"turn {t + 1}" for t in range(turns))),
            [
                (words, *(f"{_mean(base, key, t):.1f}" for t in range(turns)))
                for key, words in (
                    ("following", "all turns up to there done"),
                    ("marginal", "turn done"),
                    ("conditional", "turn done after all before"),
                    ("teacher_forced", "turn done on the planned source"),
                    ("gap", "exposure gap"),
                    ("consistency", "consistency with the first image"),
                    ("overall", "overall"),
                )
            ],
        ),
        "Teacher-forced, by what a turn asks: "
        + ", ".join(
            f"{name} {100 * sum(r['operations'][name] for r in base) / len(base):.0f}%"
            for name in base[0]["operations"]
        )
        + ".",
        "",
    ]
    for setting, words in WORDS.items():
        rows = []
        control = CLEAN if (CLEAN, setting) in runs.arms else PAPERS
        for arm in runs.of(setting):
            found = runs.arms[arm, setting]
            trained = "training" in found[0]
            rows.append(
                (
                    arm,
                    *(f"{_mean(found, 'overall', t):.1f}" for t in (0, 1, 2, turns - 1)),
                    _cell(runs.difference("overall", arm, BASE, setting=setting)) if trained else "",
                    _cell(runs.difference("overall", arm, control, setting=setting))
                    if trained and arm != control
                    else "",
                    f"{_mean(found, 'following', 0):.1f}",
                    f"{_mean(found, 'following', TURN):.1f}",
                    f"{_mean(found, 'consistency', TURN):.1f}",
                    f"{_mean(found, 'teacher_forced', TURN):.1f}",
                    f"{100 * sum(map(gap, found)) / len(found):.1f}",
                    f"{100 * sum(r['drift'][-1] for r in found) / len(found):.1f}",
                    f"{sum(r['training']['forward_equivalents'] for r in found) / len(found) / 1000:.0f}k"
                    if trained
                    else "",
                )
            )
        lines += [
            f"## {words}",
            "",
            "Percent, mean over seeds; differences of overall at turn 3 paired by seed, Student's t. IF: all turns up "
            "to there done. CC: consistency with the first image. Clean: turn 3 done on the planned source. Gap: "
            "exposure gap, mean of turns 2 and 3. Drift: lost consistency after 5 turns of 'change nothing'.",
            "",
            *table(
                (
                    "arm",
                    "O1",
                    "O2",
                    "O3",
                    f"O{turns}",
                    "O3 less base",
                    f"O3 less '{control}'",
                    "IF1",
                    "IF3",
                    "CC3",
                    "clean",
                    "gap",
                    "drift",
                    "forwards",
                ),
                rows,
            ),
        ]
    if left:
        lines += [f"Not run to their end, so not here: {', '.join(left)}.", ""]
    lines += ["![overall by turn, and drift](edit.png)", ""]
    return "\n".join(lines)


def figures(runs: Runs, folder: Path) -> None:
    """edit.png: overall and exposure gap by turn, drift, for the base and the arms that matter."""
    from matplotlib.figure import Figure

    shown = list(dict.fromkeys((BASE, "supervised, clean", CLEAN, LOCAL, PAPERS, GRPO, "identity alone", runs.best())))
    drawn = Figure(figsize=(13, 3.8), layout="constrained")
    axes = drawn.subplots(1, 3)
    for i, arm in enumerate(name for name in shown if (name, MAIN) in runs.arms):
        found = runs.arms[arm, MAIN]
        for axis, key, title in zip(
            axes,
            ("overall", "gap", "drift"),
            ("overall, %", "exposure gap, points", "drift when nothing is asked, %"),
            strict=True,
        ):
            x = list(range(1, len(found[0][key]) + 1))
            style = {"color": "k", "lw": 2} if arm == BASE else {"color": f"C{i}", "lw": 1.3}
            axis.plot(x, [_mean(found, key, t - 1) for t in x], "o-", ms=3, label=arm, **style)
            axis.set(xlabel="turn", title=title, xticks=x)
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.savefig(folder / "edit.png", dpi=110)
