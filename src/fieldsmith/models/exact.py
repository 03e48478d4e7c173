"""A closed-form field with a small trainable correction on top: a model whose reference is exactly right.

What `align` is proved on: its reference is the mixture's own score, and a reward's optimum is known (worlds/mixtures).
States are points (batch, d); images are the points themselves. Trains with full weights ('all').
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Path, Prediction, RectifiedFlow

POINTS = 65_536  # asked for at once: next to nothing each, where a call costs as much as thousands of them


class Truth(Protocol):
    """A law whose field is known, such as worlds.mixtures.Mixture."""

    @property
    def means(self) -> Tensor: ...

    def velocity(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor: ...
    def eps(self, x_t: Tensor, t: Tensor, path: Path) -> Tensor: ...


class Correction(nn.Module):
    """A perceptron of (x, t) that says 0 at the start."""

    def __init__(self, d: int, width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inner = [nn.Linear(d + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)]
            self.inner = nn.Sequential(*inner, nn.SiLU())
            self.last = nn.Linear(width, d)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = 2 ** torch.arange(4).to(x) * torch.pi / 2 * t[:, None]
        output: Tensor = self.last(self.inner(torch.cat((x, waves.sin(), waves.cos()), 1)))
        return output


class Exact(Model):
    """The mixture's field on a path, plus a correction; `grid_times` (K + 1,) where the path has no grid of its own."""

    family = "exact"
    SUBSETS: ClassVar[dict[str, str]] = {"all-linear": r".*"}
    DEFAULT_SUBSET = ERASE_SUBSET = "all-linear"
    DORMANT: ClassVar[str] = "inner"

    def __init__(self, mixture: Truth, path: Path, grid_times: Tensor, width: int = 128, seed: int = 0):
        self.mixture, self.grid_times = mixture, grid_times
        d = mixture.means.shape[1]
        super().__init__(SimpleNamespace(components={}), Correction(d, width, seed), "an exact mixture")
        self.network.requires_grad_(False)
        self.chunk = POINTS
        self.path = path
        self.kind = "velocity" if isinstance(path, RectifiedFlow) else "eps"

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """A mixture has one prompt."""
        return Condition({"none": torch.zeros(len(prompts), 1)})

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        t = t.to(x_t).expand(len(x_t))
        return Prediction(self.kind, self.forward(x_t, t), x_t, t, self.path)

    def _forward(self, x_t: Tensor, t: Tensor, *_: Any) -> Tensor:
        x64, t64 = x_t.double(), t.double()
        exact = self.mixture.velocity if self.kind == "velocity" else self.mixture.eps
        value: Tensor = exact(x64, t64, self.path).to(x_t) + self.network(x_t, t)
        return value

    def _decode(self, latents: Tensor) -> Tensor:
        return latents

    def _encode_images(self, images: Tensor) -> Tensor:
        return images

    @property
    def latent_shape(self) -> tuple[int]:
        return (self.mixture.means.shape[1],)

    def grid(self, steps: int) -> Tensor:
        if steps != len(self.grid_times) - 1:
            raise ValueError(f"steps={steps}: this world's grid has {len(self.grid_times) - 1}")
        return self.grid_times
