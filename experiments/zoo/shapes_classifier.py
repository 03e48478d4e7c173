"""The recipe of the rewards `classifier` and `classifier-heldout`: two small networks that read the shapes world.

`python -m experiments pretrain shapes-classifier --out DIR` repeats it: about two minutes on one core. The two differ
in widths, seed and data, so that images that fool one need not fool the other.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from fieldsmith.measure.intervals import share
from fieldsmith.rewards.learned import log_probabilities, network
from fieldsmith.run import plain, write_atomically
from fieldsmith.worlds.shapes import Shapes, ShapesWorld

SIZE = 32
TEST_SEED = 1_000  # of the held-out renders; no network trains on it


@dataclass(frozen=True)
class Classifier:
    """One network; the defaults made `classifier`."""

    seed: int = 0
    widths: tuple[int, ...] = (16, 32, 32)
    images: int = 12_000  # fresh renders, the composition that zoo:shapes-flux never saw included
    steps: int = 1_200
    batch: int = 128
    lr: float = 4e-3
    noise: float = 0.3  # each image gets Gaussian noise of a standard deviation drawn from [0, noise]


@dataclass(frozen=True)
class Classifiers:
    """Both networks."""

    threads: int = 1


NETWORKS = {"classifier": Classifier(), "classifier-heldout": Classifier(seed=1, widths=(24, 24, 48))}


def fit(config: Classifier) -> nn.Sequential:
    """One network from nothing, in eval mode."""
    data = ShapesWorld(SIZE).sample(config.images, config.seed, hold_out=False)
    generator = torch.Generator().manual_seed(config.seed)
    net = network(config.widths, config.seed)
    optimiser = torch.optim.AdamW(net.parameters(), config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, config.steps)
    for _ in range(config.steps):
        rows = torch.randint(config.images, (config.batch,), generator=generator)
        level = config.noise * torch.rand(config.batch, 1, 1, 1, generator=generator)
        images = data.images[rows] + level * torch.randn(data.images[rows].shape, generator=generator)
        shape, colour = log_probabilities(net, images)
        loss = nll_loss(shape, data.shape[rows]) + nll_loss(colour, data.colour[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def right(net: nn.Module, data: Shapes, noise: float, generator: torch.Generator) -> Tensor:
    """Whether the network reads both shape and colour right, under noise of that standard deviation; (n,) bool."""
    noisy = data.images + noise * torch.randn(data.images.shape, generator=generator)
    read = [
        torch.cat(part).argmax(1) for part in zip(*(log_probabilities(net, x) for x in noisy.split(500)), strict=True)
    ]
    return (read[0] == data.shape) & (read[1] == data.colour)


def train(config: Classifiers, folder: pathlib.Path, name: str) -> None:
    """Train both, write NAME.safetensors each, card.json and README.md."""
    torch.set_num_threads(config.threads)
    test = ShapesWorld(SIZE).sample(4_000, TEST_SEED, hold_out=False)
    card = {
        "world": "shapes",
        "size": SIZE,
        "data": "ShapesWorld(32).sample(images, seed, hold_out=False), noise added; read on 4000 renders of seed 1000",
        "command": f"python -m experiments pretrain {name} --out DIR",
    }
    networks = {}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# The rewards `classifier` and `classifier-heldout`", "", f"Made by `{card['command']}`.", ""]
    lines += ["| network | parameters | noise | shape and colour right [95%] |", "|---|---|---|---|"]
    for which, settings in NETWORKS.items():
        net = fit(settings)
        read = {
            str(noise): share(right(net, test, noise, torch.Generator().manual_seed(TEST_SEED)))
            for noise in (0.0, 0.1, 0.3)
        }
        parameters = sum(p.numel() for p in net.parameters())
        networks[which] = {**plain(settings), "parameters": parameters, "right, by noise": plain(read)}
        lines += [f"| {which} | {parameters:,} | {noise} | {interval} |" for noise, interval in read.items()]
        save_file(net.state_dict(), folder / f"{which}.safetensors")
    write_atomically(folder / "card.json", json.dumps({**card, "networks": networks}, indent=1) + "\n")
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
