"""The recipe of zoo:shapes-flux and its small, half-trained sister: real Flux pipelines that draw the shapes world.

First its VAE (32 pixels to 8 x 8 x 8 latents, so 16 tokens), then transformer and text encoders together.
`python -m experiments pretrain shapes-flux --out DIR` repeats it: about an hour on one core.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tiny import flux_pipeline
from experiments.zoo.flux_recipe import numbers, standardised, train_flow, train_vae
from fieldsmith.measure.detection import ask, right_by_group
from fieldsmith.measure.drawing import sampler
from fieldsmith.models.core import Condition
from fieldsmith.models.flux import Flux
from fieldsmith.run import Run, plain, write_atomically
from fieldsmith.worlds.shapes import VOCABULARY, ShapesWorld, concepts
from fieldsmith.worlds.shapes_groups import attributes


@dataclass(frozen=True)
class ShapesFlux:
    """Settings of the recipe; the defaults made the model in the zoo."""

    seed: int = 0
    images: int = 40_000  # size of the training pool
    heads: int = 3  # transformer width / 32
    vae_steps: int = 1_500
    vae_batch: int = 64
    vae_lr: float = 3e-3
    kl: float = 1e-4  # weight of the latents' KL to N(0, I), per latent number
    steps: int = 18_000
    batch: int = 64
    lr: float = 2e-3
    ema: float = 0.999
    threads: int = 1


def train(config: ShapesFlux, folder: pathlib.Path, name: str) -> Flux:
    """Train from nothing, resumably; the pipeline is in folder/model."""
    torch.set_num_threads(config.threads)
    run, vae_run = Run(folder / "flow", "pretrain", config), Run(folder / "vae", "pretrain", config)
    for part in (run, vae_run):
        part.begin()
    model = Flux(
        flux_pipeline(VOCABULARY, vae_channels=(8, 16, 32), heads=config.heads, seed=config.seed), f"zoo:{name}"
    )
    data = ShapesWorld(model.resolution).sample(config.images, config.seed)
    train_vae(model, lambda rows: data.images[rows] * 2 - 1, config.images, config, vae_run)
    latents = standardised(model, torch.cat([model.encode_images(part) for part in data.images.split(256)]))

    def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        rows = torch.randint(config.images, (n,), generator=generator)
        return latents[rows], model.encode([data.captions[i] for i in rows.tolist()], grad=True)

    train_flow(model, drawn, config.steps, config, run)
    model.save(folder / "model")
    write_card(model, config, folder / "model", name)
    return model


def write_card(model: Flux, config: ShapesFlux, folder: pathlib.Path, name: str, each: int = 32) -> None:
    """card.json (which world judges it, what made it, what it scores) and the same in words, README.md."""
    world = ShapesWorld(model.resolution)
    rows = right_by_group(ask(sampler(model, 28), world, concepts(), each, seed=1), attributes())
    scores = {k: numbers(x) for k, x in rows.items()}
    card = {
        "world": "shapes",
        "size": model.resolution,
        "command": f"python -m experiments pretrain {name} --out DIR",
        "settings": plain(config),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "judged right, 28 steps": scores,
    }
    write_atomically(folder / "card.json", json.dumps(card, indent=1) + "\n")
    table = [f"| {k} | {interval} |" for k, interval in rows.items()]
    lines = [
        f"# zoo:{name}",
        "",
        f"A FluxPipeline with a transformer of {card['parameters']:,} parameters that draws one coloured shape on",
        f"grey, {model.resolution} pixels. Trained by fieldsmith on its own procedural shapes world; Apache-2.0.",
        "",
        f"Made by `{card['command']}` with the recipe's defaults.",
        "Captions: `a red triangle`, with `colored` or `shape` where an attribute is left open, one synonym for each",
        "word, and the empty caption. `yellow cross` was never shown. The judge names what it sees from pixels alone;",
        "share of images that show what was asked, 28 steps:",
        "",
        "| prompts | right [95%] |",
        "|---|---|",
        *table,
        "",
        "```python",
        'pipe("a red triangle", height=32, width=32, num_inference_steps=28, max_sequence_length=8).images[0]',
        "```",
    ]
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
