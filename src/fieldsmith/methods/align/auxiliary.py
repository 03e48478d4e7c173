"""Learned helpers of some methods: DPOK's baseline, DAG's flow, the residual of nabla-DB, VGG-Flow's value gradient.

The paper finds that the last two stay negligible and can go; the pruned recipes leave them out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Auxiliary(nn.Module):
    """A perceptron on every token, which also sees the state's mean, the time and which training prompt it is.

    Takes x (n, tokens, channels), (n, channels, h, w) or (n, d), t (n,), prompt (n,); gives (n,) or, as a field, x's
    shape. Its output starts at zero. One size for all resolutions, since weights are shared over tokens.
    """

    def __init__(self, like: Tensor, prompts: int, field: bool, seed: int, width: int = 128):
        super().__init__()
        channels = _tokens(like).shape[-1]
        self.field = field
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.prompts = nn.Embedding(prompts, 32)
            self.inner = nn.Sequential(
                nn.Linear(2 * channels + 35, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
            )
            self.last = nn.Linear(width, channels if field else 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.to(like.device)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        tokens = _tokens(x)
        times = torch.stack((t, t.square(), (torch.pi * t).cos()), -1).to(tokens)
        known = torch.cat((tokens.mean(1), times, self.prompts(prompt.to(x.device))), -1)
        hidden = self.inner(torch.cat((tokens, known[:, None].expand(-1, tokens.shape[1], -1)), -1))
        output: Tensor = self.last(hidden)
        if not self.field:
            return output.mean((1, 2))
        return output.mT.reshape(x.shape) if x.ndim == 4 else output.reshape(x.shape)


def _tokens(x: Tensor) -> Tensor:
    """(n, tokens, channels)."""
    if x.ndim == 4:
        return x.flatten(2).mT
    return x[:, None] if x.ndim == 2 else x
