"""What methods that train on their own rollouts check before the first update."""

from __future__ import annotations

from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.policy.losses import log_ratio
from fieldsmith.methods.policy.rollouts import Transitions
from fieldsmith.methods.policy.schedule import Schedule
from fieldsmith.preflight import Check


def on_policy(output: Tensor, transitions: Transitions, s: Schedule) -> Check:
    """The policy's log-ratio to itself is 0, from the network's output (n, ...) at transitions that it just took; the
    largest one of all processes."""
    w = s.w[transitions.step].to(output)
    gaps = log_ratio(output, transitions.output_old, transitions.noise, w).abs()
    gap = max(processes.exchange(gaps.max().item() if len(gaps) else 0.0))
    limit = 1e-3 * max(1.0, output[0].numel() / 512) ** 0.5  # rounding adds up over a state's dimensions
    return Check(
        "log-ratio of the policy to itself", gap, f"below {limit:.2g}", gap < limit,
        "rollout and training disagree: is dropout on, or the network in half precision?",
    )  # fmt: skip
