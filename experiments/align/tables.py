"""What the runs say: claims with intervals and verdicts, the rows of the page, the estimators, reward against cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.align.mixture import ceiling
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
from fieldsmith.measure.intervals import Interval

REDESIGNS = {
    "black-box": ("rsm-branch-sd35", "rsm-branch-sd15"),
    "differentiable": ("rsm-terminal-sd35", "rsm-terminal-sd15"),
}
TRAINED = {"black-box": "right", "differentiable": "classifier"}
PERFECT = {"right": 1.0, "classifier": 0.0}
STATED = 1 / 3  # the stated reward: this much of the way from the base's reward to a perfect one
LOW, HIGH = "low snr", "high snr"


def reward_of(point: dict[str, float], kind: str) -> float:
    """The trained reward in a probe."""
    return point[TRAINED[kind]]


class Runs:
    """Final runs by (kind, arm), sweeps by (kind, arm), the mixture's by recipe, the estimators' by seed."""

    def __init__(self, records: Records):
        self.finals: dict[tuple[str, str], list[Record]] = {}
        self.sweeps: dict[tuple[str, str], list[Record]] = {}
        self.mixture: dict[str, list[Record]] = {}
        self.estimators: list[Record] = []
        for name, record in sorted(records.items()):
            kind, arm, *_ = name.split("_")
            if kind == "estimators":
                self.estimators.append(record)
            elif kind == "mixture":
                self.mixture.setdefault(arm, []).append(record)
            else:
                table = self.sweeps if "_sweep-" in name else self.finals
                table.setdefault((kind, arm), []).append(record)

    def arms(self, kind: str) -> list[str]:
        return [arm for of, arm in self.finals if of == kind]

    def best_redesign(self, kind: str) -> str:
        """The redesign whose sweep ended with the higher reward: chosen without looking at any result."""
        ends = {
            arm: max(reward_of(run["trace"][-1], kind) for run in self.sweeps[kind, arm]) for arm in REDESIGNS[kind]
        }
        return max(ends, key=lambda arm: ends[arm])

    def of_mixture(self, recipe: str, sampler: str, key: str) -> Interval:
        return mean([float(run[sampler][key]) for run in self.mixture[recipe]], SINGLE)

    def best_recipe(self) -> str:
        """The recipe nearest to the optimum in KL, of those within 5% of its reward gain; SDE sampler."""
        gains = {name: self.of_mixture(name, "sde", "gain").value for name in self.mixture}
        near = [name for name, gain in gains.items() if abs(gain - 1) <= 0.05] or list(gains)
        return min(near, key=lambda name: self.of_mixture(name, "sde", "kl").value)

    def final(self, kind: str, arm: str, key: str) -> Interval:
        return mean([float(run["final"][key]) for run in self.finals[kind, arm]], SINGLE)

    def by_estimator(self, panel: str) -> dict[str, list[Record]]:
        """Estimator -> its rows by sample count, RMSE averaged over the seeds."""
        found: dict[str, list[Record]] = {}
        for rows in zip(*(record[panel] for record in self.estimators), strict=True):
            rmse = average(row["rmse"] for row in rows)
            found.setdefault(rows[0]["name"], []).append({**rows[0], "rmse": rmse})
        return found


def stated(run: Record) -> float:
    """The stated reward of a run: a third of the way from its own base to a perfect score."""
    name = TRAINED[run["kind"]]
    base = run["trace"][0][name]
    return float(base + STATED * (PERFECT[name] - base))


def cost_to_reach(run: Record) -> Reached:
    """Forward-equivalents where the probes first cross the stated reward (linear between probes), and whether they
    did; else all that was spent."""
    aim, earlier = stated(run), run["trace"][0]
    for point in run["trace"][1:]:
        now, before = reward_of(point, run["kind"]), reward_of(earlier, run["kind"])
        if now >= aim:
            share = (aim - before) / (now - before) if now > before else 1.0
            return earlier["forwards"] + share * (point["forwards"] - earlier["forwards"]), True
        earlier = point
    return float(run["trace"][-1]["forwards"]), False


def claims(runs: Runs) -> list[Claim]:
    best = runs.best_recipe()
    cost = average(run["forward_equivalents"] for run in runs.mixture[best])
    gain, kl = runs.of_mixture(best, "sde", "gain"), runs.of_mixture(best, "sde", "kl")
    bias, other = (
        mean([run["gaussian terminal"][on] for run in runs.estimators], SINGLE) for on in ("gaussian", "mixture")
    )
    recipe = f"{best} on the exact mixture, SDE sampler (the nearest recipe, chosen on these seeds):"
    terminal = "terminal gradient times J(t) over the exact guidance, minus 1, with exact posterior samples"
    made = [
        Claim("align.mixture_reward_ratio", f"{recipe} reward gain over the exact optimum's (aim: at least 0.95)",
              gain, "ratio", verdict(gain.low >= 0.95, gain.value >= 0.95), cost),
        Claim("align.mixture_kl", f"{recipe} KL to the exact optimum in cells of 0.5 (aim: at most 0.02)",
              kl, "nats", at_most(kl, 0.02), cost),
        Claim("align.gaussian_terminal_bias", f"{terminal}: a Gaussian reference", bias, "ratio",
              verdict(abs(bias.value) < 0.02), 0),
        Claim("align.gaussian_terminal_bias_mixture", f"{terminal}: the mixture (no claim)", other, "ratio", "not", 0),
    ]  # fmt: skip
    for kind in TRAINED:
        ours = runs.best_redesign(kind)
        for arm in (arm for arm in runs.arms(kind) if arm != ours):
            costs = ([cost_to_reach(run) for run in runs.finals[kind, one]] for one in (arm, ours))
            ratio, missing, ours_missed = cost_ratio(*costs, ours)
            words = f"{arm}'s forward-equivalents to the stated {TRAINED[kind]} over {ours}'s (paper: 5x){missing}"
            grade = verdict(ratio.low >= 5, ratio.low > 1)
            grade = "not" if ours_missed else grade  # the ratio is then only bounded from above
            cost = average(run["trace"][-1]["forwards"] for run in runs.finals[kind, arm])
            made.append(Claim(f"align.cost_ratio_{arm.replace('-', '_')}", words, ratio, "ratio", grade, cost))
    return made


def tables(config: StudyConfig, records: Records) -> Tables:
    runs = Runs(records)
    summary = {
        "best redesign": {kind: runs.best_redesign(kind) for kind in TRAINED},
        "best on the mixture": runs.best_recipe(),
        "chosen": {f"{kind} {arm}": finals[0]["setting"] for (kind, arm), finals in runs.finals.items()},
    }
    low = runs.by_estimator(LOW)
    counts = sorted({row["samples"] for rows in low.values() for row in rows if row["samples"]})
    page = {
        "counts": [str(n) for n in counts],
        "estimators": [estimator_row(runs, name, rows, counts) for name, rows in low.items()],
        "recipes": mixture_rows(runs),
        "ceilings": {f"{guidance} {gap}": ceiling(guidance, gap, seed=0)
                     for guidance, gap in (("current", 10), ("next", 10), ("next", 5))},
        "kinds": [zoo_section(runs, kind) for kind in TRAINED],
    }  # fmt: skip
    figures = {"estimators.png": estimator_figure(runs), **{f"{kind}.png": curves(runs, kind) for kind in TRAINED}}
    return Tables(claims(runs), summary, page, figures)


def estimator_row(runs: Runs, name: str, rows: list[Record], counts: list[int]) -> list[str]:
    high = runs.by_estimator(HIGH)
    cells = {row["samples"]: f"{row['rmse']:.3f}" for row in rows}
    late = f"{high[name][-1]['rmse']:.4f}" if name in high else ""
    return [name, *(cells.get(n, cells.get(0, "")) for n in counts), f"{rows[-1]['forwards']:,.0f}", late]


def mixture_rows(runs: Runs) -> list[list[str]]:
    """The recipe nearest to the optimum first."""
    rows = []
    for name in sorted(runs.mixture, key=lambda n: runs.of_mixture(n, "sde", "kl").value):
        some = runs.mixture[name]
        broke = sum(bool(run["broke"]) for run in some)
        if broke:  # its samples are as far away as numbers go
            rows.append([f"{name} ({broke} of {len(some)} runs broke)", *["-"] * 6])
            continue
        rows.append([
            name,
            runs.of_mixture(name, "sde", "gain").short(),
            runs.of_mixture(name, "sde", "kl").short(),
            ", ".join(f"{average(run['sde']['modes'][i] for run in some):.3f}" for i in range(3)),
            runs.of_mixture(name, "ode", "gain").short(),
            runs.of_mixture(name, "ode", "kl").short(),
            f"{average(run['forward_equivalents'] for run in some) / 1e6:.2f}",
        ])  # fmt: skip
    return rows


def zoo_section(runs: Runs, kind: str) -> Record:
    name, rows = TRAINED[kind], []
    for arm in sorted(runs.arms(kind), key=lambda a: -runs.final(kind, a, name).value):
        some = runs.finals[kind, arm]
        costs = [cost_to_reach(run) for run in some]
        reached = [cost for cost, got in costs if got]
        cost = f"{average(reached) / 1e3:.0f}k" if reached else "never"
        cost += f" ({len(reached)} of {len(costs)} runs)" if 0 < len(reached) < len(costs) else ""
        rows.append([
            arm + (" (broke)" if any(run["broke"] for run in some) else ""),
            *(runs.final(kind, arm, key).short() for key in ("right", "classifier", "classifier-heldout")),
            f"{100 * (1 - runs.final(kind, arm, 'valid').value):.1f}%",
            runs.final(kind, arm, "diversity").short(),
            runs.final(kind, arm, "kl").short(),
            cost,
            f"{average(run['seconds'] for run in some):.0f}",
            in_words(some[0]["setting"]),
        ])  # fmt: skip
    base = runs.finals[kind, runs.arms(kind)[0]]
    return {
        "name": kind,
        "reward": name,
        "before": {key: average(run["trace"][0][key] for run in base) for key in base[0]["trace"][0]},
        "stated": average(map(stated, base)),
        "best": runs.best_redesign(kind),
        "rows": rows,
    }


def estimator_figure(runs: Runs) -> Figure:
    """RMSE against samples, and against forwards, at low SNR."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("samples", "forwards"), strict=True):
        for i, (name, rows) in enumerate(runs.by_estimator(LOW).items()):
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
            if rows[0]["samples"]:
                axis.plot([row[key] for row in rows], [row["rmse"] for row in rows], "o", label=name, ms=3, **style)
            elif "identity" not in name:
                axis.axhline(rows[0]["rmse"], label=name, lw=1, **style)
        axis.set(xscale="log", yscale="log", xlabel=f"{key} a point")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("RMSE of the guidance, over points and seeds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def curves(runs: Runs, kind: str) -> Figure:
    """The trained reward against cost, KL and diversity; the held-out reward against the trained one."""
    name = TRAINED[kind]
    panels = (("forwards", name), ("kl", name), ("diversity", name), (name, "classifier-heldout"))
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (x, y) in zip(figure.subplots(1, 4), panels, strict=True):
        for i, arm in enumerate(runs.arms(kind)):
            for j, run in enumerate(runs.finals[kind, arm]):
                points = [point for point in run["trace"] if x != "kl" or point["kl"] > 0]
                label = arm if j == 0 and x == "forwards" else None
                axis.plot([p[x] for p in points], [p[y] for p in points], color=f"C{i}", lw=1, label=label)
        axis.set(xlabel="forward-equivalents" if x == "forwards" else x, ylabel=y)
        if x == "forwards":
            axis.set_xscale("symlog", linthresh=2000)
        elif x == "kl":
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure
