"""A judge measured against known truth, and judges simulated (MT-EditFlow: bias and variance of the reward).

In: truth (groups, items) in [0, 1] and a judge's repeated scores (repeats, groups, items). Out: `JudgeMeasures` with
confidence intervals, and which way of judging to use how often. What counts is the correlation with the truth WITHIN a
group: a group's advantage forgets all that its members share, so a bias that is constant there costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith.measure.intervals import Interval, percentile_interval, wilson

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
DONE = 0.5  # a score from here on says that the edit was done
MOST = 16  # replies averaged into a score
SMALL = 0.1  # noise variance left after averaging, over the variance of the truth within groups


@dataclass(frozen=True)
class JudgeMeasures:
    """What one reply of a judge is worth; intervals by a bootstrap over groups."""

    bias: Interval  # mean of score - truth
    bias_at: Mapping[float, Interval]  # the same by the level nearest to the truth, levels that occur
    variance: Interval  # between repeats of one edit's score, mean over edits
    correlation: Interval  # of single scores with the truth
    correlation_within: Interval  # the same of both less their group's mean
    slope_within: Interval  # score per truth within groups, by least squares
    truth_variance: float  # of the truth within groups
    false_done: Interval | None  # share of scores from 0.5 on where the truth is 0; None where it never is
    calls: float  # cost of one score

    def correlation_within_at(self, n: int) -> float:
        """The correlation within groups that the mean of n replies would have: noise variance / n, bias as it is."""
        explained = self.slope_within.value**2 * self.truth_variance
        if explained == 0 or self.correlation_within.value == 0:
            return 0.0
        single = explained / self.correlation_within.value**2
        averaged = max(single - self.variance.value * (1 - 1 / n), explained)  # noise is estimated, too
        return math.copysign(math.sqrt(explained / averaged), self.slope_within.value)

    def replies_needed(self) -> int:
        """Replies whose mean has noise variance under a tenth of the truth's within groups, from 1 to 16.

        The noise is taken on the truth's scale, variance / slope^2: a judge that says .5 f has half its resolution.
        """
        signal = self.slope_within.value**2 * self.truth_variance
        if signal == 0:
            return MOST if self.variance.value > 0 else 1
        return min(MOST, max(1, math.ceil(self.variance.value / (SMALL * signal) - 1e-9)))


@dataclass(frozen=True)
class Recommendation:
    mode: str
    n: int  # replies to average
    why: str


def measure_judge(
    truth: Tensor, scores: Tensor, generator: torch.Generator, calls: float = 1.0, draws: int = 2000
) -> JudgeMeasures:
    """A judge's scores (repeats, groups, items) against the truth (groups, items) in [0, 1].

    `calls` is the cost of one score. Correlation is 0 where the scores do not vary. Raises ValueError at other shapes,
    fewer than 2 repeats, groups or items, scores that are not finite, and truth that does not vary within any group.
    """
    truth, scores = truth.detach().cpu().double(), scores.detach().cpu().double()
    if truth.ndim != 2 or scores.shape[1:] != truth.shape or min(scores.shape) < 2:
        raise ValueError(
            f"scores {tuple(scores.shape)} for truth {tuple(truth.shape)}; expected (repeats, groups, items) and "
            "(groups, items), at least 2 of each"
        )
    if not (scores.isfinite().all() and ((truth >= 0) & (truth <= 1)).all()):
        raise ValueError("scores hold NaN or infinity, or truth lies outside [0, 1]")
    repeats, groups, items = scores.shape
    f, f_within = truth.expand_as(scores), (truth - truth.mean(1, keepdim=True)).expand_as(scores)
    s_within = scores - scores.mean(2, keepdim=True)
    if not f_within.abs().max() > 1e-12:
        raise ValueError(f"truth does not vary within any of {groups} groups; nothing can be ranked there")
    level = (f * (len(LEVELS) - 1)).round() / (len(LEVELS) - 1)
    at = {each: (level == each).double() for each in LEVELS if (level == each).any()}
    undone = (truth == 0).expand_as(scores).double()
    moments = {
        "1": torch.ones_like(scores), "s": scores, "f": f, "ss": scores**2, "ff": f**2, "sf": scores * f,
        "ss within": s_within**2, "ff within": f_within**2, "sf within": s_within * f_within,
        "noise": scores.var(0).expand_as(scores), "undone": undone, "false": undone * (scores >= DONE),
    } | {f"{what} {each}": chosen * part for each, chosen in at.items()
         for what, part in (("n", torch.ones_like(scores)), ("bias", scores - f))}  # fmt: skip
    # every statistic below is a function of sums over groups, so that a bootstrap draw is a row of counts of groups
    sums = torch.stack([part.sum((0, 2)) for part in moments.values()], 1)
    rows = torch.randint(groups, (draws, groups), generator=generator)
    counts = torch.zeros(draws, groups, dtype=torch.float64).scatter_add_(1, rows, torch.ones_like(rows).double())
    # the first row is the data themselves
    table = torch.cat([sums.sum(0, keepdim=True), counts @ sums])
    m = dict(zip(moments, table.unbind(1), strict=True))

    def interval(values: Tensor, n: int = groups) -> Interval:
        drawn = values[1:][values[1:].isfinite()]  # a draw may lack a level
        return percentile_interval(float(values[0]), drawn, n)

    def correlation(ss: Tensor, ff: Tensor, sf: Tensor) -> Tensor:
        varies = (ss > 1e-12) & (ff > 1e-12)
        return torch.where(varies, sf / (ss * ff).clamp(min=1e-24).sqrt(), 0.0).clamp(-1, 1)

    mean_s, mean_f = m["s"] / m["1"], m["f"] / m["1"]
    overall = [m["ss"] / m["1"] - mean_s**2, m["ff"] / m["1"] - mean_f**2, m["sf"] / m["1"] - mean_s * mean_f]
    degrees = repeats * groups * (items - 1)
    false_done, undone_edits = None, int((truth == 0).sum())
    if undone_edits:
        false_done = interval(m["false"] / m["undone"], undone_edits)
        if false_done.value in (0, 1):  # all draws agree, which is no certainty
            false_done = wilson(int(false_done.value) * undone_edits, undone_edits)
        false_done = replace(false_done, unit="%")
    within = [m[f"{what} within"] / degrees for what in ("ss", "ff", "sf")]
    return JudgeMeasures(
        bias=interval(mean_s - mean_f),
        bias_at={each: interval(m[f"bias {each}"] / m[f"n {each}"]) for each in at},
        variance=interval(m["noise"] / m["1"]),
        correlation=interval(correlation(*overall)),
        correlation_within=interval(correlation(*within)),
        slope_within=interval(within[2] / within[1]),
        truth_variance=float(within[1][0]),
        false_done=false_done,
        calls=calls,
    )


def recommend(measured: Mapping[str, JudgeMeasures], calls_per_edit: float) -> Recommendation:
    """The mode, of those measured, whose score correlates best with the truth within groups for the same calls an edit.

    Each mode gets as many replies as it needs (`replies_needed`) and the calls pay for; equal correlations go to the
    cheaper one. Raises ValueError where the calls pay for no mode, or none correlates.
    """
    affordable = {
        mode: min(measures.replies_needed(), int(calls_per_edit / measures.calls))
        for mode, measures in measured.items()
        if measures.calls <= calls_per_edit
    }
    if not affordable:
        costs = ", ".join(f"{mode} {measures.calls:g}" for mode, measures in measured.items()) or "none measured"
        raise ValueError(f"calls_per_edit={calls_per_edit:g} pays for no mode ({costs}); give more")
    reached = {mode: measured[mode].correlation_within_at(n) for mode, n in affordable.items()}
    cost = {mode: n * measured[mode].calls for mode, n in affordable.items()}
    best, *others = sorted(affordable, key=lambda mode: (-round(reached[mode], 6), cost[mode]))
    if reached[best] <= 0:
        raise ValueError(f"no mode of {', '.join(affordable)} ranks edits as the truth does; try another model")
    n, measures = affordable[best], measured[best]
    left = measures.variance.value / n / (measures.slope_within.value**2 * measures.truth_variance)
    than = ", ".join(f"{mode} {reached[mode]:.2f} with n={affordable[mode]}" for mode in others)
    why = (
        f"{best} with n={n} correlates {reached[best]:.2f} with the truth within groups"
        + (f" ({than})" if than else "")
        + f" for {cost[best]:g} of {calls_per_edit:g} calls an edit, and its noise is {100 * left:.0f}% of the "
        "variance that it ranks"
    )
    return Recommendation(best, n, why)
