"""A small network of points: what mixtures in one and two dimensions are learned with (VSM notes, 3.2 and 3.6).

States are points (batch, d) on a variance-preserving path; images are the points themselves. The network is the one of
the published one-dimensional study, with three residual blocks of their own weights, on request a variance head, and
sines of x beside x, without which it needs many times the updates to tell modes apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fieldsmith.models.core import Condition, Model
from fieldsmith.paths import Prediction, VariancePreserving
from fieldsmith.samplers import range_log_variance

Head = Literal["range", "free"]
WAVES = 4  # sines and cosines of 1, 2, 4, 8 x


class Block(nn.Module):
    """LayerNorm, LeakyReLU, Linear, twice, with the time in between, around a skip."""

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.Sequential(nn.LayerNorm(width), nn.LeakyReLU(0.02), nn.Linear(width, width))
        self.time = nn.Linear(width, width)
        self.after = nn.Sequential(nn.LayerNorm(width), nn.LeakyReLU(0.02), nn.Linear(width, width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inside: Tensor = self.after(self.before(x) + self.time(time))
        return x + inside


class Network(nn.Module):
    """(x (batch, d), index (batch,)) -> (batch, d * outputs)."""

    def __init__(self, d: int, width: int, outputs: int):
        super().__init__()
        self.width = width
        self.first = nn.Linear(d * (1 + 2 * WAVES), width, bias=False)
        self.time = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.02))
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, d * outputs)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half).to(x) / half)
        waves = index[:, None] * rates
        time = self.time(torch.cat((waves.sin(), waves.cos()), 1))
        bent = (x[:, :, None] * 2 ** torch.arange(WAVES).to(x)).flatten(1)
        x = self.first(torch.cat((x, bent.sin(), bent.cos()), 1))
        for block in self.blocks:
            x = block(x, time)
        output: Tensor = self.last(self.norm(x))
        return output


class Perceptron(Model):
    """Predicts eps. `head` 'range' adds the fraction of a learned range, 'free' a log-variance of the single step."""

    family = "perceptron"
    SUBSETS: ClassVar[dict[str, str]] = {"all-linear": r".*"}
    path: VariancePreserving

    def __init__(self, d: int, path: VariancePreserving, head: Head | None = None, width: int = 64, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # module constructors draw from the global generator
            network = Network(d, width, 2 if head else 1)
        generator = torch.Generator().manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
        super().__init__(SimpleNamespace(components={}), network, "a perceptron")
        self.network.requires_grad_(False)
        self.d, self.path, self.kind, self.head = d, path, "eps", head
        if head:
            nn.init.zeros_(network.last.weight[d:])
            nn.init.zeros_(network.last.bias[d:])

    @property
    def learns_variance(self) -> bool:
        return self.head is not None

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """Points have one prompt."""
        return Condition({"none": torch.zeros(len(prompts), 1)})

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        t = t.to(x_t).expand(len(x_t))
        output: Tensor = self.forward(x_t, t)
        value, raw = output[:, : self.d], output[:, self.d :]
        if self.head is None:
            return Prediction("eps", value, x_t, t, self.path)
        if self.head == "free":
            return Prediction("eps", value, x_t, t, self.path, raw - 5)  # e^-5 is about where variances lie
        fraction = (raw + 1) / 2
        return Prediction("eps", value, x_t, t, self.path, range_log_variance(self.path, t, fraction), fraction)

    def _forward(self, x_t: Tensor, t: Tensor, *_: Any) -> Tensor:
        output: Tensor = self.network(x_t, self.path.index(t).round())
        return output

    def _decode(self, latents: Tensor) -> Tensor:
        return latents

    def _encode_images(self, images: Tensor) -> Tensor:
        return images

    @property
    def latent_shape(self) -> tuple[int]:
        return (self.d,)
