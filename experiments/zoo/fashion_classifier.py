"""The recipe of fashion-classifier, which judges and measures images of Fashion-MNIST: the small network of
measure/classifier.py, trained longer and kept.

`python -m experiments pretrain fashion-classifier --out DIR` repeats it: minutes on one core.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch

from fieldsmith.measure.classifier import train_classifier
from fieldsmith.measure.intervals import share
from fieldsmith.run import plain, write_atomically
from fieldsmith.worlds import fashion
from fieldsmith.worlds.classes import fashion_mnist


@dataclass(frozen=True)
class FashionClassifier:
    """Settings of the recipe."""

    folder: pathlib.Path = fashion.DEBIAN  # of Fashion-MNIST's four .gz files
    steps: int = 8_000
    batch: int = 64
    lr: float = 3e-3
    noise: float = 0.1
    grid: int = 4  # places a side whose features are told apart: a mean over all of them read 88% of the test set right
    seed: int = 0
    threads: int = 1


def train(config: FashionClassifier, folder: pathlib.Path, name: str) -> None:
    """Train on the 60,000, test on the 10,000; write classifier.safetensors, card.json and README.md."""
    torch.set_num_threads(config.threads)
    data = fashion_mnist(config.folder)
    net = train_classifier(
        data.images, data.labels, data.name, config.steps, config.batch, config.lr, config.seed,
        noise=config.noise, grid=config.grid,
    )  # fmt: skip
    right = net.read(data.held_images) == data.held_labels
    by_class = {name: share(right[data.held_labels == label]) for label, name in enumerate(data.names)}
    folder.mkdir(parents=True, exist_ok=True)
    net.save(folder)
    parameters = sum(p.numel() for part in (net.body, net.head) for p in part.parameters())
    settings = {key: value for key, value in plain(config).items() if key != "folder"}
    card = {
        "data": data.name, "size": fashion.SIZE, "command": f"python -m experiments pretrain {name} --out DIR",
        "settings": settings, "parameters": parameters, "right on the test set": plain(share(right)),
        "by class": plain(by_class),
    }  # fmt: skip
    write_atomically(folder / "card.json", json.dumps(card, indent=1) + "\n")
    lines = [
        f"# {name}", "",
        f"A network of {parameters:,} parameters that names the ten classes of Fashion-MNIST at {fashion.SIZE} pixels;",
        "its last features measure distances. It never saw a generated image, nor the test set that is read here.",
        f"Made by `{card['command']}`. Apache-2.0.", "",
        "| test images of | named right [95%] |", "|---|---|",
        f"| all classes | {share(right)} |", *(f"| {name} | {interval} |" for name, interval in by_class.items()),
    ]  # fmt: skip
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
