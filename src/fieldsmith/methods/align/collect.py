"""One collection: rollouts of the current policy, their rewards, and what follows for every transition.

In: an AlignContext, an epoch. Out: a Batch of transitions with advantages (zeroth order) or guidance in score units
(first order). Of several processes each has its own prompts with all their rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.align import guidance as G
from fieldsmith.methods.align.config import REGRESSIONS, AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.policy.advantages import NORMALISED, advantages
from fieldsmith.methods.policy.losses import log_ratio, over, square
from fieldsmith.methods.policy.rollouts import Rollout, Transitions, numbered, renoise, soft_returns
from fieldsmith.samplers import euler, gaussian_step
from fieldsmith.training import Log, step_generator


@dataclass(frozen=True)
class Batch:
    """One collection: this process's transitions with what their estimator makes of the rewards."""

    rollout: Rollout
    rewards: Tensor  # (m,) of endpoints, as given
    advantage: Tensor  # (n,); zeros where the estimator is a regression
    returns: Tensor | None = None  # (n,) rewards by row over alpha, for critics
    guidance: Tensor | None = None  # (n, ...) in score units
    neighbour: Tensor | None = None  # (n, ...) the reward's part of the value's gradient at the step's other end
    ends: Tensor | None = None  # (n, ...) clean states by row; both for learned fields

    teaches: Tensor | None = None  # (N,) bool, of all processes' rows: those whose advantage is not 0

    def __getitem__(self, at: Tensor) -> Batch:
        some = [None if part is None else part[at] for part in (self.returns, self.guidance, self.neighbour, self.ends)]
        rollout = replace(self.rollout, transitions=self.rollout.transitions[at])
        return Batch(rollout, self.rewards, self.advantage[at], *some)

    def numbered(self) -> Batch:
        """Rows numbered anew over all processes, and which of all of them teach."""
        transitions, everyone = numbered(self.rollout.transitions)
        teaches = torch.zeros(everyone, dtype=torch.bool)
        teaches[processes.gather(transitions.row)] = processes.gather(self.advantage != 0).cpu()
        return replace(self, rollout=replace(self.rollout, transitions=transitions), teaches=teaches)


def collect(context: AlignContext, epoch: int, log: Log) -> Batch:
    """Roll out the current policy, judge it, and estimate; no gradient reaches the weights."""
    config = context.config
    generator = step_generator(config.seed, epoch, stream=5)
    prompt = choose(context, generator)
    x = context.model.noise(len(prompt), generator)
    if config.shared_noise:
        x = x[torch.arange(len(x)) // config.rollouts * config.rollouts]
    own = owned(prompt)
    rollout = context.roll(x[own], prompt[own], generator, own, len(prompt))
    rewards = context.judge(rollout.x_0, rollout.prompt)
    every = processes.gather(rewards)
    log["reward"], log["reward deviation"] = every.mean().item(), every.std(correction=0).item()
    log["reward calls"] = float(len(every))
    if config.estimator in ("nft", "awm"):
        return renoised(context, rollout, rewards, len(every), generator, log).numbered()
    kept = trained(rollout, config, len(every), generator)
    if config.estimator in REGRESSIONS:
        return regression(context, rollout, rewards, kept).numbered()
    return policy(context, rollout, rewards, kept, log).numbered()


def owned(prompt: Tensor) -> Tensor:
    """Which of all roots (n,) of a collection are this process's: whole prompts, with all their rollouts."""
    prompts, group = torch.unique(prompt, return_inverse=True)
    return torch.isin(group, processes.owned(len(prompts))).nonzero().squeeze(1)


def choose(context: AlignContext, generator: torch.Generator) -> Tensor:
    """The prompt of each root, (prompts_per_epoch * rollouts,): prompts without repeats as far as there are enough."""
    order = torch.randperm(len(context.config.prompts), generator=generator)
    chosen = order[torch.arange(context.config.prompts_per_epoch) % len(order)]
    return chosen.repeat_interleave(context.config.rollouts)


def policy(context: AlignContext, rollout: Rollout, rewards: Tensor, kept: Tensor, log: Log) -> Batch:
    """Advantages of drawn transitions."""
    config, rows, s = context.config, rollout.transitions, context.schedule
    free = config.advantage in NORMALISED and config.auxiliary == "none" and not config.soft  # of alpha: it cancels
    scaled = rewards if free else rewards / config.temperature
    if config.soft:
        with torch.no_grad(), context.model.reference():
            reference = context.output(rows.x, rows.step, rows.prompt)
        log_rho = -log_ratio(reference.to(rows.output_old), rows.output_old, rows.noise, s.w[rows.step])
        returns = soft_returns(rollout, scaled, log_rho.cpu())
    else:
        returns = rollout.mean_over_endpoints(scaled)
    unit = rows.root if config.group_by == "root" else rows.prompt
    advantage = centred(context, returns, unit * len(s) + rows.step, scaled, log)
    if context.helper and config.auxiliary == "baseline":
        with torch.no_grad():
            x = rows.x.to(context.model.device)
            value = context.helper(x, s.times[rows.step].to(x), rows.prompt)
        advantage = returns - value.cpu()
    return Batch(rollout, rewards, advantage, returns)[kept]


def centred(context: AlignContext, returns: Tensor, group: Tensor, rewards: Tensor, log: Log) -> Tensor:
    """Advantages of returns (n,) within groups (n,), clipped where they are normalised; `rewards` (m,) are those of
    this process's endpoints, whose deviation over all processes is global-std's."""
    config = context.config
    if config.advantage != "raw":
        spread = advantages(returns, group, "mean").abs()
        log.mean("rows without signal", spread < 1e-9)
    deviation = None
    if config.advantage == "global-std":
        deviation = log["deviation of all rewards"] = processes.gather(rewards).double().std(correction=0).item()
    advantage = advantages(returns, group, config.advantage, deviation=deviation)
    return (
        advantage.clamp(-config.advantage_clip, config.advantage_clip) if config.advantage in NORMALISED else advantage
    )


def renoised(
    context: AlignContext, rollout: Rollout, rewards: Tensor, everyone: int, generator: torch.Generator, log: Log
) -> Batch:
    """Endpoints noised again at the sampler's own times, the old policy's output beside them; `everyone` counts the
    endpoints of all processes."""
    config = context.config
    rows = renoise(rollout.x_0, context.schedule, config.renoise, generator, rollout.end, everyone)
    prompt = rollout.prompt[rows.root]
    with torch.no_grad():
        output = context.output(rows.x, rows.step, prompt)
    rows = replace(rows, output_old=output, prompt=prompt)
    scaled = rewards if config.advantage in NORMALISED else rewards / config.temperature
    advantage = centred(context, scaled, rollout.prompt, scaled, log)  # of endpoints, at whatever times
    return Batch(replace(rollout, transitions=rows), rewards, advantage[rows.root])


def regression(context: AlignContext, rollout: Rollout, rewards: Tensor, kept: Tensor) -> Batch:
    """First-order guidance at rows of whole trajectories; next-state estimates carry omega."""
    config, rows = context.config, rollout.transitions[kept]
    neighbour = ends = None
    if config.auxiliary != "none":  # a learned field is compared with the gradient at the step's other end too
        plain = tweedie(context, rollout.transitions)
        neighbour, ends = neighbours(context, rollout, plain)[kept], rollout.mean_over_endpoints(rollout.x_0)[kept]
        guidance = plain[kept]
    elif config.estimator == "tweedie":
        guidance = tweedie(context, rows)
    else:
        clean = _clean(context, rollout)
        terminal = config.estimator == "terminal"
        guidance = (rollout.mean_over_endpoints(clean) if terminal else adjoint(context, rollout, clean))[kept]
    if config.state == "next":
        guidance = over(context.schedule.omega[rows.step], guidance) * guidance
    nothing = torch.zeros(len(rows))
    return Batch(
        replace(rollout, transitions=rows), rewards, nothing, guidance=guidance, neighbour=neighbour, ends=ends
    )


def neighbours(context: AlignContext, rollout: Rollout, plain: Tensor) -> Tensor:
    """The reward's part of the value's gradient at the other end of each row's step, from `plain` (n, ...) at rows.

    'value' (gradients at current states): eta grad r at the next state, at the end grad r itself. 'residual' (gradients
    at next states): abar grad r at the row's own state, which is the row before it; 0 at the first, where abar is.
    """
    s, lineage = context.schedule, rollout.lineage
    found = torch.zeros_like(plain)
    if context.config.auxiliary == "residual":
        for k in range(1, lineage.shape[1]):
            both = (lineage[:, k] >= 0) & (lineage[:, k - 1] >= 0)
            found[lineage[both, k]] = s.path.alpha(s.times[k]).to(plain) ** 2 * plain[lineage[both, k - 1]]
        return found
    found[lineage[:, -1]] = _clean(context, rollout)
    for k in range(lineage.shape[1] - 1):
        found[lineage[:, k]] = context.eta[k + 1].to(plain) * plain[lineage[:, k + 1]]
    return found


def _clean(context: AlignContext, rollout: Rollout) -> Tensor:
    """grad r at the endpoints, once a trajectory."""
    parts = []
    for at in torch.arange(len(rollout.x_0)).split(context.config.chunk):
        x_0 = rollout.x_0[at].to(context.model.device)
        parts.append(G.clean_gradient(context.value(rollout.prompt[at]), x_0))
    return torch.cat(parts).to(rollout.x_0.device)


def tweedie(context: AlignContext, rows: Transitions) -> Tensor:
    """At each row's own state, or at the next one; through the current network, as the methods do."""
    config, s = context.config, context.schedule
    found = torch.empty_like(rows.x)
    for k in rows.step.unique().tolist():  # one time a batch: lookahead takes the sampler's own steps from there
        first = k if config.state == "current" else k + 1
        for at in (rows.step == k).nonzero().squeeze(1).split(config.chunk):
            x = (rows.x if config.state == "current" else rows.x_next)[at].to(context.model.device)
            t, ahead = s.times[first].to(x), s.times[first + 1 : first + 1 + config.lookahead].to(x)
            place = context.place(rows.prompt[at])
            value = context.value(rows.prompt[at])
            found[at] = G.tweedie(value, place, x, t, config.jacobian, ahead).to(found.device)
    return found


def adjoint(context: AlignContext, rollout: Rollout, clean: Tensor) -> Tensor:
    """a_{k+1} at each row: the clean gradient carried back along the reference's chain, one backward a step."""
    s, rows = context.schedule, rollout.transitions
    found, carried = torch.empty_like(rows.x), clean
    with context.model.reference():
        for k in reversed(range(len(s))):
            row = rollout.lineage[:, k]
            if bool((row >= 0).all()):
                found[row] = carried
                if k == 0:
                    break
                x = rows.x[row]
            elif k and bool((rollout.lineage[:, k - 1] >= 0).all()):
                x = rows.x_next[rollout.lineage[:, k - 1]]  # a certain step keeps no row: its state came out before it
            else:
                break
            carried = torch.cat([
                carry(context, x[at], k, rollout.prompt[at], carried[at])
                for at in torch.arange(len(x)).split(context.config.chunk)
            ])  # fmt: skip
    return found


def carry(context: AlignContext, x: Tensor, k: int, prompt: Tensor, after: Tensor, drawn: bool = True) -> Tensor:
    """(d mean_k(x) / d x)^T after: of the chain's step where `drawn`, else of the ODE's."""
    kept, x = after.device, x.detach().to(context.model.device).requires_grad_(True)
    t, t_next = context.schedule.times[k].to(x), context.schedule.times[k + 1].to(x)
    with torch.enable_grad():
        pred = context.predict(x, t, prompt)
        mean = euler(pred, t_next)
        if drawn and context.schedule.noisy[k]:
            mean = gaussian_step(context.sde, pred, t_next, context.noise_level, context.schedule.times[1].to(x)).mean
        (gradient,) = torch.autograd.grad(mean, x, after.to(x))
    return gradient.detach().to(kept)


def log_ratio_slope(context: AlignContext, rows: Transitions) -> Tensor:
    """grad_x log pi(after | x) / pi_ref(after | x) at rows, (n, ...): the means move with x, `after` does not."""
    s, slope = context.schedule, torch.empty_like(rows.x)
    for k in rows.step.unique().tolist():
        at = (rows.step == k).nonzero().squeeze(1)
        x = rows.x[at].detach().requires_grad_(True)
        t, t_next, first = s.times[k].to(x), s.times[k + 1].to(x), s.times[1].to(x)

        def misses() -> Tensor:
            pred = context.predict(x, t, rows.prompt[at])  # noqa: B023
            mean = gaussian_step(context.sde, pred, t_next, context.noise_level, first).mean  # noqa: B023
            return square(rows.x_next[at] - mean).sum()  # noqa: B023

        with torch.enable_grad():
            own = misses()
            with context.model.reference():
                base = misses()
            (slope[at],) = torch.autograd.grad((base - own) / (2 * float(s.sigma[k]) ** 2), x)
    return slope


def trained(rollout: Rollout, config: AlignConfig, everyone: int, generator: torch.Generator) -> Tensor:
    """Rows that are trained: all, or without the sampler's last step, or `train_steps` of an endpoint's; `everyone`
    counts the endpoints of all processes."""
    rows = torch.arange(len(rollout.transitions))
    if config.last_step == "draw":
        rows = rows[rollout.transitions.step < rollout.lineage.shape[1] - 1]
    if not config.train_steps:
        return rows
    if config.last_step == "train":
        return thinned(rollout, config.train_steps, everyone, generator)
    return picked(rollout, config.train_steps, rollout.transitions.step[rows].unique(), everyone, generator)


def picked(rollout: Rollout, keep: int, steps: Tensor, everyone: int, generator: torch.Generator) -> Tensor:
    """Rows left when every endpoint keeps `keep` of `steps` (k,), drawn without repeats, as DanceGRPO has it."""
    order = torch.rand(everyone, len(steps), generator=generator).argsort(1)[rollout.end, :keep]
    rows = rollout.lineage.gather(1, steps[order])
    return rows[rows >= 0].unique()


def thinned(rollout: Rollout, keep: int, everyone: int, generator: torch.Generator) -> Tensor:
    """Rows left when every endpoint keeps its last step and one of each of keep - 1 blocks of equal length; `everyone`
    counts the endpoints of all processes."""
    steps = (rollout.lineage >= 0).any(0).nonzero().squeeze(1)
    if keep >= len(steps):
        return torch.arange(len(rollout.transitions))
    left = [rollout.lineage[:, steps[-1]]]
    for block in steps[:-1].tensor_split(keep - 1) if keep > 1 else ():
        pick = block[torch.randint(len(block), (everyone,), generator=generator)[rollout.end]]
        left.append(rollout.lineage.gather(1, pick[:, None]).squeeze(1))
    rows = torch.cat(left)
    return rows[rows >= 0].unique()
