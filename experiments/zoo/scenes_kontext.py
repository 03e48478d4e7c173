"""The recipe of zoo:scenes-kontext and its small, half-trained sister: Flux pipelines that edit the scenes world.

First its VAE (24 pixels to 6 x 6 x 16 latents, so 9 tokens, one a cell), then transformer and text encoders together
on clean pairs: planned state before, instruction, planned state after. It never sees its own outputs.
`python -m experiments pretrain scenes-kontext --out DIR` repeats it.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tiny import kontext_pipeline
from experiments.zoo.flux_recipe import numbers, standardised, train_flow, train_vae
from fieldsmith.measure.editing import scores
from fieldsmith.measure.exposure import exposure
from fieldsmith.models import load
from fieldsmith.models.core import Condition
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.run import Run, plain, write_atomically
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel, judge


@dataclass(frozen=True)
class ScenesKontext:
    """Settings of the recipe; the defaults made the model in the zoo."""

    seed: int = 0
    autoencoder: str = ""  # a model whose autoencoder is taken as it is; '' trains one
    size: int = 24  # pixels
    sessions: int = 12_000  # of three turns each, whose clean states are the training pool
    dependency: float = 0.35
    still: float = 0.06  # share of instructions that ask for nothing
    heads: int = 3  # transformer width / 32
    vae_steps: int = 2_000
    vae_batch: int = 64
    vae_lr: float = 3e-3
    kl: float = 1e-5  # weight of the latents' KL to N(0, I), per latent number
    steps: int = 4_000  # by then nearly nine turns in ten succeed on clean sources
    decay: int = 12_000  # updates over which the learning rate would fall to 0
    batch: int = 64
    lr: float = 1.5e-3
    ema: float = 0.999
    threads: int = 1


def train(config: ScenesKontext, folder: pathlib.Path, name: str) -> FluxKontext:
    """Train from nothing, resumably; the pipeline is in folder/model."""
    torch.set_num_threads(config.threads)
    run, vae_run = Run(folder / "flow", "pretrain", config), Run(folder / "vae", "pretrain", config)
    run.begin()
    pipeline = kontext_pipeline(
        VOCABULARY, vae_channels=(16, 32, 32), latent_channels=16, heads=config.heads, text_length=10,
        size=config.size, seed=config.seed,
    )  # fmt: skip
    model = FluxKontext(pipeline, f"zoo:{name}")
    sessions = ScenesWorld(config.size).sessions(config.sessions, 3, config.seed, config.dependency, config.still)
    states = torch.stack([(sessions.clean(turn) * 255).round().byte() for turn in range(4)], 1)  # (n, 4, 3, size, size)
    images = states.flatten(0, 1)
    if config.autoencoder:
        pipeline.register_modules(vae=load(config.autoencoder).pipeline.vae)
    else:
        vae_run.begin()
        train_vae(model, lambda rows: images[rows] / 127.5 - 1, len(images), config, vae_run)
    latents = torch.cat([model.encode_images(part / 255) for part in images.split(256)])
    latents = latents if config.autoencoder else standardised(model, latents)
    latents = latents.unflatten(0, (len(sessions), 4))
    prompts = [sessions.prompts(turn) for turn in (1, 2, 3)]

    def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        rows, turns = (
            torch.randint(len(sessions), (n,), generator=generator),
            torch.randint(3, (n,), generator=generator),
        )
        asked = [prompts[turn][row] for row, turn in zip(rows.tolist(), turns.tolist(), strict=True)]
        return latents[rows, turns + 1], model.with_latents(model.encode(asked, grad=True), latents[rows, turns])

    train_flow(model, drawn, config.decay, config, run, lambda done, log: "enough" if done >= config.steps else None)
    model.save(folder / "model")
    write_card(model, config, folder / "model", name)
    return model


def write_card(model: FluxKontext, config: ScenesKontext, folder: pathlib.Path, name: str, n: int = 1600) -> None:
    """card.json (which world judges it, what made it, what it scores) and the same in words, README.md."""
    sessions = ScenesWorld(config.size).sessions(n, 3, 99, 0.7)
    scored = scores(exposure(model, sessions, judge, Channel(), 8, seed=1).verdicts)
    by_turn = {
        key: [numbers(x) for x in getattr(scored, key)]
        for key in ("following", "marginal", "teacher_forced", "consistency", "overall")
    }
    card = {
        "world": "scenes",
        "size": config.size,
        "command": f"python -m experiments pretrain {name} --out DIR",
        "settings": plain(config),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "held-out sessions of 3 turns, dependency 0.7, 8 steps": by_turn,
    }
    write_atomically(folder / "card.json", json.dumps(card, indent=1) + "\n")
    named = {
        "marginal": "turn done, on its own results", "teacher_forced": "turn done, on planned sources",
        "following": "all turns up to there done", "consistency": "consistency with the first image",
        "overall": "overall",
    }  # fmt: skip
    lines = [
        f"# zoo:{name}",
        "",
        f"A FluxKontextPipeline with a transformer of {card['parameters']:,} parameters that edits coloured shapes on",
        f"a 3 x 3 grid, {config.size} pixels, by instructions in words. Trained by fieldsmith on its own procedural",
        "scenes world, one turn at a time on clean sources; it never saw its own results. Apache-2.0.",
        "",
        f"Made by `{card['command']}` with the recipe's defaults. Instructions: `add a red circle top left`,",
        "`remove the red circle`, `paint the red circle blue`, `turn the red circle into a square`,",
        "`move the red circle to top left`, `swap the red circle and the blue square`, `make two red circles`,",
        "`make the background mint`, `change nothing`; colours red, green, blue, yellow; hues sand, mint, sky, rose;",
        "synonyms for most words.",
        "",
        f"{n} held-out sessions of three turns, seven in ten of which refer to what an earlier one made, 8 steps:",
        "",
        "| | turn 1 | turn 2 | turn 3 |",
        "|---|---|---|---|",
        *(f"| {words} | {' | '.join(x.short() for x in getattr(scored, key))} |" for key, words in named.items()),
        "",
        "```python",
        'pipe(image=image, prompt="paint the red circle blue", height=24, width=24, max_area=576, _auto_resize=False,',
        "     num_inference_steps=8, max_sequence_length=10).images[0]",
        "```",
    ]
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
