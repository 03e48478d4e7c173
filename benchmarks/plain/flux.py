"""FLUX's pipeline taken apart, for the loops beside this file: noise, times, encoded prompts, velocities, images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from peft import LoraConfig
from torch import Tensor

Text = tuple[Tensor, Tensor]  # embeddings (n, tokens, width) and pooled ones (n, width)


def seeded(step: int, stream: int = 0) -> torch.Generator:
    """A step's draws; the numbers are those of fieldsmith at seed 0, so that both draw the same."""
    return torch.Generator().manual_seed(step * 1_000_003 + stream)


def adapted(net: Any, targets: str, rank: int) -> list[Tensor]:
    """Attach a LoRA; what trains."""
    net.requires_grad_(False)
    torch.manual_seed(0)
    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return [p for p in net.parameters() if p.requires_grad]


def frozen_copy(net: Any) -> Any:
    """The reference as a second network."""
    return copy.deepcopy(net).requires_grad_(False)


@contextlib.contextmanager
def reference(net: Any, second: Any) -> Iterator[Any]:
    """The network as it was: a second one where there is one, else the same with its adapter off."""
    if second is not None:
        yield second
        return
    net.disable_adapters()
    yield net
    net.enable_adapters()


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str]) -> Text:
    length = min(512, pipe.tokenizer_2.model_max_length)
    return pipe.encode_prompt(list(prompts), device=pipe.transformer.device, max_sequence_length=length)[:2]


def rows(text: Text, at: Any) -> Text:
    return text[0][at], text[1][at]


def side(pipe: Any) -> int:
    """Tokens along an image's edge."""
    return pipe.vae.config.sample_size // (2 * pipe.vae_scale_factor)


def noise(pipe: Any, n: int, generator: torch.Generator) -> Tensor:
    channels, edge = pipe.transformer.config.in_channels // 4, 2 * side(pipe)
    return FluxPipeline._pack_latents(
        torch.randn(n, channels, edge, edge, generator=generator), n, channels, edge, edge
    )


def times(pipe: Any, steps: int) -> Tensor:
    """The scheduler's, (steps + 1,), from 1 to 0."""
    config = pipe.scheduler.config
    mu = calculate_shift(
        side(pipe) ** 2, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return pipe.scheduler.sigmas


def velocity(pipe: Any, net: Any, x: Tensor, t: Tensor, text: Text, source: Tensor | None = None) -> Tensor:
    """At x (n, tokens, channels) and t (n,) or (); of an editor beside a source's tokens."""
    embeds, pooled = (part.expand(len(x), *part.shape[1:]) for part in text)
    ids = FluxPipeline._prepare_latent_image_ids(1, side(pipe), side(pipe), x.device, x.dtype)
    if source is not None:
        ids = torch.cat((ids, ids + torch.tensor([1.0, 0, 0])))
    output = net(
        hidden_states=x if source is None else torch.cat((x, source), 1), timestep=t.expand(len(x)),
        encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=torch.zeros(embeds.shape[1], 3), img_ids=ids,
        return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x.shape[1]]


def guided(pipe: Any, x: Tensor, t: Tensor, text: Text, null: Text, scale: float, together: bool) -> Tensor:
    """Classifier-free guidance, both branches in one forward or each in its own."""
    if together:
        n, both = len(x), tuple(torch.cat((a.expand(len(x), *a.shape[1:]), b.expand(len(x), *b.shape[1:])))
                                for a, b in zip(text, null, strict=True))  # fmt: skip
        c, u = velocity(pipe, pipe.transformer, torch.cat((x, x)), t.expand(2 * n), both).chunk(2)
    else:
        c, u = (velocity(pipe, pipe.transformer, x, t, one) for one in (text, null))
    return u + scale * (c - u)


@torch.no_grad()
def images(pipe: Any, x: Tensor) -> Tensor:
    """In [0, 1]."""
    pixels, vae = pipe.vae.config.sample_size, pipe.vae
    latents = FluxPipeline._unpack_latents(x, pixels, pixels, pipe.vae_scale_factor)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def latents(pipe: Any, pictures: Tensor) -> Tensor:
    """Packed."""
    z = pipe.vae.encode(pictures * 2 - 1).latent_dist.mode()
    z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, *z.shape)


def free_encoders(pipe: Any) -> None:
    """The text encoders' weights go, once prompts are encoded."""
    pipe.text_encoder = pipe.text_encoder_2 = None
