"""What an update learns from: collections of sessions become advantages and rows to train on.

In: an EditContext, an epoch. Out: a Batch: the collection, each edit's advantage, states with their targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.methods.edit import credit
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Collection, EditContext, collect
from fieldsmith.methods.policy.rollouts import Transitions, numbered, renoise
from fieldsmith.models.core import stack
from fieldsmith.models.editing import encode_unique, quantised
from fieldsmith.training import Log, step_generator


@dataclass(frozen=True)
class Batch:
    """A collection, the advantage of each of its edits (m,), and the rows that teach; `rows.prompt` is the edit's row.

    GRPO's rows are steps of the rollouts; other objectives' are results noised again, NFT's with the old policy's
    output there. `signal` is the share of groups that teach, `everyone` the number of rows of all processes.
    """

    collection: Collection
    advantage: Tensor
    rows: Transitions
    everyone: int
    signal: float = 1.0


def rollout_batch(context: EditContext, epoch: int, log: Log) -> Batch:
    """An epoch's sessions under the model's present weights. Raises RewardError where the judge fails."""
    config = context.config
    collection = collect(context, epoch)
    generator = step_generator(config.seed, epoch, stream=7)
    advantage, signal = torch.ones(len(collection.x_0)), 1.0
    if config.objective == "supervised":
        rows = _renoised(context, collection, _planned_results(context, epoch), generator)
    elif config.objective == "none":
        rows = renoise(collection.x_0[:1], context.schedule, 1, generator)[torch.arange(0)]
    else:
        advantage, teaches = advantages(collection, config, log)
        signal = log["groups with a signal"]
        steps = collection.transitions
        rows = _old_rows(context, collection, generator) if steps is None else steps
        rows = rows[teaches[rows.prompt]]
    following = collection.following
    log["following"], log["consistency"] = following.mean().item(), collection.consistency.mean().item()
    log["following, last turn"], log["session"] = following[..., -1].mean().item(), following.prod(-1).mean().item()
    rows, everyone = numbered(rows)
    log["reward calls"], log["rows"] = float(following.numel()), float(everyone)
    return Batch(collection, advantage, rows, everyone, signal)


def advantages(collection: Collection, config: EditConfig, log: Log) -> tuple[Tensor, Tensor]:
    """Of every edit, (m,), and which edits belong to a group that teaches, (m,) bool."""
    rewards, weights = [], []
    for score, weight in ((collection.following, config.following), (collection.consistency, config.consistency)):
        if weight:
            last = config.scoring == "last"
            rewards.append(credit.returns(score, config.credit, config.aggregate, config.discount, last))
            weights.append(weight)
    advantage = credit.fuse(rewards, weights, config.fusion, config.floor, config.advantage == "global-std")
    apart = credit.spread(rewards, weights, config.fusion)
    score = torch.stack((collection.following, collection.consistency)).mean(0)
    if config.credit != "turn":  # every turn answers for the session
        score = score.mean(2, keepdim=True).expand_as(score)
    teaches = credit.keep(apart, score, config.min_spread, config.max_mean)
    log["groups with a signal"] = teaches.float().mean().item()
    log["deviation of following"] = collection.following.std(1, correction=0).mean().item()
    log["deviation of consistency"] = collection.consistency.std(1, correction=0).mean().item()
    by_unit = advantage.clamp(-config.advantage_clip, config.advantage_clip).flatten(0, 1)
    at, turn = collection.unit, collection.turn
    return by_unit[at, turn], teaches[at // config.rollouts, turn]


def _renoised(context: EditContext, collection: Collection, x_0: Tensor, generator: torch.Generator) -> Transitions:
    """The edits' x_0 (m, ...) noised again at the sampler's own times."""
    everyone = collection.following.numel()
    return renoise(x_0, context.schedule, context.config.renoise, generator, collection.edit, everyone)


def _old_rows(context: EditContext, collection: Collection, generator: torch.Generator) -> Transitions:
    """Results noised again at the sampler's own times, with the old policy's output there."""
    rows = _renoised(context, collection, collection.x_0, generator)
    with torch.no_grad():
        output = context.output(rows.x, rows.step, collection.condition(rows.prompt), collection.source[rows.prompt])
    return replace(rows, output_old=output)


def _planned_results(context: EditContext, epoch: int) -> Tensor:
    """What the collection's edits should have given, as states."""
    config = context.config
    own = processes.owned(config.groups)
    sessions = context.sessions(config.groups, epoch)[own.tolist()]
    index = torch.arange(len(own)).repeat_interleave(config.rollouts)
    return context.states(torch.cat([quantised(sessions.clean(turn))[index] for turn in range(1, config.turns + 1)]))


def planned_batch(context: EditContext, epoch: int, log: Log) -> Batch:
    """As many planned pairs as a collection has edits, without rollouts and unjudged."""
    config = context.config
    T, everyone = config.turns, config.groups * config.rollouts
    units = processes.owned(everyone)
    P = len(units)
    sessions = context.sessions(everyone, epoch)[units.tolist()]
    states = [context.states(quantised(sessions.clean(turn))) for turn in range(T + 1)]
    texts = stack([encode_unique(context.model, sessions.prompts(turn)) for turn in range(1, T + 1)])
    unjudged = torch.zeros(config.groups, config.rollouts, T)
    collection = Collection(
        torch.cat(states[:-1]), torch.cat(states[1:]), torch.arange(P * T), torch.arange(T).repeat_interleave(P),
        units.repeat(T), texts, unjudged, unjudged,
    )  # fmt: skip
    rows, all_rows = numbered(
        _renoised(context, collection, collection.x_0, step_generator(config.seed, epoch, stream=7))
    )
    log["rows"] = float(all_rows)
    return Batch(collection, torch.ones(P * T), rows, all_rows)
