"""A small classifier trained on a world's own images: it names samples, and its features make Frechet distances.

In: images (n, c, h, w) in [0, 1] with labels. Out: `Classifier`, whose features are those before its last layer. It
never sees a generated image, and it knows nothing of any teacher.
"""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fieldsmith.pictures import Images

WIDTHS = (32, 64, 64)
FILE = "classifier.safetensors"
MIXED = f"body.{3 * len(WIDTHS) + 2}.weight"  # of the layer that mixes places, where there is one


@dataclass(frozen=True)
class Classifier:
    """A trained network; `name` says what it was trained on."""

    body: nn.Sequential
    head: nn.Linear
    name: str

    @torch.no_grad()
    def __call__(self, images: Tensor | Images) -> Tensor:
        """Features (n, 64) of images (n, c, h, w) in [0, 1]."""
        return torch.cat([self.body(part * 2 - 1) for part in images.split(500)])

    @torch.no_grad()
    def read(self, images: Tensor | Images) -> Tensor:
        """The class of each image, (n,)."""
        read: Tensor = self.head(self(images)).argmax(1)
        return read

    def save(self, folder: pathlib.Path) -> None:
        """Write the weights, which `load_classifier` reads back."""
        parts = {"body": self.body, "head": self.head}
        tensors = {f"{part}.{name}": t for part, of in parts.items() for name, t in of.state_dict().items()}
        save_file(tensors, folder / FILE)


def load_classifier(folder: pathlib.Path, name: str) -> Classifier:
    """A classifier of `name` that was saved."""
    tensors = load_file(folder / FILE)
    mixed = tensors.get(MIXED)
    grid = 1 if mixed is None else math.isqrt(mixed.shape[1] // WIDTHS[-1])
    parts = _network(tensors["body.0.weight"].shape[1], len(tensors["head.bias"]), grid)
    for part, module in zip(("body", "head"), parts, strict=True):
        own = {key.removeprefix(f"{part}."): t for key, t in tensors.items() if key.startswith(f"{part}.")}
        module.load_state_dict(own)
        module.eval().requires_grad_(False)
    return Classifier(*parts, _name(name))


def _network(channels: int, classes: int, grid: int) -> tuple[nn.Sequential, nn.Linear]:
    layers: list[nn.Module] = []
    for i, (before, width) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False)):
        stride = 2 if i else 1
        layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.GELU()]
    layers += [nn.AdaptiveAvgPool2d(grid), nn.Flatten()]
    if grid > 1:
        layers += [nn.Linear(WIDTHS[-1] * grid**2, WIDTHS[-1]), nn.GELU()]
    return nn.Sequential(*layers), nn.Linear(WIDTHS[-1], classes)


def _name(of: str) -> str:
    return f"classifier of {of}, {WIDTHS[-1]} features"


def train_classifier(
    images: Tensor | Images,
    labels: Tensor,
    name: str,
    steps: int = 600,
    batch: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    noise: float = 0.2,
    grid: int = 1,
) -> Classifier:
    """Three convolutions and means over grid x grid places, which a layer mixes where there are several.

    Images get noise of a standard deviation up to `noise`, so that features are smooth.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # module constructors draw from the global generator
        body, head = _network(images.shape[1], int(labels.max()) + 1, grid)
    draws = torch.Generator().manual_seed(seed)
    parameters = [*body.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=draws)
        x = images[rows]
        x = x + noise * torch.rand(batch, 1, 1, 1, generator=draws) * torch.randn(x.shape, generator=draws)
        loss = cross_entropy(head(body(x * 2 - 1)), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    for part in (body, head):
        part.eval().requires_grad_(False)
    return Classifier(body, head, _name(name))
