"""The recipe of zoo:emoji-flux and its small, half-trained sister: Flux pipelines that draw the emoji world.

First the autoencoder (48 pixels to 12 x 12 x 8 latents, so 36 tokens), then the latents of a pool of pictures, then
transformer and text encoders together. `python -m experiments pretrain emoji-flux --out DIR` repeats it.
"""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.tiny import flux_pipeline
from experiments.zoo.flux_recipe import train_flow
from fieldsmith.measure.detection import ask
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import share
from fieldsmith.models import load
from fieldsmith.models.core import Condition
from fieldsmith.models.flux import Flux
from fieldsmith.report.grid import save_grid
from fieldsmith.run import Run, plain, write_atomically
from fieldsmith.training import Log, Optimisation, fit
from fieldsmith.worlds.emoji import EmojiWorld
from fieldsmith.worlds.emoji_captions import BACKGROUNDS, LONGEST, OBJECTS, VOCABULARY, Group, Scene
from fieldsmith.worlds.emoji_glyphs import SIDE
from fieldsmith.worlds.emoji_groups import kinds

CHUNK = 500  # pictures drawn and encoded at once
STEPS, GUIDANCE = 28, 2.5  # at which the card says how often the model is right


@dataclass(frozen=True)
class EmojiFlux:
    """Settings of the recipe; the defaults made the model in the zoo."""

    seed: int = 0
    autoencoder: str = ""  # a model whose autoencoder is taken as it is; '' trains one
    vae_steps: tuple[int, ...] = (2_000, 3_000)  # cosine cycles, each from vae_lr to 0: the second sharpens the first
    vae_batch: int = 24
    vae_lr: float = 2e-3
    kl: float = 1e-4  # weight of the latents' KL to N(0, I), per latent number
    images: int = 60_000  # size of the training pool, a multiple of 500
    heads: int = 5  # transformer width / 32
    layers: int = 2
    single_layers: int = 3
    steps: tuple[int, ...] = (12_000, 6_000)  # cosine cycles, each from lr to 0
    order: float = 16.0  # T5's attention begins so many times as sharp by place: else it never tells first from second
    batch: int = 48
    lr: float = 1e-3
    ema: float = 0.999
    dropped: float = 0.1  # share of captions that are replaced by '', for guidance
    threads: int = 1


def train(config: EmojiFlux, folder: pathlib.Path, name: str) -> Flux:
    """Train from nothing, resumably; the pipeline is in folder/model."""
    torch.set_num_threads(config.threads)
    pipeline = flux_pipeline(
        VOCABULARY, vae_channels=(16, 32, 64), layers=config.layers, single_layers=config.single_layers,
        heads=config.heads, text_length=LONGEST + 2, size=SIDE, seed=config.seed,
    )  # fmt: skip
    with torch.no_grad():
        attention = pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention
        attention.relative_attention_bias.weight.mul_(config.order)
    model = Flux(pipeline, f"zoo:{name}")
    if config.autoencoder:
        pipeline.register_modules(vae=load(config.autoencoder).pipeline.vae)
    else:
        for cycle in range(len(config.vae_steps)):
            train_autoencoder(model, config, cycle, folder / f"vae-{cycle + 1}")
    latents, captions = pool(model, config, folder / "pool")
    if not config.autoencoder:
        # one scale and shift for all channels, as Flux has: the flow sees zero mean and unit variance
        pipeline.vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    shift, scale = pipeline.vae.config.shift_factor, pipeline.vae.config.scaling_factor
    latents = (latents - shift) * scale

    def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        rows = torch.randint(len(latents), (n,), generator=generator)
        kept = torch.rand(n, generator=generator) >= config.dropped
        texts = [captions[i] if keep else "" for i, keep in zip(rows.tolist(), kept.tolist(), strict=True)]
        return latents[rows], model.encode(texts, grad=True)

    for cycle, steps in enumerate(config.steps, 1):
        run = Run(folder / f"flow-{cycle}", "pretrain", config)
        run.begin()
        train_flow(model, drawn, steps, replace(config, seed=config.seed + cycle - 1), run)
    pipeline.to(torch.float16)  # half the size; it is loaded, and used, in float32
    model.save(folder / "model")
    write_card(config, folder / "model", name)
    return model


def train_autoencoder(model: Flux, config: EmojiFlux, cycle: int, folder: pathlib.Path) -> None:
    """Absolute error of pixels and of their differences, which keeps edges sharp, and a little squared error.

    Its pictures have objects anywhere, which the flow's have not: what it draws off the grid stays readable.
    """
    vae, world, run = model.pipeline.vae, EmojiWorld(anywhere=True), Run(folder, "pretrain", config)
    run.begin()
    vae.requires_grad_(True)

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        images = world.sample(config.vae_batch, 10**6 * (cycle + 1) + step).images * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        log["reconstruction"], log["kl"] = error.square().mean().item(), kl.item()
        yield error.abs().mean() + 0.3 * error.square().mean() + 0.5 * edges + config.kl * kl

    optimisation = Optimisation(
        config.vae_steps[cycle], config.vae_lr, warmup=50, cosine=True, clip=1.0, checkpoint_every=200,
        seed=config.seed + cycle,
    )  # fmt: skip
    fit(dict(vae.named_parameters()), losses, optimisation, run)
    vae.requires_grad_(False)


@torch.no_grad()
def pool(model: Flux, config: EmojiFlux, folder: pathlib.Path) -> tuple[Tensor, list[str]]:
    """Unscaled latents of the training pictures (images, tokens, channels), and captions; kept in two files.

    A quarter of them are single objects beside the world's own share: large there and nowhere else, they are learned
    last.
    """
    tensors, texts = folder / "latents.safetensors", folder / "captions.json"
    if not texts.exists():
        world, latents, captions = EmojiWorld(), [], []
        vae = model.pipeline.vae
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        for chunk in range(config.images // CHUNK):
            seed = config.seed * 10**5 + chunk
            alone = CHUNK // 4  # single objects beside the world's own share
            batch = world.sample(CHUNK - alone, seed)
            draw = random.Random(seed)
            single = [
                Scene((Group(draw.choice(OBJECTS)),), None, draw.choice((None, *BACKGROUNDS))) for _ in range(alone)
            ]
            images = torch.cat([batch.images, world.render(single, torch.Generator().manual_seed(seed))])
            latents.append((model.encode_images(images) / scale + shift).half())
            captions += [*batch.captions, *map(str, single)]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents)}, tensors)
        write_atomically(texts, json.dumps(captions))
    return load_file(tensors)["latents"].float(), json.loads(texts.read_text(encoding="utf-8"))


def write_card(config: EmojiFlux, folder: pathlib.Path, name: str) -> None:
    """card.json (which world judges it, what made it, what it scores), the same in words, and samples.png."""
    world, model = EmojiWorld(), load(str(folder))
    draw = sampler(model, STEPS, GUIDANCE)
    asked = {kind: [scene for scene in found for _ in range(2)] for kind, found in kinds().items()}
    rows = {kind: share(ask(draw, world, found, 1, seed).right()) for seed, (kind, found) in enumerate(asked.items())}
    parameters = sum(p.numel() for p in model.network.parameters())
    card = {
        "world": "emoji",
        "size": SIDE,
        "command": f"python -m experiments pretrain {name} --out DIR",
        "settings": plain(config),
        "parameters": parameters,
        "guidance": GUIDANCE,
        f"judged right, {STEPS} steps": {kind: row.to_json() for kind, row in rows.items()},
    }
    write_atomically(folder / "card.json", json.dumps(card, indent=1) + "\n")
    shown = [
        str(found[2 * i % len(found)]) for i in range(4) for found in asked.values()
    ]  # a row of four lines a kind of prompt
    save_grid(draw(shown, 0), folder / "samples.png", columns=len(asked), scale=2)
    lines = [
        f"# zoo:{name}",
        "",
        f"A FluxPipeline with a transformer of {parameters:,} parameters that draws emoji on pastel grounds,",
        f"{SIDE} pixels. Trained by fieldsmith on its own emoji world; Apache-2.0. What it draws are the Noto colour",
        "emoji, which are under the SIL Open Font License (worlds/emoji-OFL.txt). Weights are kept in float16.",
        "",
        f"Made by `{card['command']}` with the recipe's defaults.",
        "Captions have a grammar (docs/worlds.md). A fifth of the pairs of objects never met in training. The judge",
        "names what it sees from pixels alone; share of images that show what was asked and nothing else,",
        f"{STEPS} steps, guidance {GUIDANCE:g}:",
        "",
        "| prompts | right [95%] |",
        "|---|---|",
        *(f"| {kind} | {row} |" for kind, row in rows.items()),
        "",
        "![samples](samples.png)",
        "",
        "A column of samples is a kind of prompt, in the order of the table.",
        "",
        "```python",
        'pipe("a cat and a dog on blue", negative_prompt="", true_cfg_scale=2.5, height=48, width=48,',
        "     num_inference_steps=28, max_sequence_length=12).images[0]",
        "```",
    ]
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")
