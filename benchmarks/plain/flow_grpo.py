"""Flow-GRPO (arXiv 2505.05470): PPO on the steps of a flow's SDE, rewards compared within a prompt.

With `fork` above 0 a prompt's rollouts are one ODE up to that step, and only the steps after it are drawn and trained,
as in its fast variants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain.flux import adapted, encoded, frozen_copy, images, noise, reference, rows, seeded, times, velocity

ATTENTION = r".*\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


def sde_step(x: Tensor, v: Tensor, t: Tensor, after: Tensor, start: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of x at the time `after`; `start` stands for a time of 1, where the noise is unbounded."""
    t, after = (time.reshape(-1, 1, 1) for time in (t, after))
    dt, q2 = after - t, a**2 * t / (1 - torch.where(t >= 1, start, t))
    return x * (1 + q2 * dt / (2 * t)) + v * (1 + q2 * (1 - t) / (2 * t)) * dt, (q2 * -dt).sqrt()


def log_prob(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Mean over a state's numbers; what does not hang on the mean is left out."""
    return (-((x - mean) ** 2) / (2 * deviation**2)).flatten(1).mean(1)


def flow_grpo(
    pipe: Any, prompts: Sequence[str], reward: Callable[[Tensor], Tensor], collections: int, *, groups: int = 8,
    rollouts: int = 8, sampler_steps: int = 10, noise_level: float = 0.7, clip: float = 0.05, kl: float = 0.004,
    updates: int = 2, rank: int = 16, lr: float = 1e-3, fork: int = 0, without: Collection[str] = (),
) -> Iterator[float]:  # fmt: skip
    net = pipe.transformer
    second = frozen_copy(net) if "adapter off as the reference" in without else None
    params, text, ts = adapted(net, ATTENTION, rank), encoded(pipe, prompts), times(pipe, sampler_steps)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-4)
    for epoch in range(collections):
        generator = seeded(epoch, 5)
        prompt = torch.randperm(len(prompts), generator=generator)[torch.arange(groups) % len(prompts)]
        split = 0 if "prefix shared by a prompt's rollouts" in without else fork
        prompt = prompt if fork else prompt.repeat_interleave(rollouts)
        x, before, after, old = noise(pipe, len(prompt), generator), [], [], []
        with torch.no_grad():
            for k in range(sampler_steps):
                if fork and k == split:
                    x, prompt = x.repeat_interleave(rollouts, 0), prompt.repeat_interleave(rollouts)
                if "prompts encoded once" in without:
                    text = encoded(pipe, prompts)
                v = velocity(pipe, net, x, ts[k], rows(text, prompt))
                if k < fork:
                    x = x + (ts[k + 1] - ts[k]) * v
                    continue
                mean, deviation = sde_step(x, v, ts[k], ts[k + 1], ts[1], noise_level)
                x_next = mean + deviation * torch.randn(x.shape, generator=generator)
                before, after, old = [*before, x], [*after, x_next], [*old, log_prob(x_next, mean, deviation)]
                x = x_next
            r = reward(images(pipe, x)).reshape(groups, rollouts)
        advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-4)
        steps = torch.arange(fork, sampler_steps).repeat_interleave(len(x))
        before, after, old = torch.cat(before), torch.cat(after), torch.cat(old)
        everything = (part.repeat(sampler_steps - fork) for part in (advantage.clamp(-5, 5).flatten(), prompt))
        A, prompt = everything
        for at in torch.randperm(len(steps), generator=seeded(epoch, 6)).tensor_split(updates):
            x, k, given = before[at], steps[at], rows(text, prompt[at])
            v = velocity(pipe, net, x, ts[k], given)
            with torch.no_grad(), reference(net, second) as teacher:
                v_ref = velocity(pipe, teacher, x, ts[k], given)
            mean, deviation = sde_step(x, v, ts[k], ts[k + 1], ts[1], noise_level)
            mean_ref, _ = sde_step(x, v_ref, ts[k], ts[k + 1], ts[1], noise_level)
            rho, eps = (log_prob(after[at], mean, deviation) - old[at]).exp(), clip / x[0].numel()
            policy = -torch.minimum(rho * A[at], rho.clamp(1 - eps, 1 + eps) * A[at])
            loss = (policy + kl * -log_prob(mean_ref, mean, deviation)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            yield loss.item()
