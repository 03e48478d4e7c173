"""Weights over time: TIRT as published and as released, Min-SNR in both forms, P2, EDM2's learned uncertainty.

In: a path's times, and a teacher's file or losses where a curriculum is learned. Out: `Curriculum`, a weight an index.
DASH notes, sections 3.2, 4 and 8. Paths without indices (rectified flow) count 1,000 of them.
"""

from __future__ import annotations

import math
import pathlib

import torch
from numpy.polynomial import Chebyshev
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fieldsmith.errors import InputError, check_word
from fieldsmith.methods.distill.config import CURRICULA
from fieldsmith.paths import Path, VariancePreserving, length_of, snr, times_of

FILE = "curriculum.safetensors"  # beside model_index.json: 'lambda', one number a training time


def index_of(path: Path, t: Tensor) -> Tensor:
    """The cell of times t (batch,), whole numbers in 0 .. T - 1."""
    n = length_of(path)
    place = t.double() * n - (1 if isinstance(path, VariancePreserving) else 0.5)
    return place.round().long().clamp(0, n - 1)


def base(name: str, path: Path, gamma: float = 5.0, k: float = 1.0) -> Tensor:
    """The fixed part of a curriculum's weights on a noise-prediction loss, (T,), not yet divided by their mean.

    'min-snr' is min(SNR, gamma) / SNR; 'min-snr-x0' and 'tirt' leave out the division, which is right for x_0 losses
    and what DASH uses; 'p2' is 1 / (k + SNR).
    """
    check_word(name, CURRICULA, "distill's curricula")
    ratio = snr(path, times_of(path).clamp(1e-4, 1 - 1e-4))
    if name in ("tirt", "min-snr-x0"):
        return ratio.clamp(max=gamma)
    if name == "min-snr":
        return ratio.clamp(max=gamma) / ratio
    if name == "p2":
        return 1 / (k + ratio)
    return torch.ones_like(ratio)


def tirt(importance: Tensor, shape: Tensor) -> Tensor:
    """omega = shape * sigmoid(lambda), both (T,) (DASH Eq. 2, before its normaliser)."""
    return shape * importance.sigmoid()


class Curriculum(nn.Module):
    """Weights of one kind at every index; 'tirt', 'sigmoid' and 'edm2' have numbers of their own, (T,).

    Parameters train only where `learned`: tirt and sigmoid by the loss itself, edm2 by loss / e^u + u.
    """

    numbers: nn.Parameter
    shape: Tensor

    def __init__(self, name: str, path: Path, gamma: float = 5.0, numbers: Tensor | None = None, learned: bool = False):
        super().__init__()
        self.name, self.path, self.learned = name, path, learned
        self.register_buffer("shape", base(name, path, gamma).float())
        start = torch.zeros(length_of(path)) if numbers is None else numbers.float()
        self.numbers = nn.Parameter(start, requires_grad=learned)

    def all(self) -> Tensor:
        """omega at every index, (T,), not normalised."""
        if self.name in ("tirt", "sigmoid"):
            return tirt(self.numbers, self.shape)
        return (-self.numbers).exp() if self.name == "edm2" else self.shape

    def forward(self, t: Tensor, by_batch: bool = False) -> Tensor:
        """Weights at t (batch,), over their mean over all times, or left for `weighted` to divide by the batch's."""
        every = self.all()
        found = every[index_of(self.path, t)]
        # a learned curriculum's mean has its gradient too: the released code does not stop it
        return found if by_batch or (self.name == "edm2" and self.learned) else found / every.mean().clamp(min=1e-8)

    def barrier(self, t: Tensor) -> Tensor | None:
        """EDM2's + u(t), (batch,), which keeps a learned weight from falling to 0; None for the others."""
        return self.numbers[index_of(self.path, t)] if self.name == "edm2" and self.learned else None


def learn_tirt(
    losses: Tensor,
    shape: Tensor,
    updates: int,
    batch: int = 64,
    lr: float = 2e-4,
    weight_decay: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """lambda (T,) that the released joint minimisation reaches where the network's losses (T,) stay as they are.

    AdamW with a cosine on sum(omega l) / sum(omega) over random times. Descent raises the weight of times that are
    easier than the mean (DASH notes, 4.1); nothing but the sigmoid and the decay holds it.
    """
    importance = torch.zeros(len(losses), requires_grad=True)
    optimiser = torch.optim.AdamW([importance], lr, weight_decay=weight_decay)
    fixed, shape = losses.float(), shape.float()
    for step in range(updates):
        rows = torch.randint(len(losses), (batch,), generator=generator)
        weights = tirt(importance[rows], shape[rows])
        loss = (weights * fixed[rows]).sum() / weights.sum()
        (gradient,) = torch.autograd.grad(loss, importance)
        importance.grad = gradient
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / updates))
        optimiser.step()
    return importance.detach()


def log_losses(t: Tensor, losses: Tensor, path: Path, degree: int = 8) -> Tensor:
    """u(t) = log E loss as a smooth function of the index, (T,): a polynomial in t by least squares.

    Fit to the losses (n,) of a frozen network at times t (n,); e^-u are EDM2's weights at their optimum, found without
    any training. Losses enter as means over cells, so that the fit is of log E l, not E log l.
    """
    cells = (t.double() * 50).long().clamp(0, 49)
    count = torch.bincount(cells, minlength=50).double()
    mean = torch.bincount(cells, losses.double(), minlength=50)[count > 0] / count[count > 0]
    middle = ((torch.arange(50, dtype=torch.float64) + 0.5) / 50)[count > 0]
    fit = Chebyshev.fit(middle.numpy(), mean.clamp(min=1e-12).log().numpy(), degree, domain=[0, 1])
    return torch.from_numpy(fit(times_of(path).numpy()))


def write(folder: pathlib.Path, importance: Tensor) -> None:
    """Leave lambda (T,) beside a teacher's model_index.json."""
    save_file({"lambda": importance.detach().contiguous()}, folder / FILE)


def read(folder: pathlib.Path | None, name: str, path: Path) -> Tensor:
    """lambda of the teacher in `folder`. Raises InputError where it has none, or one of another length."""
    file = folder / FILE if folder else None
    if file is None or not file.is_file():
        raise InputError(f"teacher '{name}' has no {FILE}; use --curriculum-from fit, which needs none")
    try:
        found = load_file(file).get("lambda")
    except SafetensorError as error:
        raise InputError(f"the curriculum of '{name}' cannot be read ({error}); fit one instead") from error
    if found is None or found.shape != (length_of(path),):
        shape = "no 'lambda'" if found is None else f"{found.numel()} times"
        raise InputError(f"the curriculum of '{name}' has {shape}, its path has {length_of(path)}; fit one instead")
    return found
