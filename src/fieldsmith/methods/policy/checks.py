"""What methods that train on their own rollouts check before the first update.

A network's output at a row may hang on the batch that it is in: a GPU's matrix kernels are chosen by shape. Log-ratios
to an output of the rollout then hold noise. Where that is more than a tenth of the trust region's radius, outputs are
computed again in the loss's own chunks (`Rounding`), at one forward more a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.policy.losses import HINGES, Trust, log_ratio
from fieldsmith.methods.policy.rollouts import Transitions
from fieldsmith.methods.policy.schedule import Schedule
from fieldsmith.models.core import Model
from fieldsmith.preflight import Check


def radius(trust: Trust, clip: float, s: Schedule) -> float:
    """Of a trust region, in nats of a step's log-ratio: the smallest of all noisy steps; infinite without one."""
    if trust == "none":
        return math.inf
    return clip / float(s.sigma[s.noisy].max()) ** HINGES.get(trust, 0)


Chunks = Callable[[int], Iterator[tuple[Tensor, float]]]  # an update -> its rows in chunks, as processes.chunks


@dataclass
class Rounding:
    """What was measured of it, once a process, at the first collection."""

    model: Model
    schedule: Schedule
    limit: float  # the largest log-ratio to itself at which outputs of the rollout are used as they are
    first: float | None = None  # log-ratio to outputs of the rollout
    again: float | None = None  # and to those that were computed again, where they are

    @torch.no_grad()
    def settled(
        self, rows: Transitions, output: Callable[[Tensor], Tensor], chunks: Chunks, updates: int
    ) -> Transitions:
        """Rows with the old policy's outputs, computed again in the chunks of the updates' losses where rounding
        matters; `output(at)` asks the network, which still is the old policy, for rows[at]."""
        if self.first is None:
            self.first = self._to_itself(rows, output, chunks)
        if self.first < self.limit:
            return rows
        again = rows.output_old.clone()
        for update in range(updates):
            for at, real in chunks(update):
                found = output(at)
                if real:
                    again[at] = found.to(again)
        rows = replace(rows, output_old=again)
        if self.again is None:
            self.again = self._to_itself(rows, output, chunks)
        return rows

    def _to_itself(self, rows: Transitions, output: Callable[[Tensor], Tensor], chunks: Chunks) -> float:
        """The policy's log-ratio to itself in a chunk of the first update: the largest of all processes, 0 but for
        rounding."""
        at, _ = next(chunks(0), (torch.arange(0), 0.0))
        gap = 0.0
        if len(at):
            with self.model.uncounted():
                found = output(at)
            some = rows[at].to(found.device)
            if not torch.equal(found, some.output_old):
                w = self.schedule.w[some.step].to(found)
                gap = log_ratio(found, some.output_old, some.noise, w).abs().max().item()
        return max(processes.exchange(gap))

    def checks(self) -> list[Check]:
        if self.first is None:  # the method takes no ratios
            return []
        name, healthy = "log-ratio of the policy to itself", f"below {self.limit:.2g}"
        fix = "rollout and training disagree: is dropout on, or the network not in eval mode?"
        if self.again is None:
            return [Check(name, self.first, healthy, True, fix)]
        said = "rounding between batches, so old outputs are computed again"
        return [
            Check(said, self.first, healthy, True, ""),
            Check(name, self.again, healthy, self.again < self.limit, fix),
        ]


def rounding(trust: Trust, clip: float, s: Schedule, model: Model) -> Rounding:
    """Limits for the model's states: rounding adds up over their numbers."""
    return Rounding(model, s, min(1e-3 * max(1.0, model.dim / 512) ** 0.5, radius(trust, clip, s) / 10))
