"""Distances between sets of features, and how varied a set is.

In: features (n, d) and (m, d), from any extractor; a distance means nothing without its extractor's name beside it.
Out: plain floats, computed in float64. Frechet (FID), kernel (KID), precision and recall (Kynkaanniemi et al., 2019),
sliced Wasserstein, total variation. torchmetrics has the first two; tests hold ours against them. Ours are here since
they take features as they are, stay exact with fewer rows than columns, and are quick enough to repeat over splits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]  # images (n, 3, h, w) in [0, 1] -> (n, d)


@dataclass(frozen=True)
class PixelFeatures:
    """Images averaged down to size x size and flattened: (n, 3, h, w) -> (n, 3 * size * size)."""

    size: int

    @property
    def name(self) -> str:
        return f"pixels {self.size}x{self.size}"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, self.size).flatten(1)


def pixel_features(size: int) -> PixelFeatures:
    """The extractor that needs no network. Raises ValueError at size < 1."""
    if size < 1:
        raise ValueError(f"size={size}: pixel features need at least 1 x 1")
    return PixelFeatures(size)


def extractor_name(features: Features) -> str:
    """What to print beside a distance: the extractor's `name`, or else its Python name."""
    return str(getattr(features, "name", None) or getattr(features, "__name__", type(features).__name__))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of Gaussians fitted to a (n, d) and b (m, d).

    Biased upward at small n, the more the larger d is: compare only numbers of equal n, m and extractor.
    Raises ValueError below 2 rows, at unequal d, or at values that are not finite.
    """
    a, b = _pair(a, b, least=2)
    root_a, root_b = _root(a), _root(b)
    # S = R'R, so the singular values of R_a R_b' are the eigenvalues of (S_a S_b)^(1/2): no root of a matrix is taken
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * cross
    return float((a.mean(0) - b.mean(0)).square().sum() + spread.clamp(min=0))


def _root(x: Tensor) -> Tensor:
    """R with R'R the unbiased covariance of x (n, d); (min(n, d), d)."""
    root: Tensor = torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r")[1]
    return root


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, as KID; below 0 by chance where a and b are alike.

    Raises ValueError below 2 rows, at unequal d, or at values that are not finite.
    """
    a, b = _pair(a, b, least=2)
    return float(_without_diagonal(_cubic(a, a)) + _without_diagonal(_cubic(b, b)) - 2 * _cubic(a, b).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _without_diagonal(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of the made that lies among the real; recall: share of the real that the made reaches."""

    precision: float
    recall: float


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> PrecisionRecall:
    """Kynkaanniemi et al.'s estimate: a set's manifold is the union of balls that reach each row's k-th neighbour.

    Raises ValueError where a set has k rows or fewer, at unequal d, or at values that are not finite.
    """
    real, made = _pair(real, made, least=k + 1)
    between = _distances(real, made)
    precision = (between <= _radii(real, k)[:, None]).any(0).double().mean()
    recall = (between <= _radii(made, k)[None, :]).any(1).double().mean()
    return PrecisionRecall(float(precision), float(recall))


def _radii(x: Tensor, k: int) -> Tensor:
    return _distances(x, x).kthvalue(k + 1, dim=1).values  # the nearest is the row itself


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the matrix-product route rounds the distance of a row to its twin away from 0
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int, generator: torch.Generator) -> float:
    """Root mean square over random directions of the exact one-dimensional W2 between a (n, d) and b (m, d).

    Raises ValueError at an empty set, unequal d, no projections, or values that are not finite.
    """
    if projections < 1:
        raise ValueError(f"projections={projections}: at least 1 direction is needed, 128 is a good start")
    a, b = _pair(a, b, least=1)
    n, m = len(a), len(b)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64).to(a.device)
    directions = directions / directions.norm(dim=0)
    along_a, along_b = (a @ directions).sort(0).values, (b @ directions).sort(0).values
    # both quantile functions are steps; in units of 1 / (n m) they jump at whole numbers, so unequal sizes stay exact
    cuts = torch.unique(torch.cat((torch.arange(n + 1) * m, torch.arange(m + 1) * n))).to(a.device)
    left, mass = cuts[:-1], cuts.diff().double() / (n * m)
    return float((mass[:, None] * (along_a[left // m] - along_b[left // n]).square()).sum(0).mean().sqrt())


def total_variation(counts_a: Tensor, counts_b: Tensor) -> float:
    """Half the L1 distance of two label distributions, given as counts (k,) and (k,): 0 alike, 1 disjoint."""
    if counts_a.shape != counts_b.shape or counts_a.ndim != 1:
        raise ValueError(f"counts of shapes {tuple(counts_a.shape)} and {tuple(counts_b.shape)}; both must be (k,)")
    for counts in (counts_a, counts_b):
        if counts.sum() <= 0 or (counts < 0).any():
            raise ValueError(f"counts {counts.tolist()}: need at least 1 label and none below 0")
    p, q = counts_a.double() / counts_a.sum(), counts_b.double() / counts_b.sum()
    return float((p - q).abs().sum() / 2)


def diversity(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Mean pairwise distance within each group of features (n, d), in order of appearance; (groups of 2 or more,)."""
    if len(features) != len(groups):
        raise ValueError(f"{len(features)} rows of features and {len(groups)} groups; give one group a row")
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    features = features.detach().double()
    means = [torch.pdist(features[members]).mean() for members in rows.values() if len(members) > 1]
    return torch.stack(means) if means else features.new_zeros(0)


def _pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both as float64 (n, d) and (m, d), or ValueError."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (n, d) and (m, d)")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{len(a)} and {len(b)} rows of features; this distance needs at least {least} of each")
    a, b = a.detach().double(), b.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity; look at the images and the extractor before any distance")
    return a, b
