"""What the recipes of small Flux pipelines share: first the VAE is trained, then transformer and text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fieldsmith.measure.intervals import Interval
from fieldsmith.models.core import Condition
from fieldsmith.models.flux import Flux
from fieldsmith.paths import noised
from fieldsmith.run import Run
from fieldsmith.training import Log, Optimisation, fit


class FlowRecipe(Protocol):
    """Settings of the training of transformer and text encoders."""

    seed: int
    batch: int
    lr: float
    ema: float


class Recipe(FlowRecipe, Protocol):
    """Settings of both trainings."""

    vae_steps: int
    vae_batch: int
    vae_lr: float
    kl: float  # weight of the latents' KL to N(0, I), per latent number


def train_vae(model: Flux, images_at: Callable[[Tensor], Tensor], pool: int, config: Recipe, run: Run) -> None:
    """On random images of `pool`; images_at(rows) gives them, (n, 3, size, size) in [-1, 1]."""
    vae = model.pipeline.vae
    vae.requires_grad_(True)

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        images = images_at(torch.randint(pool, (config.vae_batch,), generator=generator))
        posterior = vae.encode(images).latent_dist
        again = vae.decode(posterior.sample(generator)).sample
        error = (again - images).square().mean()
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        log["reconstruction"], log["kl"] = error.item(), kl.item()
        yield error + config.kl * kl

    fit(
        dict(vae.named_parameters()), losses,
        Optimisation(
            config.vae_steps, config.vae_lr, 0.0, 50, cosine=True, clip=1.0, checkpoint_every=250, seed=config.seed
        ),
        run,
    )  # fmt: skip
    vae.requires_grad_(False)


def standardised(model: Flux, latents: Tensor) -> Tensor:
    """Latents of the training pool with zero mean and unit variance; the VAE is told to give such from now on."""
    # one scale and shift for all channels, as Flux has
    model.pipeline.vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return (latents - latents.mean()) / latents.std()


def train_flow(
    model: Flux,
    drawn: Callable[[int, torch.Generator], tuple[Tensor, Condition]],
    steps: int,
    config: FlowRecipe,
    run: Run,
    stop: Callable[[int, dict[str, float]], str | None] | None = None,
) -> None:
    """Transformer and text encoders by flow matching; drawn(n, generator) gives clean latents and their condition."""
    parts = {"transformer": model.network, "clip": model.pipeline.text_encoder, "t5": model.pipeline.text_encoder_2}
    parameters: dict[str, Tensor] = {}
    for key, part in parts.items():
        part.requires_grad_(True)
        parameters |= {f"{key}.{inside}": p for inside, p in part.named_parameters()}

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        x_0, condition = drawn(config.batch, generator)
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(config.batch, generator=generator))
        velocity = model.predict(noised(model.path, x_0, eps, t), t, condition).velocity
        yield (velocity - (eps - x_0)).square().mean()

    fit(
        parameters, losses,
        Optimisation(
            steps, config.lr, 0.01, 200, cosine=True, clip=1.0, ema=config.ema, checkpoint_every=500, seed=config.seed
        ),
        run, stop,
    )  # fmt: skip
    for part in parts.values():
        part.requires_grad_(False)


def numbers(one: Interval) -> dict[str, float]:
    """What card.json holds of an interval."""
    return {"value": one.value, "low": one.low, "high": one.high, "n": one.n}
