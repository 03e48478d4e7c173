"""GEM (arXiv 2606.00140): push a prompt's velocities off its own and onto an anchor's, along its own rollouts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from benchmarks.plain.flux import (
    adapted,
    encoded,
    free_encoders,
    frozen_copy,
    guided,
    noise,
    reference,
    rows,
    seeded,
    times,
    velocity,
)

QK = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)"


def norm(z: torch.Tensor) -> torch.Tensor:
    return (z.flatten(1).square().sum(1) + 1e-12).sqrt()


def gem(
    pipe: Any, target: str, anchor: str, steps: int, *, batch: int = 1, sampler_steps: int = 28,
    window: tuple[int, int] = (1, 11), guidance: float = 3.0, rank: int = 16, lr: float = 1e-3, gamma: float = 100.0,
    without: Collection[str] = (),
) -> Iterator[float]:  # fmt: skip
    net, (first, last) = pipe.transformer, window
    second = frozen_copy(net) if "adapter off as the reference" in without else None
    optimizer = torch.optim.AdamW(adapted(net, QK, rank), lr=lr, weight_decay=0.01)
    text, ts = encoded(pipe, [target, anchor, ""]), times(pipe, sampler_steps)
    if "text encoders kept" in without:
        free_encoders(pipe)
    for step in range(steps):
        if "prompts encoded once" in without:
            text = encoded(pipe, [target, anchor, ""])
        at_target, at_anchor, null = (rows(text, [i]) for i in range(3))
        generator = seeded(step)
        torch.randint(1, (1,), generator=generator)  # which of the pairs, here one
        x, states = noise(pipe, batch, generator), []
        with torch.no_grad():  # the student's own rollout
            for k in range(sampler_steps if "rollouts end with the window" in without else last + 1):
                states.append(x)
                if k < last or "rollouts end with the window" in without:
                    v = guided(pipe, x, ts[k], at_target, null, guidance, "branches in one forward" not in without)
                    x = x + (ts[k + 1] - ts[k]) * v
        x, t = torch.cat(states[first : last + 1]), ts[first : last + 1].repeat_interleave(batch)
        with torch.no_grad(), reference(net, second) as teacher:
            p, n = (velocity(pipe, teacher, x, t, one) for one in (at_anchor, at_target))
        v = velocity(pipe, net, x, t, at_target)
        loss = gamma * torch.relu(norm(v - p) - norm(v - n)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
