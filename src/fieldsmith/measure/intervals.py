"""Numbers that say how far they can be trusted: every rate, mean or difference comes as an Interval.

In: counts, verdicts (n,) bool, values (n,). Out: Interval(value, low, high, n). One value alone has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A number with a confidence interval, from n draws.

    Unit '%' holds a share in [0, 1] and shows it in percent; 'points' holds percentage points; '' is a plain number.
    One draw has no interval: low and high are NaN then, so that every comparison with them is false.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.short()}, n={self.n}"

    def short(self) -> str:
        """The same without n: '12.3% [9.1, 16.2]', or '12.3%' where there is no interval."""
        if self.unit == "%":
            return f"{100 * self.value:.1f}%{self.bounds('.1f', 100)}"
        form = "+.1f" if self.unit == "points" else ".3g"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.value:{form}}{unit}{self.bounds(form)}"

    def bounds(self, form: str, scale: float = 1) -> str:
        """' [low, high]' in a number format, with the space before it; '' where there is no interval."""
        if math.isnan(self.low):
            return ""
        return f" [{scale * self.low:{form}}, {scale * self.high:{form}}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        """Its fields, with None for a low and high that do not exist: NaN is no JSON."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def interval_of(value: float, low: float, high: float, n: int, unit: str = "") -> Interval:
    """The Interval, without low and high where one draw cannot give them."""
    return Interval(value, low, high, n, unit) if n > 1 else Interval(value, math.nan, math.nan, n, unit)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The share successes / n with Wilson's score interval, unit '%'. Raises ValueError at n=0 or impossible counts.

    scipy's binomtest gives the same but for the last digit, which the recorded results hold; so it is written out.
    """
    if n < 1:
        raise ValueError(f"n={n}: a share needs at least 1 trial")
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}: must lie between 0 and n")
    z, p = _normal_quantile(level), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # at the ends one limit is 0 or 1 exactly; rounding must not push it past the value
    return interval_of(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n, "%")


def share(verdicts: Tensor, level: float = 0.95) -> Interval:
    """The share of true among verdicts (n,) bool, by Wilson."""
    return wilson(int(_checked_verdicts(verdicts).sum()), len(verdicts), level)


def bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor | float],
    generator: torch.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of statistic(values), values (n, ...) resampled along the first dimension.

    Too narrow below about 20 values; for a mean over a handful of seeds use `mean_interval`. Not scipy.stats.bootstrap,
    which draws its rows from numpy: the recorded results rest on these draws. Raises ValueError at n = 0.
    """

    def one(some: Tensor) -> Tensor:
        return torch.tensor([float(statistic(some))], dtype=torch.float64)

    return bootstraps(values, one, generator, draws, level)[0]


def bootstraps(
    values: Tensor,
    statistics: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> tuple[Interval, ...]:
    """`bootstrap` of several statistics (k,) at once, from the same resampled rows."""
    n = _at_least_one(values)
    rows = torch.randint(n, (draws, n), generator=generator).to(values.device)
    drawn = torch.stack([statistics(values[row]).double() for row in rows])
    return tuple(percentile_interval(float(v), drawn[:, k], n, level) for k, v in enumerate(statistics(values)))


def percentile_interval(value: float, drawn: Tensor, n: int, level: float = 0.95) -> Interval:
    """A value beside the central `level` of numbers drawn like it, (draws,)."""
    _checked_level(level)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn.detach().cpu().double(), ends).tolist()
    return interval_of(value, low, high, n)


def mean_interval(values: Tensor, level: float = 0.95, unit: str = "") -> Interval:
    """Student's t interval of the mean of values (n,), such as one number a seed. Raises ValueError at n = 0."""
    n = _at_least_one(values)
    values = values.detach().cpu().double()
    mean = float(values.mean())
    spread = float(values.std()) if n > 1 else math.nan
    half = float(stdtrit(max(1, n - 1), (1 + _checked_level(level)) / 2)) * spread / math.sqrt(n)
    return interval_of(mean, mean - half, mean + half, n, unit)


def paired_difference(before: Tensor, after: Tensor, level: float = 0.95) -> Interval:
    """after - before in percentage points for verdicts (n,) bool of the same seeds: row i of both is seed i.

    Bonett and Price's interval (2012): the normal formula for paired shares with one imagined discordant pair each
    way, so that it keeps its width where no pair disagrees. Raises ValueError at n=0 or unequal lengths.
    """
    before, after = _checked_verdicts(before), _checked_verdicts(after)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} verdicts before and {len(after)} after; pairs need equal seeds, in order")
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = p_gained - p_lost
    half = _normal_quantile(level) * math.sqrt((p_gained + p_lost - centre**2) / (n + 2))
    value = (gained - lost) / n
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return interval_of(100 * value, 100 * min(low, value), 100 * max(high, value), n, "points")


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a confidence level lies between 0 and 1, such as 0.95")
    return level


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + _checked_level(level)) / 2)


def _at_least_one(values: Tensor) -> int:
    if not len(values):
        raise ValueError("n=0: a mean needs at least 1 value")
    return len(values)


def _checked_verdicts(verdicts: Tensor) -> Tensor:
    if verdicts.dtype != torch.bool or verdicts.ndim != 1:
        raise ValueError(f"verdicts are {verdicts.dtype} of shape {tuple(verdicts.shape)}; expected bool of shape (n,)")
    if not len(verdicts):
        raise ValueError("n=0: a share needs at least 1 verdict")
    return verdicts
