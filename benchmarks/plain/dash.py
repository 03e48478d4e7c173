"""DASH's distillation: a small network learns both branches of a frozen class-conditional one, at noised data."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain.flux import seeded


def both(net: Any, x: Tensor, index: Tensor, label: Tensor, null: int, together: bool) -> tuple[Tensor, Tensor]:
    """Predicted noise with the class and without one."""
    nothing = torch.full_like(label, null)
    if together:
        return net(torch.cat((x, x)), torch.cat((index, index)), torch.cat((label, nothing))).sample.chunk(2)
    return net(x, index, label).sample, net(x, index, nothing).sample


def dash(
    teacher: Any, student: Any, scheduler: Any, states: Tensor, labels: Tensor, steps: int, *, pairs: int = 64,
    total: int = 1_500, lr: float = 8e-3, warmup: int = 100, ema: float = 0.999, without: Collection[str] = (),
) -> Iterator[float]:  # fmt: skip
    together, null = "branches in one forward" not in without, teacher.config.num_class_embeds - 1
    teacher.requires_grad_(False)
    params = list(student.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * n / total))
    )
    average = [p.detach().clone() for p in params]
    for step in range(steps):
        generator = seeded(step)
        index = (torch.rand(pairs, generator=generator) * len(scheduler.alphas_cumprod)).long()
        picked = torch.randint(len(states), (pairs,), generator=generator)
        x_0 = states[picked].half().float()  # numbers of half precision, as fieldsmith's cache on disk has them
        eps = torch.randn(x_0.shape, generator=generator).half().float()
        x_t, label = scheduler.add_noise(x_0, eps, index), labels[picked]
        with torch.no_grad():
            t_c, t_u = both(teacher, x_t, index, label, null, together)
        s_c, s_u = both(student, x_t, index, label, null, together)
        errors = (s_c - t_c).square() + (s_u - t_u).square() + 0.1 * (s_c - eps).square()
        loss = errors.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for kept, p in zip(average, params, strict=True):
                kept.lerp_(p, 1 - min(ema, (1 + step) / (10 + step)))
        yield loss.item()
