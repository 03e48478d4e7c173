"""What methods that train on their own rollouts check before the first update.

A network's output at a row may hang on the batch that it is in: a GPU's matrix kernels are chosen by shape. Log-ratios
to an output of the rollout then hold noise. Where that is more than a tenth of the trust region's radius, outputs are
computed again in the loss's own chunks (`rounds`), at one forward more a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.policy.losses import HINGES, Trust, log_ratio
from fieldsmith.methods.policy.rollouts import Transitions
from fieldsmith.methods.policy.schedule import Schedule
from fieldsmith.preflight import Check


def ratio_to_itself(output: Tensor, transitions: Transitions, s: Schedule) -> float:
    """The policy's log-ratio to itself, from the network's output (n, ...) at transitions that it just took: the
    largest of all processes, 0 but for rounding."""
    w = s.w[transitions.step].to(output)
    gaps = log_ratio(output, transitions.output_old, transitions.noise, w).abs()
    return max(processes.exchange(gaps.max().item() if len(gaps) else 0.0))


def radius(trust: Trust, clip: float, s: Schedule) -> float:
    """Of a trust region, in nats of a step's log-ratio: the smallest of all noisy steps; infinite without one."""
    if trust == "none":
        return math.inf
    return clip / float(s.sigma[s.noisy].max()) ** HINGES.get(trust, 0)


@dataclass
class Rounding:
    """What was measured of it, once a process, at the first collection."""

    limit: float  # the largest log-ratio to itself at which outputs of the rollout are used as they are
    first: float | None = None  # log-ratio to outputs of the rollout
    again: float | None = None  # and to those that were computed again, where they are

    @property
    def matters(self) -> bool:
        return self.first is not None and self.first >= self.limit

    def checks(self) -> list[Check]:
        assert self.first is not None
        name, healthy = "log-ratio of the policy to itself", f"below {self.limit:.2g}"
        fix = "rollout and training disagree: is dropout on, or the network not in eval mode?"
        if self.again is None:
            return [Check(name, self.first, healthy, not self.matters, fix)]
        said = "rounding between batches, so old outputs are computed again"
        return [
            Check(said, self.first, healthy, True, ""),
            Check(name, self.again, healthy, self.again < self.limit, fix),
        ]


def rounding(trust: Trust, clip: float, s: Schedule, dim: int) -> Rounding:
    """Limits for states of `dim` numbers: rounding adds up over them."""
    return Rounding(min(1e-3 * max(1.0, dim / 512) ** 0.5, radius(trust, clip, s) / 10))
