"""Rollouts as rows: where a method looks at the field, and which endpoints each place leads to (RSM notes, 8.1).

In: a field, a schedule, a plan of who branches where. Out: rows (states, noises, outputs) and endpoints, no images.
Independent SDE, ODE, branches off an ODE root and trees are one loop: each step says how many children a state has and
whether they are drawn or follow the ODE. A state shared by several branches is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from fieldsmith.methods.align.schedule import Schedule
from fieldsmith.paths import Prediction
from fieldsmith.samplers import Sde, euler, gaussian_step

Field = Callable[[Tensor, Tensor, Tensor], Prediction]  # x (n, ...), t (), prompt (n,) -> what the network says


@dataclass(frozen=True)
class Rows:
    """n drawn transitions: x -> after = mean + sigma noise at step id `step`, under prompt `prompt`.

    `output_old` is the network's output at x when it was drawn; `root` says which initial noise a row comes from;
    `weight` averages 1, so that steps with more branches do not count more.
    """

    x: Tensor
    after: Tensor
    noise: Tensor
    output_old: Tensor
    step: Tensor
    prompt: Tensor
    root: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, at: Tensor) -> Rows:
        return Rows(*(getattr(self, f.name)[at] for f in fields(self)))

    def to(self, device: torch.device | str) -> Rows:
        """States on `device`; what indexes tables of steps and prompts stays on the CPU, where the tables are."""
        x, after, noise, output = (part.to(device) for part in (self.x, self.after, self.noise, self.output_old))
        return Rows(x, after, noise, output, self.step, self.prompt, self.root, self.weight)


@dataclass(frozen=True)
class Idle:
    """ODE states where nothing was drawn, for the anchor to the reference; (n, ...), (n,), (n,)."""

    x: Tensor
    step: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class Rollout:
    """Rows and the endpoints that they lead to: x_0 (m, ...), prompt (m,), and lineage (m, K): the row that endpoint
    e passed at step k, or -1."""

    rows: Rows
    x_0: Tensor
    prompt: Tensor
    lineage: Tensor
    idle: Idle

    def passages(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every (endpoint, step, row) in which an endpoint passed a row."""
        end, step = (self.lineage >= 0).nonzero(as_tuple=True)
        return end, step, self.lineage[end, step]

    def mean_over_endpoints(self, values: Tensor) -> Tensor:
        """Values of endpoints (m, ...) averaged over those that each row leads to, (n, ...)."""
        end, _, row = self.passages()
        return self.mean_by_row(values[end], row)

    def mean_by_row(self, values: Tensor, row: Tensor) -> Tensor:
        """Values (p, ...) of passages averaged by row (p,), (n, ...)."""
        total = values.new_zeros(len(self.rows), *values.shape[1:]).index_add_(0, row.to(values.device), values)
        count = torch.bincount(row, minlength=len(self.rows)).clamp(min=1).to(values)
        return total / count.reshape(-1, *[1] * (values.ndim - 1))


Kind = Literal["sde", "ode", "branches", "tree"]


@dataclass(frozen=True)
class Plan:
    """Who branches where. `children` (K,): of the root for 'branches' (beside its own ODE), of every state for 'tree';
    `drawn` (K,) bool: where 'sde' and 'tree' draw instead of following the ODE, and where 'ode' keeps its states."""

    kind: Kind
    children: Tensor
    drawn: Tensor

    def endpoints(self) -> int:
        """Rewards a root needs; one that only serves its branches is not judged itself."""
        if self.kind == "branches":
            return int(self.children.sum())
        return int(self.children.prod()) if self.kind == "tree" else 1

    def forwards(self) -> int:
        """Network forwards of one root."""
        live, total = 1, 0
        for k in range(len(self.children)):
            total += live
            if self.kind == "branches":
                live += int(self.children[k])
            elif self.kind == "tree":
                live *= int(self.children[k])
        return total


@torch.no_grad()
def roll(
    field: Field,
    x: Tensor,
    prompt: Tensor,
    s: Schedule,
    plan: Plan,
    sde: Sde,
    noise_level: float,
    generator: torch.Generator,
    store: torch.device | str | None = None,
) -> Rollout:
    """Follow the field from x (r, ...) under prompts (r,) to clean data. Rows are kept on `store` (x's own device).

    On 'ode' the plan's steps give rows whose noise is 0, for estimators that need states only.
    """
    keep = x.device if store is None else torch.device(store)
    K, roots = len(s), len(x)
    grid = s.times.to(x)
    root = torch.arange(roots)
    lineage = torch.full((roots, K), -1)
    parts: list[list[Tensor]] = []
    idle: list[tuple[Tensor, int, Tensor]] = []
    n = 0
    for k in range(K):
        output = field(x, grid[k], prompt[root])
        ahead = euler(output, grid[k + 1])
        children = int(plan.children[k])
        if plan.kind == "branches":
            mother = torch.arange(roots).repeat_interleave(children)
            if not children and k < K - 1:
                idle.append((x[:roots].to(keep), k, prompt))
        else:
            copies = 1 if plan.kind == "ode" else children
            mother = torch.arange(len(x)).repeat_interleave(copies) if plan.drawn[k] else torch.arange(0)
        after = ahead[mother]
        noise = torch.zeros_like(after)
        if len(mother) and plan.kind != "ode":
            step = gaussian_step(sde, output, grid[k + 1], noise_level, grid[1])
            noise = torch.randn(after.shape, generator=generator, dtype=x.dtype).to(x.device)
            after = step.mean[mother] + float(s.sigma[k]) * noise
        states = [part.to(keep) for part in (x[mother], after, noise, output.value[mother])]
        parts.append([*states, torch.full((len(mother),), k), prompt[root[mother]], root[mother]])
        born = torch.arange(n, n + len(mother))
        n += len(mother)
        if plan.kind == "branches":
            fresh = torch.full((len(mother), K), -1)
            fresh[:, k] = born
            x, root, lineage = torch.cat((ahead, after)), torch.cat((root, root[mother])), torch.cat((lineage, fresh))
        elif len(mother):
            x, root, lineage = after, root[mother], lineage[mother]
            lineage[:, k] = born
        else:
            x = ahead
    table = [torch.cat(column) for column in zip(*parts, strict=True)]
    per_step = torch.bincount(table[4], minlength=K).double()
    rows = Rows(*[*table, (per_step[per_step > 0].mean() / per_step)[table[4]].float()])
    first = roots if plan.kind == "branches" else 0  # a root that only serves its branches is not judged
    still = Idle(
        torch.cat([i[0] for i in idle]) if idle else x[:0].to(keep),
        torch.cat([torch.full((len(i[0]),), i[1]) for i in idle]) if idle else torch.arange(0),
        torch.cat([i[2] for i in idle]) if idle else torch.arange(0),
    )
    return Rollout(rows, x[first:].to(keep), prompt[root[first:]], lineage[first:], still)


def soft_returns(rollout: Rollout, rewards: Tensor, log_rho_reference: Tensor) -> Tensor:
    """r_tilde of each row: the mean over its endpoints of r minus the log-ratios of the steps after it; (n,).

    rewards (m,) in units of alpha; log_rho_reference (n,) = log pi / pi_ref of each row's own transition (RSM notes,
    2.2: with r_tilde the estimate of grad V has no bias; with the row's own term in it too it would be 0).
    """
    zero = log_rho_reference.new_zeros(())
    along = torch.where(rollout.lineage >= 0, log_rho_reference[rollout.lineage.clamp(min=0)], zero)
    later = along.flip(1).cumsum(1).flip(1) - along  # (m, K)
    end, step, row = rollout.passages()
    return rollout.mean_by_row(rewards[end] - later[end, step].to(rewards), row)
