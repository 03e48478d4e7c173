"""What the runs say: claims with intervals and verdicts, the rows of the page, overall by turn and drift.

Differences are of percentage points, mean over seeds whose arms share held-out sessions and noise, with Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from experiments.study import Claim, Record, Records, StudyConfig, Tables, average, mean, verdict
from fieldsmith.measure.intervals import Interval

TURN = 2  # the third
BASE, PAPERS, CLEAN, LOCAL = "base", "NFT, broadcast", "NFT, clean sources", "NFT, turn-local"
GRPO, SUMMED = "GRPO, broadcast", "NFT, rewards summed"
STEEP, STEEP_SUMMED = "NFT, consistency 0-10", "NFT, consistency 0-10, rewards summed"
PLANNED = (BASE, "supervised, clean", CLEAN)  # arms that train on planned images, or not at all
MAIN, SHORT, INDEPENDENT = "long", "short", "independent"
SHOWN = (BASE, "supervised, clean", CLEAN, LOCAL, PAPERS, GRPO, "identity alone")  # in the figure


class Runs:
    """Every run, by arm and setting, seeds in order."""

    def __init__(self, records: Records):
        self.arms: dict[tuple[str, str], list[Record]] = {}
        for run in records.values():
            self.arms.setdefault((run["arm"], run["setting"]), []).append(run)
        # the trained arm with own sources of the highest mean overall score at turn 3: no control
        own = [arm for arm in self.of(MAIN) if arm not in PLANNED]
        self.best = max(own, key=lambda arm: self.difference("overall", arm, BASE).value)

    def of(self, setting: str) -> list[str]:
        return [arm for arm, one in self.arms if one == setting]

    def difference(self, key: str, arm: str, against: str, turn: int = TURN, setting: str = MAIN) -> Interval:
        """Of percentage points at a turn, paired by seed; the base is the same in both settings of dependency 0.7."""
        others = self.arms[against, MAIN if against == BASE and setting == SHORT else setting]
        return mean(100 * (a[key][turn] - b[key][turn]) for a, b in zip(self.arms[arm, setting], others, strict=True))

    def ratio(self, value: Callable[[Record], float], arm: str, against: str) -> Interval:
        """Of a number of each run, mean over paired seeds."""
        return mean(value(a) / value(b) for a, b in zip(self.arms[arm, MAIN], self.arms[against, MAIN], strict=True))


def gap(run: Record) -> float:
    """The exposure gap, mean of turns 2 and 3."""
    return float(run["gap"][1] + run["gap"][TURN]) / 2


def claims(runs: Runs) -> list[Claim]:
    best = runs.best
    cost = sum(run["training"]["forward_equivalents"] for arm in runs.arms.values() for run in arm if "training" in run)
    gain = runs.difference("overall", best, BASE)
    control = runs.difference("overall", best, CLEAN)
    first = runs.difference("following", best, BASE, 0)
    closed = runs.ratio(gap, best, BASE)
    local = runs.difference("overall", PAPERS, LOCAL)
    fused = runs.difference("overall", STEEP, STEEP_SUMMED, setting=SHORT)
    like = runs.difference("overall", PAPERS, SUMMED, setting=SHORT)
    return [
        Claim("edit.turn3_overall_gain_points",
              f"'{best}', best of the arms on own sources, less the base: overall, turn 3",
              gain, "points", verdict(gain.low >= 7, gain.low > 0), cost),
        Claim("edit.exposure_gap_ratio", f"exposure gap (turns 2 and 3) of '{best}' over the base's",
              closed, "ratio", verdict(closed.high <= 0.5, closed.value <= 0.5), cost),
        Claim("edit.turn1_change_points", f"'{best}' less the base: turn 1 done",
              first, "points", verdict(first.low >= -1, first.value >= -1), cost),
        Claim("edit.gain_over_clean_control_points",
              f"'{best}' less RL on clean sources at equal cost: overall at turn 3",
              control, "points", verdict(control.low > 0, control.value > 0), cost),
        Claim("edit.broadcast_vs_turn_local_points", "broadcast less turn-local credit, NFT: overall at turn 3",
              local, "points", verdict(local.low > 0), cost),
        Claim("edit.advantage_vs_reward_fusion_points",
              "advantage-level less reward-level fusion where consistency is judged from 0 to 10 and steeply: overall "
              f"at turn 3; with scores of like size: {cell(like)}",
              fused, "points", verdict(fused.low > 0), cost),
        cost_claim(runs, cost),
    ]  # fmt: skip


def cost_claim(runs: Runs, cost: float) -> Claim:
    """NFT's cost over GRPO's: of a point of overall at turn 3 where NFT gains, else of a collection."""

    def gains(arm: str) -> list[float]:
        pairs = zip(runs.arms[arm, MAIN], runs.arms[BASE, MAIN], strict=True)
        return [a["overall"][TURN] - b["overall"][TURN] for a, b in pairs]

    if min(gains(PAPERS)) > 0.01:
        ratio = mean(slow / fast for slow, fast in zip(gains(GRPO), gains(PAPERS), strict=True))
        words = "what a point of overall at turn 3 costs NFT over what it costs GRPO, at equal forward-equivalents"
    else:  # hardly any gain to divide by
        ratio = runs.ratio(lambda run: float(run["history"][0]["forwards"]), PAPERS, GRPO)
        words = "forwards of a collection, NFT over GRPO; NFT's gain is too small to ask what a point costs"
    return Claim("edit.nft_vs_grpo_cost_ratio", words, ratio, "ratio", verdict(ratio.high < 1, ratio.value < 1), cost)


def tables(config: StudyConfig, records: Records) -> Tables:
    runs = Runs(records)
    base = runs.arms[BASE, MAIN]
    turns = len(base[0]["following"])
    keys = ("following", "marginal", "conditional", "teacher_forced", "gap", "consistency", "overall")
    page = {
        "turns": turns,
        "sessions": base[0]["sessions"],
        "base": {key: [f"{percent(base, key, turn):.1f}" for turn in range(turns)] for key in keys},
        "operations": {name: 100 * average(run["operations"][name] for run in base) for name in base[0]["operations"]},
        "settings": [section(runs, setting, turns) for setting in (MAIN, SHORT, INDEPENDENT)],
    }
    return Tables(claims(runs), {"best": runs.best}, page, {"edit.png": figure(runs)})


def section(runs: Runs, setting: str, turns: int) -> Record:
    control = CLEAN if (CLEAN, setting) in runs.arms else PAPERS
    rows = [arm_row(runs, arm, setting, control, turns) for arm in runs.of(setting)]
    return {"name": setting, "control": control, "rows": rows}


def arm_row(runs: Runs, arm: str, setting: str, control: str, turns: int) -> list[str]:
    some = runs.arms[arm, setting]
    trained = "training" in some[0]
    against = [BASE, control] if trained and arm != control else [BASE] if trained else []
    less = [cell(runs.difference("overall", arm, other, setting=setting)) for other in against]
    return [
        arm,
        *(f"{percent(some, 'overall', turn):.1f}" for turn in (0, 1, TURN, turns - 1)),
        *less, *[""] * (2 - len(less)),
        f"{percent(some, 'following', 0):.1f}",
        *(f"{percent(some, key, TURN):.1f}" for key in ("following", "consistency", "teacher_forced")),
        f"{100 * average(map(gap, some)):.1f}",
        f"{100 * average(run['drift'][-1] for run in some):.1f}",
        f"{average(run['training']['forward_equivalents'] for run in some) / 1000:.0f}k" if trained else "",
    ]  # fmt: skip


def cell(value: Interval) -> str:
    return f"{value.value:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"


def percent(some: Sequence[Record], key: str, turn: int) -> float:
    return 100 * sum(float(run[key][turn]) for run in some) / len(some)


def figure(runs: Runs) -> Figure:
    """Overall and exposure gap by turn, drift, for the base and the arms that matter."""
    drawn = Figure(figsize=(13, 3.8), layout="constrained")
    axes = drawn.subplots(1, 3)
    titles = {"overall": "overall, %", "gap": "exposure gap, points", "drift": "drift when nothing is asked, %"}
    shown = [arm for arm in dict.fromkeys((*SHOWN, runs.best)) if (arm, MAIN) in runs.arms]
    for i, arm in enumerate(shown):
        some = runs.arms[arm, MAIN]
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            x = list(range(1, len(some[0][key]) + 1))
            style = {"color": "k", "lw": 2} if arm == BASE else {"color": f"C{i}", "lw": 1.3}
            axis.plot(x, [percent(some, key, t - 1) for t in x], "o-", ms=3, label=arm, **style)
            axis.set(xlabel="turn", title=title, xticks=x)
    axes[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn
