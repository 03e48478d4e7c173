"""Diffusion-DPO (arXiv 2311.12908) on either path: from preference pairs, without rollouts and without a reward.

In: an AlignContext with pairs. Out: the losses of an update, and by how much the model prefers what people chose in
held-out pairs. Draws are made for all processes, of which each takes its own pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fieldsmith import preflight, processes
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.align.losses import dpo_loss, log_gain
from fieldsmith.methods.align.pairs import Pairs
from fieldsmith.methods.policy.schedule import Schedule
from fieldsmith.models.core import predict_rows
from fieldsmith.paths import noised
from fieldsmith.preflight import Check
from fieldsmith.training import Log, step_generator

MOST = 256  # held-out pairs that are ranked
DRAWS = 16  # times and noises at which each of them is


def given(context: AlignContext) -> Pairs:
    assert context.pairs is not None
    return context.pairs


@dataclass(frozen=True)
class Draw:
    """n rows: a pair, a step of the sampler, and the noise of its two images (2, n, ...), one noise where shared."""

    pair: Tensor
    step: Tensor
    noise: Tensor

    @staticmethod
    def of(pairs: Pairs, pair: Tensor, step: Tensor, shared: bool, generator: torch.Generator) -> Draw:
        noise = torch.randn(1 if shared else 2, len(pair), *pairs.chosen.shape[1:], generator=generator)
        return Draw(pair, step, noise.expand(2, *noise.shape[1:]))


def gains(context: AlignContext, draw: Draw, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted log_gain of the chosen and of the rejected images of a draw's rows, (n,) each; without guidance."""
    model, s, pairs = context.model, context.schedule, given(context)
    different, back = torch.unique(draw.pair[rows], return_inverse=True)
    x_0 = torch.cat((pairs.chosen[different][back], pairs.rejected[different][back])).to(model.device)
    eps = draw.noise[:, rows].flatten(0, 1).to(x_0)
    step, prompt = draw.step[rows].repeat(2), pairs.prompt[draw.pair[rows]].repeat(2)
    t = s.times[step].to(x_0)
    x_t = noised(s.path, x_0, eps, t)

    def output() -> Tensor:
        return predict_rows(model, x_t, t, context.condition, prompt, None).value

    with torch.no_grad(), model.reference():  # before f, whose graph takes memory
        reference = output()
    weight = posterior_weight(s)[step].to(t) if context.config.dpo_weight == "posterior" else 1.0
    chosen, rejected = (weight * log_gain(output(), reference, s.target(x_0, eps, step))).chunk(2)
    return chosen, rejected


def posterior_weight(s: Schedule) -> Tensor:
    """(d x_0 / d f)^2 / Var(x_0 | x_t) by step for data of variance 1, as latents are scaled, (K,).

    An error so weighed is what a Gaussian posterior's log-density has, so that weak preferences tilt a Gaussian as much
    at every time; equally weighed errors of eps tilt it 1 / alpha^2 times as much, which is 200 at the start of SD1.5.
    """
    alpha, sigma = s.path.alpha(s.t), s.path.sigma(s.t)
    return s.gain**2 * (alpha**2 + sigma**2) / sigma**2


class PairUpdates:
    """Updates on pairs, each at times and with noise of its own."""

    block = 1

    def __init__(self, context: AlignContext):
        self.context, self.pairs = context, given(context)
        self.learned = (~self.pairs.held_out).nonzero().squeeze(1)

    def losses(self, step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        """The mean of dpo_loss over an update's pairs and times, in chunks; this process's part of it."""
        config, steps = self.context.config, len(self.context.schedule)
        n, times = config.prompts_per_epoch, min(config.renoise, steps)
        pair = self.learned[torch.randint(len(self.learned), (n,), generator=generator)]
        at = torch.rand(n, steps, generator=generator).argsort(1)[:, :times].flatten()  # without repeats
        draw = Draw.of(self.pairs, pair.repeat_interleave(times), at, config.shared_noise, generator)
        own = (processes.owned(n)[:, None] * times + torch.arange(times)).flatten()
        for rows, real in processes.chunks(own, max(1, config.chunk // 2)):
            chosen, rejected = gains(self.context, draw, rows)
            if real:
                log.mean("preference accuracy", chosen > rejected)
                log.mean("log gain of the chosen", chosen)
                log.mean("log gain of the rejected", rejected)
            yield real * dpo_loss(chosen, rejected, config.temperature).sum() / (n * times)

    def checks(self) -> list[Check]:
        """The gradient of step 0's first chunk, which is thrown away."""
        loss = next(self.losses(0, step_generator(self.context.config.seed, 0), Log()))
        return preflight.gradients(self.context.model, loss)


@torch.no_grad()
def margins(context: AlignContext) -> Tensor:
    """beta (g_w - g_l) of up to MOST held-out pairs (of all where none is), each the mean over DRAWS draws; (n,)."""
    pairs = given(context)
    rows = (pairs.held_out if bool(pairs.held_out.any()) else ~pairs.held_out).nonzero().squeeze(1)
    some = rows[torch.arange(min(MOST, len(rows))) * len(rows) // min(MOST, len(rows))]
    generator = step_generator(context.config.seed, 0, stream=15)
    total = torch.zeros(len(some))
    for _ in range(DRAWS):
        step = torch.randint(len(context.schedule), (len(some),), generator=generator)
        draw = Draw.of(pairs, some, step, context.config.shared_noise, generator)
        found = [torch.zeros(0)]
        for at, real in processes.chunks(processes.owned(len(some)), max(1, context.config.chunk // 2)):
            chosen, rejected = gains(context, draw, at)
            found += [(chosen - rejected).float().cpu()] if real else []
        total += context.config.temperature * processes.gather(torch.cat(found)) / DRAWS
    return total
