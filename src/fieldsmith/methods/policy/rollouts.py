"""Rollouts as tables of transitions, and which endpoints each transition leads to (RSM notes, 8.1).

In: a field, a schedule, a plan of who branches where. Out: transitions (states, noises, outputs) and endpoints, no
images.
Independent SDE, ODE, branches off an ODE root and trees are one loop: each step says how many children a state has and
whether they are stochastic or follow the ODE. A state shared by several branches is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.policy.schedule import Schedule
from fieldsmith.paths import Prediction, noised
from fieldsmith.samplers import Sde, euler, gaussian_step

Field = Callable[[Tensor, Tensor, Tensor], Prediction]  # x (n, ...), t (), prompt (n,) -> the network's prediction


@dataclass(frozen=True)
class Transitions:
    """n steps that were taken, (n, ...) and (n,): x -> x_next = mean + sigma noise at step id `step`, under `prompt`.

    `output_old` is the network's output at x when the step was taken; `root` says which initial noise a row comes from;
    `weight` averages 1, so that steps with more branches do not count more; `row` is a row's place among those of all
    processes. Of re-noised endpoints (`renoise`) x is the noised state, x_next the clean one and noise what was added.
    """

    x: Tensor
    x_next: Tensor
    noise: Tensor
    output_old: Tensor
    step: Tensor
    prompt: Tensor
    root: Tensor
    weight: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, at: Tensor) -> Transitions:
        return Transitions(*(getattr(self, f.name)[at] for f in fields(self)))

    def to(self, device: torch.device | str) -> Transitions:
        """States on `device`; what indexes tables of steps and prompts stays on the CPU, where the tables are."""
        x, x_next, noise, output = (part.to(device) for part in (self.x, self.x_next, self.noise, self.output_old))
        return replace(self, x=x, x_next=x_next, noise=noise, output_old=output)

    @staticmethod
    def cat(parts: Sequence[Transitions]) -> Transitions:
        """All of them in one table."""
        return Transitions(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Transitions)))


def numbered(rows: Transitions) -> tuple[Transitions, int]:
    """Rows numbered anew over all processes, from 0 without gaps, in the order that they had; how many there are."""
    every = processes.gather(rows.row).sort().values
    return replace(rows, row=torch.searchsorted(every, rows.row)), len(every)


def here(row: Tensor, wanted: Tensor, everyone: int) -> tuple[Tensor, Tensor]:
    """Of `wanted` (k,), numbers among `everyone`, those that this process has in `row` (n,), in their order: places in
    `wanted` and places in `row`."""
    places = torch.full((everyone,), -1)
    places[row] = torch.arange(len(row))
    found = places[wanted]
    own = (found >= 0).nonzero().squeeze(1)
    return own, found[own]


@dataclass(frozen=True)
class OdeStates:
    """States of an ODE where nothing branched, for the anchor to the reference; (n, ...), (n,), (n,), (n,)."""

    x: Tensor
    step: Tensor
    prompt: Tensor
    row: Tensor  # their places among those of all processes


@dataclass(frozen=True)
class Rollout:
    """Transitions and the endpoints that they lead to: x_0 (m, ...), prompt (m,), and lineage (m, K), the row of
    `transitions` that endpoint e passed at step k, or -1; `end` (m,) are the endpoints' places among those of all
    processes."""

    transitions: Transitions
    x_0: Tensor
    prompt: Tensor
    lineage: Tensor
    ode_states: OdeStates
    end: Tensor

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
        total = values.new_zeros(len(self.transitions), *values.shape[1:]).index_add_(0, row.to(values.device), values)
        count = torch.bincount(row, minlength=len(self.transitions)).clamp(min=1).to(values)
        return total / count.reshape(-1, *[1] * (values.ndim - 1))


Kind = Literal["sde", "ode", "branches", "tree"]


@dataclass(frozen=True)
class Plan:
    """Who branches where. `num_branches` (K,): of the root for 'branches' (beside its own ODE), of every state for
    'tree'; `is_stochastic` (K,) bool: where 'sde' and 'tree' take a stochastic step instead of the ODE's, and where
    'ode' keeps its states."""

    kind: Kind
    num_branches: Tensor
    is_stochastic: Tensor

    @property
    def has_ode_states(self) -> bool:
        """Whether a rollout keeps states of the ODE at which nothing branches."""
        return self.kind == "branches" and bool((self.num_branches[:-1] == 0).any())

    def endpoints(self) -> int:
        """Rewards a root needs; one that only serves its branches is not judged itself."""
        if self.kind == "branches":
            return int(self.num_branches.sum())
        return int(self.num_branches.prod()) if self.kind == "tree" else 1

    def nfe(self) -> int:
        """Network evaluations of one root."""
        live, total = 1, 0
        for k in range(len(self.num_branches)):
            total += live
            if self.kind == "branches":
                live += int(self.num_branches[k])
            elif self.kind == "tree":
                live *= int(self.num_branches[k])
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
    own: Tensor | None = None,
    everyone: int | None = None,
) -> Rollout:
    """Follow the field from x (r, ...) under prompts (r,) to clean data; kept on `store` (x's own device).

    On 'ode' the plan's steps give transitions whose noise is 0, for estimators that need states only. Of several
    processes this one has the roots `own` (r,) of `everyone`: noise is drawn for all of them and its part taken, so
    that a root's rollout does not depend on who makes it.
    """
    keep = x.device if store is None else torch.device(store)
    K, roots = len(s), len(x)
    grid = s.times.to(x)
    own = torch.arange(roots) if own is None else own
    everyone = everyone or roots
    mine = torch.isin(torch.arange(everyone), own)
    every_root, every_row = torch.arange(everyone), 0  # of the live states of all processes, as far as it has come
    root = torch.arange(roots)
    lineage = torch.full((roots, K), -1)
    parts: list[list[Tensor]] = []
    ode_states: list[tuple[Tensor, int]] = []
    n = 0
    for k in range(K):
        output = field(x, grid[k], prompt[root])
        ahead = euler(output, grid[k + 1])
        branches = int(plan.num_branches[k])
        if plan.kind == "branches":
            parent, every_parent = (torch.arange(live).repeat_interleave(branches) for live in (roots, everyone))
            if not branches and k < K - 1:
                ode_states.append((x[:roots].to(keep), k))
        else:
            copies = (1 if plan.kind == "ode" else branches) if plan.is_stochastic[k] else 0
            parent, every_parent = (torch.arange(live).repeat_interleave(copies) for live in (len(x), len(every_root)))
        here = mine[every_root[every_parent]]  # which of all processes' transitions are this one's, in their order
        x_next = ahead[parent]
        noise = torch.zeros_like(x_next)
        if len(parent) and plan.kind != "ode":
            step = gaussian_step(sde, output, grid[k + 1], noise_level, grid[1])
            noise = torch.randn(len(here), *x_next.shape[1:], generator=generator, dtype=x.dtype)[here].to(x.device)
            x_next = step.mean[parent] + float(s.sigma[k]) * noise
        states = [part.to(keep) for part in (x[parent], x_next, noise, output.value[parent])]
        places = every_row + here.nonzero().squeeze(1)
        every_row += len(here)
        parts.append([*states, torch.full((len(parent),), k), prompt[root[parent]], root[parent], places])
        rows = torch.arange(n, n + len(parent))
        n += len(parent)
        if plan.kind == "branches":
            fresh = torch.full((len(parent), K), -1)
            fresh[:, k] = rows
            x, root, lineage = torch.cat((ahead, x_next)), torch.cat((root, root[parent])), torch.cat((lineage, fresh))
            every_root = torch.cat((every_root, every_root[every_parent]))
        elif len(every_parent):
            x, root, lineage = x_next, root[parent], lineage[parent]
            lineage[:, k] = rows
            every_root = every_root[every_parent]
        else:
            x = ahead
    table = [torch.cat(column) for column in zip(*parts, strict=True)]
    per_step = torch.bincount(table[4], minlength=K).double()
    weight = (per_step[per_step > 0].mean() / per_step)[table[4]].float()
    transitions = Transitions(*(*table[:7], weight, table[7]))
    branched = plan.kind == "branches"  # a root that only serves its branches is not judged
    first, first_of_all = (roots, everyone) if branched else (0, 0)
    ks = torch.tensor([k for _, k in ode_states], dtype=torch.long)
    kept = OdeStates(
        torch.cat([states for states, _ in ode_states]) if ode_states else x[:0].to(keep),
        ks.repeat_interleave(roots), prompt.repeat(len(ks)),
        (torch.arange(len(ks))[:, None] * everyone + own).flatten(),
    )  # fmt: skip
    end = mine[every_root[first_of_all:]].nonzero().squeeze(1)
    return Rollout(transitions, x[first:].to(keep), prompt[root[first:]], lineage[first:], kept, end)


def renoise(
    x_0: Tensor, s: Schedule, times: int, generator: torch.Generator, own: Tensor | None = None,
    everyone: int | None = None,
) -> Transitions:  # fmt: skip
    """Each of x_0 (m, ...) noised anew at `times` of the sampler's own times, without repeats: (m times, ...).

    `prompt` and `root` are the row of x_0; `output_old` is 0 until the caller fills it in. Of several processes this
    one has the endpoints `own` (m,) of `everyone`; draws are made for all.
    """
    m, times = len(x_0), min(times, len(s))
    own = torch.arange(m) if own is None else own
    everyone = everyone or m
    step = torch.stack([torch.randperm(len(s), generator=generator)[:times] for _ in range(everyone)])[own].flatten()
    noise = torch.randn(everyone * times, *x_0.shape[1:], generator=generator)
    row = (own[:, None] * times + torch.arange(times)).flatten()
    root = torch.arange(m).repeat_interleave(times)
    x_0 = x_0[root]
    noise = noise[row].to(x_0)
    x_t = noised(s.path, x_0, noise, s.times[step].to(x_0))
    return Transitions(x_t, x_0, noise, torch.zeros_like(x_t), step, root, root, torch.ones(len(root)), row)


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
