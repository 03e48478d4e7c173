"""The recipe of zoo:columns-ddpm: an unconditional pixel-space DDPM of a world with a judge, with a learned variance.

It predicts x_0 on the cosine schedule and works on folded images. The variance head is trained last and alone, which
leaves the mean as it is. `python -m experiments pretrain columns-ddpm --out DIR` repeats it.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch

from experiments.tiny import unet_pipeline
from fieldsmith import verb
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Inputs
from fieldsmith.methods.sharpen.verb import SHARPEN
from fieldsmith.models.ddpm import ClassDDPM
from fieldsmith.models.unet import UNet
from fieldsmith.models.variance_head import with_variance_head
from fieldsmith.run import Run, plain, write_atomically
from fieldsmith.worlds.catalogue import load
from fieldsmith.worlds.judged import JudgedWorld

POOL = 20_000  # images drawn for training


@dataclass(frozen=True)
class JudgedDDPM:
    """Settings of the recipe; the defaults made zoo:columns-ddpm."""

    world: str = "columns"
    size: int = 64
    fold: int = 4  # pixels a side that become channels
    widths: tuple[int, ...] = (16, 32)
    attention: bool = False
    steps: int = 3_500
    head_steps: int = 300
    batch: int = 32
    lr: float = 3e-3
    ema: float = 0.995
    seed: int = 0
    threads: int = 1


def untrained(world: JudgedWorld, config: JudgedDDPM, learned_variance: bool = True) -> UNet:
    """A network of the world's images."""
    pipeline = unet_pipeline(
        size=config.size // config.fold, channels=world.channels * config.fold**2, widths=config.widths,
        attention=config.attention, prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip=True,
        learned_variance=learned_variance, seed=config.seed,
    )  # fmt: skip
    return UNet(pipeline, f"zoo:{config.world}-ddpm", fold=config.fold)


def train(config: JudgedDDPM, folder: pathlib.Path, name: str) -> ClassDDPM:
    """Train from nothing, resumably; the pipeline is in folder/model."""
    torch.set_num_threads(config.threads)
    world = load(config.world, config.size)
    model: ClassDDPM = untrained(world, config, learned_variance=False)
    states = model.encode_images(world.sample(POOL, config.seed))
    plain_config = SharpenConfig(
        method="plain", steps=config.steps, batch=config.batch, lr=config.lr, warmup=100, min_snr=5.0, ema=config.ema,
        seed=config.seed,
    )  # fmt: skip
    verb.train(SHARPEN, model, plain_config, Inputs(states=states), Run(folder / "run", "pretrain", config))
    mean = UNet(model.pipeline, model.name, fold=config.fold)
    model = with_variance_head(mean)
    head = plain_config.replace(method="variance-learning", train="head", steps=config.head_steps)
    verb.train(SHARPEN, model, head, Inputs(states=states), Run(folder / "head", "pretrain", config))
    model.save(folder / "model")
    write_card(model, config, folder / "model")
    return model


def write_card(model: ClassDDPM, config: JudgedDDPM, folder: pathlib.Path) -> None:
    """card.json and README.md."""
    parameters = sum(p.numel() for p in model.network.parameters())
    card = {
        "data": config.world,
        "size": config.size,
        "command": f"python -m experiments pretrain {config.world}-ddpm --out DIR",
        "settings": plain(config),
        "parameters": parameters,
    }
    write_atomically(folder / "card.json", json.dumps(card, indent=1) + "\n")
    lines = [
        f"# zoo:{config.world}-ddpm",
        "",
        f"A DDPMPipeline with a UNet2DModel of {parameters:,} parameters that draws the world '{config.world}' at",
        f"{config.size} pixels and learns its reverse variance. Its states are images folded by {config.fold}: plain",
        f"diffusers draws {model.channels} channels, which torch.nn.functional.pixel_shuffle(states, {config.fold})",
        "unfolds. Apache-2.0.",
        "",
        f"Made by `{card['command']}` with the recipe's defaults. How often it hallucinates: results/sharpen.",
    ]
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
