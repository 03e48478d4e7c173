"""DiffusionNFT (arXiv 2509.16117): results of an ODE noised again, contrasted by how good they are in their group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain.flow_grpo import ATTENTION
from benchmarks.plain.flux import adapted, encoded, frozen_copy, images, noise, reference, rows, seeded, times, velocity


def branch_error(v: Tensor, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """|x_0_hat - x_0|^2 over its own mean absolute error, (n,)."""
    apart = x_t - t.reshape(-1, 1, 1) * v - x_0
    return apart.square().flatten(1).mean(1) / apart.detach().abs().flatten(1).mean(1).clamp(min=1e-5)


def contrast(v: Tensor, v_old: Tensor, x_t: Tensor, t: Tensor, x_0: Tensor, r: Tensor, beta: float) -> Tensor:
    """r |v_plus|^2 + (1 - r) |v_minus|^2 in errors of x_0, (n,)."""
    plus, minus = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    return r * branch_error(plus, x_t, t, x_0) + (1 - r) * branch_error(minus, x_t, t, x_0)


def renoised(x_0: Tensor, ts: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each of x_0 noised anew at n of the sampler's times: x_t and its times."""
    k = torch.stack([torch.randperm(len(ts) - 1, generator=generator)[:n] for _ in x_0]).flatten()
    eps = torch.randn(len(k), *x_0.shape[1:], generator=generator)
    t = ts[k]
    return (1 - t).reshape(-1, 1, 1) * x_0.repeat_interleave(n, 0) + t.reshape(-1, 1, 1) * eps, t


def nft(
    pipe: Any, prompts: Sequence[str], reward: Callable[[Tensor], Tensor], collections: int, *, groups: int = 8,
    rollouts: int = 8, sampler_steps: int = 10, renoise: int = 4, beta: float = 0.1, kl: float = 1e-4, updates: int = 2,
    rank: int = 16, lr: float = 1e-3, without: Collection[str] = (),
) -> Iterator[float]:  # fmt: skip
    net = pipe.transformer
    second = frozen_copy(net) if "adapter off as the reference" in without else None
    params, text, ts = adapted(net, ATTENTION, rank), encoded(pipe, prompts), times(pipe, sampler_steps)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-4)
    for epoch in range(collections):
        generator = seeded(epoch, 5)
        prompt = torch.randperm(len(prompts), generator=generator)[torch.arange(groups) % len(prompts)]
        prompt = prompt.repeat_interleave(rollouts)
        x = noise(pipe, len(prompt), generator)
        with torch.no_grad():
            for k in range(sampler_steps):
                if "prompts encoded once" in without:
                    text = encoded(pipe, prompts)
                x = x + (ts[k + 1] - ts[k]) * velocity(pipe, net, x, ts[k], rows(text, prompt))
            x_t, t = renoised(x, ts, renoise, generator)
            x_0, prompt = (part.repeat_interleave(renoise, 0) for part in (x, prompt))
            v_old = velocity(pipe, net, x_t, t, rows(text, prompt))
            score = reward(images(pipe, x)).reshape(groups, rollouts)
        advantage = (score - score.mean(1, keepdim=True)) / (score.std(1, correction=0, keepdim=True) + 1e-4)
        r = (0.5 + advantage.clamp(-5, 5) / 10).flatten().repeat_interleave(renoise)
        for at in torch.randperm(len(r), generator=seeded(epoch, 6)).tensor_split(updates):
            given = rows(text, prompt[at])
            v = velocity(pipe, net, x_t[at], t[at], given)
            with torch.no_grad(), reference(net, second) as teacher:
                v_ref = velocity(pipe, teacher, x_t[at], t[at], given)
            losses = contrast(v, v_old[at], x_t[at], t[at], x_0[at], r[at], beta)
            losses = 5 / beta * losses  # the advantages' clip over beta, as released
            loss = (losses + kl * (v - v_ref).square().flatten(1).mean(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            yield loss.item()
