"""Side effects: what else changed. Images before and after a method ran, at equal seeds, on prompts it did not aim at.

In: images (n, 3, h, w) in [0, 1], their prompts, a feature extractor, a judge where the world has one. Out: a
`SideEffects`, one table with intervals and one plain sentence. `image_statistics` are cheap enough to log while a run
goes on, so that a run that rots is seen rotting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fieldsmith.measure.distances import (
    Features,
    diversity,
    extractor_name,
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
)
from fieldsmith.measure.intervals import Interval, mean_interval, paired_difference, percentile_interval, share

Better = Literal["higher", "lower", "same"]
Verdict = Literal["kept", "worse", "better", "changed"]
Judge = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]  # images, prompts -> verdicts (n,) bool by attribute

# Equal seeds make the intervals so narrow that harmless changes exclude 0: smaller ones than these count as kept.
SMALL_POINTS = 1.0  # of a judged share
SMALL_RELATIVE = 0.02  # of a statistic's mean before

EDGE = 0.1  # luma step between neighbours that counts as an edge
LEVELS = 8  # of each colour channel in the entropy's histogram
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Row:
    """One line of the table. In a distance's row `before` is the noise floor: before against itself."""

    name: str
    before: Interval
    after: Interval
    change: Interval
    unit: str
    better: Better
    verdict: Verdict

    @property
    def flagged(self) -> bool:
        return self.verdict in ("worse", "changed")


@dataclass(frozen=True)
class SideEffects:
    """What else changed over n pairs of images at equal seeds.

    `drift` is the root mean square pixel difference at equal seed and `redraw` that of two seeds of one prompt, for
    scale; any training moves the pixels, so neither is judged. Values before and after have 95% intervals; the changes
    in `rows` hold all together at 95% (Bonferroni), so that a table of many rows does not flag one by chance.
    """

    n: int
    extractor: str
    rows: list[Row]
    distances: list[Row]
    drift: Interval
    redraw: Interval | None = None
    kept: bool = field(init=False)
    verdict: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", not any(row.flagged for row in self.rows + self.distances))
        object.__setattr__(self, "verdict", self._sentence())

    def _sentence(self) -> str:
        if not self.kept:
            rows = [_moved(row) for row in self.rows if row.flagged]
            far = [_apart(row) for row in self.distances if row.flagged]
            return f"Side effects: {'; '.join(rows + far)} (n={self.n})."
        judged = [row for row in self.rows if row.unit == "points"]
        worst = min((row.change.low for row in judged), default=0.0)
        bound = f"no judged attribute fell by more than {max(0.0, -worst):.1f} points, " if judged else ""
        return (
            f"No side effects, as far as {self.n} pairs can tell: {bound}"
            f"{len(self.rows) - len(judged)} statistics and {len(self.distances)} distances show no change."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of strings for a report."""
        lines = [
            [row.name, row.before.short(), row.after.short(), row.change.short(), row.verdict]
            for row in self.rows + self.distances
        ]
        redraw = f"{self.redraw.short()} (a new seed)" if self.redraw else ""
        lines.append(["pixel difference at equal seed", redraw, self.drift.short(), "", ""])
        return ["what", "before", "after", "change", "verdict"], lines


def _moved(row: Row) -> str:
    """'colour right fell 6.2 points [-9.1, -3.3]'."""
    points = row.unit == "points"
    size = f"{abs(row.change.value):{'.1f' if points else '.3g'}}"
    unit = f" {row.unit}" if row.unit else ""
    bounds = row.change.bounds("+.1f" if points else ".3g")
    return f"{row.name} {'fell' if row.change.value < 0 else 'rose'} {size}{unit}{bounds}"


def _apart(row: Row) -> str:
    return f"{row.name} is {row.after.value:.3g} where before against itself gives {row.before.short()}"


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Four numbers an image that no reward sees, each (n,), of images (n, 3, h, w) in [0, 1].

    brightness: mean luma; contrast: its standard deviation; edge density: share of pixels whose luma steps by more
    than 0.1 to the right and down; colour entropy: of an 8 x 8 x 8 RGB histogram, in bits.
    Raises ValueError at another shape, images below 2 pixels a side, or values that are not finite.
    """
    _check_images(images, "images")
    images = images.detach().float().clamp(0, 1)
    n = len(images)
    luma = (images * images.new_tensor(LUMA)[:, None, None]).sum(1)  # (n, h, w)
    # one-sided differences: Sobel's central ones are blind to patterns of period two, which rotting images grow
    right, down = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    edges = right.square() + down.square() > EDGE**2
    level = (images * LEVELS).long().clamp(max=LEVELS - 1)
    bin_ = ((level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]).flatten(1)
    counts = images.new_zeros(n, LEVELS**3).scatter_add_(1, bin_, torch.ones_like(bin_, dtype=images.dtype))
    return {
        "brightness": luma.mean((1, 2)),
        "contrast": luma.flatten(1).std(1, correction=0),
        "edge density": edges.float().mean((1, 2)),
        "colour entropy": torch.special.entr(counts / bin_.shape[1]).sum(1) / math.log(2),
    }


@torch.no_grad()
def compare(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    features: Features,
    generator: torch.Generator,
    judge: Judge | None = None,
    splits: int = 20,
) -> SideEffects:
    """What changed between before and after, (n, 3, h, w) in [0, 1], where row i of both is prompt i at one seed.

    Judged shares and statistics are compared pair by pair. Diversity is the mean feature distance within a prompt, one
    number a prompt, and needs two prompts with two images each. A distance is taken over random halves A, B:
    before(A) to after(B) beside before(A) to before(B), the noise floor, and flagged where its mean lies above the
    floor's interval. Raises ValueError below 4 pairs, at unequal shapes, or at values that are not finite.
    """
    _check_images(before, "before")
    _check_images(after, "after")
    if before.shape != after.shape or len(prompts) != len(before):
        shapes = f"{tuple(before.shape)} before, {tuple(after.shape)} after, {len(prompts)} prompts"
        raise ValueError(f"{shapes}; give one prompt and one pair at equal seed a row")
    if len(before) < 4:
        raise ValueError(f"{len(before)} pairs: compare needs at least 4, 64 is a good start")

    judged = (judge(before, prompts), judge(after, prompts)) if judge else ({}, {})
    seen = image_statistics(before), image_statistics(after)
    name = extractor_name(features)
    codes = features(before).cpu(), features(after).cpu()
    varied = diversity(codes[0], prompts), diversity(codes[1], prompts)
    if len(varied[0]) > 1:
        seen[0][f"diversity within a prompt ({name})"], seen[1][f"diversity within a prompt ({name})"] = varied
    level = 1 - 0.05 / (len(judged[0]) + len(seen[0]))
    rows = [_judged(key, judged[0][key], judged[1][key], len(before), level) for key in judged[0]]
    rows += [_statistic(key, seen[0][key], seen[1][key], level) for key in seen[0]]
    drift = mean_interval((after - before).square().flatten(1).mean(1).sqrt())
    return SideEffects(
        len(before), name, rows, _split(*codes, name, generator, splits), drift, _redraw(before, prompts)
    )


def _judged(name: str, before: Tensor, after: Tensor, n: int, level: float) -> Row:
    """An attribute's verdicts (n,) bool, of which more should be true."""
    if len(before) != n:
        raise ValueError(f"the judge gave {len(before)} verdicts on '{name}' for {n} images")
    change = paired_difference(before.cpu(), after.cpu(), level)
    verdict = _verdict(change, "higher", SMALL_POINTS)
    return Row(name, share(before), share(after), change, "points", "higher", verdict)


def _statistic(name: str, before: Tensor, after: Tensor, level: float) -> Row:
    """A statistic (n,) that should stay where it was."""
    unit = "bits" if name == "colour entropy" else ""
    mean, change = mean_interval(before, unit=unit), mean_interval(after - before, level, unit)
    verdict = _verdict(change, "same", SMALL_RELATIVE * abs(mean.value))
    return Row(name, mean, mean_interval(after, unit=unit), change, unit, "same", verdict)


def _verdict(change: Interval, better: Better, small: float) -> Verdict:
    if not change.excludes_zero or abs(change.value) <= small:
        return "kept"
    if better == "same":
        return "changed"
    return "better" if (change.value > 0) == (better == "higher") else "worse"


def _split(before: Tensor, after: Tensor, extractor: str, generator: torch.Generator, splits: int) -> list[Row]:
    """Distances between halves. A and B share no seed: paired images would look closer than two honest draws."""
    n = len(before)
    directions = int(torch.randint(2**31, (), generator=generator))  # the same directions for floor and value

    def sliced(a: Tensor, b: Tensor) -> float:
        return sliced_wasserstein(a, b, 64, torch.Generator().manual_seed(directions))

    orders = [torch.randperm(n, generator=generator) for _ in range(splits)]
    halves = [(order[: n // 2], order[n // 2 :]) for order in orders]
    rows = []
    distances = {"Frechet": frechet_distance, "kernel": kernel_distance, "sliced Wasserstein": sliced}
    for name, distance in distances.items():
        floor = torch.tensor([distance(before[a], before[b]) for a, b in halves], dtype=torch.float64)
        value = torch.tensor([distance(before[a], after[b]) for a, b in halves], dtype=torch.float64)
        spread = [percentile_interval(float(x.mean()), x, n) for x in (floor, value, value - floor)]
        verdict: Verdict = "changed" if spread[1].value > spread[0].high else "kept"
        rows.append(Row(f"{name} distance ({extractor})", spread[0], spread[1], spread[2], "", "lower", verdict))
    return rows


def _redraw(images: Tensor, prompts: Sequence[str]) -> Interval | None:
    """Root mean square pixel difference of two seeds of one prompt: each image beside the prompt's next one."""
    last: dict[str, int] = {}
    pairs = []
    for row, prompt in enumerate(prompts):
        if prompt in last:
            pairs.append((last[prompt], row))
        last[prompt] = row
    if len(pairs) < 2:
        return None
    one, other = torch.tensor(pairs).T
    return mean_interval((images[one] - images[other]).square().flatten(1).mean(1).sqrt())


def _check_images(images: Tensor, name: str) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 2 or not len(images):
        raise ValueError(f"{name} has shape {tuple(images.shape)}; expected (n, 3, h, w) with n >= 1 and h, w >= 2")
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(images)} images in {name} hold NaN or infinity; the model that made them broke"
        )
