"""The recipe of zoo:digits-unet, zoo:shapes-unet and zoo:fashion-unet: class-conditional teachers with a null class.

DDPM noise prediction in pixels on the cosine schedule, each label dropped with probability 0.1 for itself, uniform
weights in time. `python -m experiments pretrain digits-unet --out DIR` repeats it: minutes on one core, the clothes of
Fashion-MNIST over an hour.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.tiny import unet_pipeline
from fieldsmith.errors import InputError
from fieldsmith.methods.distill.curriculum import Curriculum, write
from fieldsmith.methods.distill.losses import weighted
from fieldsmith.models.unet import UNet
from fieldsmith.paths import noised
from fieldsmith.run import Run, plain, write_atomically
from fieldsmith.training import Log, Optimisation, fit
from fieldsmith.worlds import fashion
from fieldsmith.worlds.classes import NAMED, Classes, digits, fashion_mnist, shapes


@dataclass(frozen=True)
class ClassUNet:
    """Settings of the recipe; the defaults made zoo:digits-unet."""

    data: str = "digits"
    folder: pathlib.Path = fashion.DEBIAN  # of Fashion-MNIST's four .gz files
    seed: int = 0
    widths: tuple[int, ...] = (32, 64)
    layers: int = 1  # residual blocks a level
    steps: int = 6_000
    batch: int = 64
    lr: float = 1e-3
    ema: float = 0.999
    label_dropout: float = 0.1
    curriculum: str = "uniform"  # tirt: weights over time learned along (DASH Eq. 2), left beside the model
    threads: int = 1


def pipeline_for(data: Classes, config: ClassUNet) -> UNet:
    """An untrained teacher of the data's classes."""
    pipeline = unet_pipeline(
        size=data.images.shape[-1], channels=data.images.shape[1], widths=config.widths, layers=config.layers,
        class_rows=len(data.names) + 1, attention=False, beta_schedule="squaredcos_cap_v2", seed=config.seed,
    )  # fmt: skip
    return UNet(pipeline, f"zoo:{config.data}-unet", classes=data.names)


def train(config: ClassUNet, folder: pathlib.Path, name: str) -> UNet:
    """Train from nothing, resumably; the pipeline is in folder/model."""
    check(config)
    torch.set_num_threads(config.threads)
    run = Run(folder / "run", "pretrain", config)
    run.begin()
    data = {"digits": digits, "shapes": shapes, "fashion": partial(fashion_mnist, config.folder)}[config.data]()
    model = pipeline_for(data, config)
    model.unfreeze("all")
    null = model.null_class
    assert null is not None

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        rows = torch.randint(len(data.images), (config.batch,), generator=generator)
        x_0, label = data.images[rows] * 2 - 1, data.labels[rows]
        eps = torch.randn(x_0.shape, generator=generator)
        t = model.path.time(torch.randint(model.path.length, (config.batch,), generator=generator))
        label[torch.rand(config.batch, generator=generator) < config.label_dropout] = null
        said = model.predict(noised(model.path, x_0, eps, t), t, model.condition(label))
        errors = (said.eps - eps).square().flatten(1).mean(1)
        omega = None if weights is None else weights(t, by_batch=True)
        yield errors.mean() if omega is None else weighted(errors, omega, omega)

    weights = Curriculum("tirt", model.path, learned=True) if config.curriculum == "tirt" else None
    fit(
        model.trainable() | ({"curriculum": weights.numbers} if weights else {}), losses,
        Optimisation(
            config.steps, config.lr, 0.01, 200, cosine=True, clip=1.0, ema=config.ema, checkpoint_every=500,
            seed=config.seed,
        ),
        run,
    )  # fmt: skip
    model.network.requires_grad_(False)
    model.save(folder / "model")
    if weights:
        write(folder / "model", weights.numbers)
    write_card(model, config, folder / "model")
    return model


def check(config: ClassUNet) -> None:
    """Raises InputError with the value and the fix."""
    if config.data not in NAMED:
        raise InputError(f"data={config.data} is unknown; use one of {', '.join(NAMED)}")
    if config.curriculum not in ("uniform", "tirt"):
        raise InputError(f"curriculum={config.curriculum} is unknown; use uniform or tirt")
    if not config.widths or any(width % 8 or width < 8 for width in config.widths):
        raise InputError(f"widths={config.widths} must be multiples of 8, such as 32 64")
    if not 0 < config.label_dropout < 1:
        raise InputError(f"label_dropout={config.label_dropout} leaves a branch untrained; use 0.1")


def write_card(model: UNet, config: ClassUNet, folder: pathlib.Path) -> None:
    """card.json and README.md."""
    parameters = sum(p.numel() for p in model.network.parameters())
    card = {
        "data": config.data,
        "size": model.size[0],
        "command": f"python -m experiments pretrain {config.data}-unet --out DIR",
        "settings": {name: value for name, value in plain(config).items() if name != "folder"},
        "parameters": parameters,
    }
    write_atomically(folder / "card.json", json.dumps(card, indent=1) + "\n")
    lines = [
        f"# zoo:{config.data}-unet",
        "",
        f"A DDPMPipeline with a UNet2DModel of {parameters:,} parameters that draws {len(model.classes)} classes at",
        f"{model.size[0]} pixels; the embedding row after the last class is the null class. Apache-2.0.",
        "",
        f"Made by `{card['command']}` with the recipe's defaults. How well it draws: results/distill.",
    ]
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
