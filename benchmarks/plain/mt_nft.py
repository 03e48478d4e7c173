"""MT-EditFlow's NFT: an editor on its own results, turn after turn, every turn with the advantage of its session."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain.flow_grpo import ATTENTION
from benchmarks.plain.flux import adapted, encoded, images, latents, noise, rows, seeded, times, velocity
from benchmarks.plain.nft import contrast, renoised

Sessions = tuple[Tensor, Sequence[Sequence[str]]]  # first images (n, 3, h, w) and each turn's n instructions
Judge = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> following and consistency, (n,) each


def quantised(pictures: Tensor) -> Tensor:
    """At 8-bit levels, as they are saved and read between two turns."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def normalised(scores: Tensor) -> Tensor:
    """Within a group, dimension 1, over a deviation of at least .05."""
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True).clamp(min=0.05)


def mt_nft(
    pipe: Any, sessions: Callable[[int, int], Sessions], judge: Judge, collections: int, *, groups: int, rollouts: int,
    sampler_steps: int = 6, renoise: int = 3, updates: int = 4, rank: int = 16, lr: float = 1e-3,
    without: Collection[str] = (),
) -> Iterator[float]:  # fmt: skip
    net = pipe.transformer
    params, ts = adapted(net, ATTENTION, rank), times(pipe, sampler_steps)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    for epoch in range(collections):
        generator = seeded(epoch, 5)
        first, turns = sessions(groups, int(torch.randint(2**31, (1,), generator=generator)))
        picture = quantised(first).repeat_interleave(rollouts, 0)
        texts, sources, results, scores = [], [], [], []
        with torch.no_grad():
            for instructions in turns:
                if "prompts encoded once a group" in without:
                    text = encoded(pipe, [words for words in instructions for _ in range(rollouts)])
                else:
                    text = rows(encoded(pipe, instructions), torch.arange(groups).repeat_interleave(rollouts))
                source, x = latents(pipe, picture), noise(pipe, len(picture), generator)
                for k in range(sampler_steps):
                    x = x + (ts[k + 1] - ts[k]) * velocity(pipe, net, x, ts[k], text, source)
                picture = quantised(images(pipe, x))
                scores.append(torch.stack(judge(picture)).reshape(2, groups, rollouts))
                texts, sources, results = [*texts, text], [*sources, source], [*results, x]
            x_t, t = renoised(torch.cat(results), ts, renoise, seeded(epoch, 7))
            edit = torch.arange(len(t)) // renoise
            text = tuple(torch.cat(part) for part in zip(*texts, strict=True))
            source, x_0 = torch.cat(sources), torch.cat(results)
            v_old = velocity(pipe, net, x_t, t, rows(text, edit), source[edit])
        following, consistency = torch.stack(scores).mean(0)  # of the session
        advantage = (normalised(following) + 0.5 * normalised(consistency)) / (1 + 0.5**2) ** 0.5
        r = (0.5 + advantage.clamp(-2, 2) / 4).flatten().repeat(len(turns))
        for at in torch.randperm(len(t), generator=seeded(epoch, 6)).tensor_split(updates):
            which = edit[at]
            v = velocity(pipe, net, x_t[at], t[at], rows(text, which), source[which])
            loss = contrast(v, v_old[at], x_t[at], t[at], x_0[which], r[which], 1.0).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            yield loss.item()
