"""The recipe of zoo:scenes-kontext: a real Flux Kontext pipeline that edits the scenes world, one turn at a time.

First its VAE (24 pixels to 6 x 6 x 16 latents, so 9 tokens, one a cell), then transformer and text encoders together
on clean pairs: planned state before, instruction, planned state after. It never sees its own outputs.
`python -m experiments pretrain scenes-kontext --out DIR` repeats it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tiny import kontext_pipeline
from fieldsmith.measure.editing import scores
from fieldsmith.measure.exposure import exposure
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.paths import noised
from fieldsmith.run import Run, plain, write_atomically
from fieldsmith.training import Optimisation, fit
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld


@dataclass(frozen=True)
class ScenesKontext:
    """Settings of the recipe; the defaults made the model in the zoo."""

    seed: int = 0
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
    for part in (run, vae_run):
        part.begin()
    pipeline = kontext_pipeline(
        VOCABULARY, vae_channels=(16, 32, 32), latent_channels=16, heads=config.heads, text_length=10,
        size=config.size, seed=config.seed,
    )  # fmt: skip
    model = FluxKontext(pipeline, f"zoo:{name}")
    sessions = ScenesWorld(config.size).sessions(config.sessions, 3, config.seed, config.dependency, config.still)
    states = torch.stack([(sessions.clean(turn) * 255).round().byte() for turn in range(4)], 1)  # (n, 4, 3, size, size)
    images = states.flatten(0, 1)
    vae = model.pipeline.vae
    vae.requires_grad_(True)

    def vae_losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        rows = torch.randint(len(images), (config.vae_batch,), generator=generator)
        shown = images[rows] / 127.5 - 1
        posterior = vae.encode(shown).latent_dist
        again = vae.decode(posterior.sample(generator)).sample
        error = (again - shown).square().mean()
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        log["reconstruction"], log["kl"] = error.item(), kl.item()
        yield error + config.kl * kl

    fit(
        dict(vae.named_parameters()), vae_losses,
        Optimisation(
            config.vae_steps, config.vae_lr, 0.0, 50, cosine=True, clip=1.0, checkpoint_every=250, seed=config.seed
        ),
        vae_run,
    )  # fmt: skip
    vae.requires_grad_(False)
    latents = torch.cat([model.encode_images(part / 255) for part in images.split(256)])
    # one scale and shift for all channels, as Flux has: the flow sees zero mean and unit variance
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    latents = ((latents - latents.mean()) / latents.std()).unflatten(0, (len(sessions), 4))
    prompts = [sessions.prompts(turn) for turn in (1, 2, 3)]

    parts = {"transformer": model.network, "clip": model.pipeline.text_encoder, "t5": model.pipeline.text_encoder_2}
    parameters: dict[str, Tensor] = {}
    for key, part in parts.items():
        part.requires_grad_(True)
        parameters |= {f"{key}.{inside}": p for inside, p in part.named_parameters()}

    def flow_losses(step: int, generator: torch.Generator, log: dict[str, float]) -> Iterator[Tensor]:
        rows = torch.randint(len(sessions), (config.batch,), generator=generator)
        turns = torch.randint(3, (config.batch,), generator=generator)
        x_0, source = latents[rows, turns + 1], latents[rows, turns]
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(config.batch, generator=generator))
        told = [prompts[turn][row] for row, turn in zip(rows.tolist(), turns.tolist(), strict=True)]
        condition = model.with_latents(model.encode(told, grad=True), source)
        velocity = model.predict(noised(model.path, x_0, eps, t), t, condition).velocity
        yield (velocity - (eps - x_0)).square().mean()

    fit(
        parameters, flow_losses,
        Optimisation(
            config.decay, config.lr, 0.01, 200, cosine=True, clip=1.0, ema=config.ema, checkpoint_every=500,
            seed=config.seed,
        ),
        run,
        lambda done, log: "enough" if done >= config.steps else None,
    )  # fmt: skip
    for part in parts.values():
        part.requires_grad_(False)
    model.save(folder / "model")
    write_card(model, config, folder / "model", name)
    return model


def write_card(model: FluxKontext, config: ScenesKontext, folder: pathlib.Path, name: str, n: int = 1600) -> None:
    """card.json (which world judges it, what made it, what it scores) and the same in words, README.md."""
    found = exposure(model, ScenesWorld(config.size).sessions(n, 3, 99, 0.7), 8, seed=1)
    scored = scores(found.sessions)
    numbers = {
        key: [{"value": x.value, "low": x.low, "high": x.high, "n": x.n} for x in getattr(scored, key)]
        for key in ("following", "marginal", "teacher_forced", "consistency", "overall")
    }
    card = {
        "world": "scenes",
        "size": config.size,
        "command": f"python -m experiments pretrain {name} --out DIR",
        "settings": plain(config),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "held-out sessions of 3 turns, dependency 0.7, 8 steps": numbers,
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
