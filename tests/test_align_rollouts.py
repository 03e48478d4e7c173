"""Rollouts of reward score matching: who branches where, what it costs, which endpoints a row leads to.

Fields are exact mixtures; nothing is trained here.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fieldsmith.errors import InputError
from fieldsmith.methods.align import guidance as G
from fieldsmith.methods.align.collect import choose, collect, thinned
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.context import AlignContext
from fieldsmith.methods.policy import losses as L
from fieldsmith.methods.policy.rollouts import OdeStates, Plan, Rollout, Transitions, roll, soft_returns
from fieldsmith.methods.policy.schedule import Schedule, schedule
from fieldsmith.models.exact import Exact
from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving, noised
from fieldsmith.rewards import Reward
from fieldsmith.samplers import ddim_grid, euler, flow_grid, gaussian_step
from fieldsmith.training import Log
from fieldsmith.worlds.mixtures import triangle
from tests.drawn import normal, seeded

FLOW = RectifiedFlow()
TOY = VariancePreserving((1 - torch.linspace(1e-4, 0.03, 500, dtype=torch.float64)).cumprod(0))
K = 6
KINDS = ("sde", "ode", "branches", "tree")
PATHS = pytest.mark.parametrize("path", [FLOW, TOY], ids=["flow", "vp"])
LINEAR = Reward("linear", True, lambda x, prompts: 3 - x[:, 0] / 2)


def steps_of(path, many: int = K) -> Schedule:
    """A flow's last step has a density, DDIM's step to clean data has none."""
    if path is FLOW:
        return schedule(FLOW, flow_grid(many).double(), "velocity", "flow-sde", 0.7)
    return schedule(TOY, ddim_grid(TOY, many).double(), "eps", "ddim", 1.0)


class Counting:
    """The triangle's exact field, and how many states it was asked about."""

    def __init__(self, path):
        self.path, self.forwards = path, 0

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        assert len(prompt) == len(x)
        self.forwards += len(x)
        kind = "velocity" if self.path is FLOW else "eps"
        value = getattr(triangle(), kind)(x, t, self.path) + 0.1 * prompt[:, None]  # prompts differ
        return Prediction(kind, value, x, t, self.path)


def plan(kind: str, s: Schedule, children: tuple[int, ...] = (), drawn: Tensor | None = None) -> Plan:
    rest = 0 if kind == "branches" else 1
    each = torch.tensor([*children, *[rest] * (len(s) - len(children))])
    where = torch.ones(len(s)).bool() if kind == "ode" else s.noisy
    return Plan(kind, each, where if drawn is None else drawn)


def go(path, kind: str, children: tuple[int, ...] = (), roots: int = 3, field=None, seed: int = 1, **kw) -> Rollout:
    s = steps_of(path)
    sde, level = ("flow-sde", 0.7) if path is FLOW else ("ddim", 1.0)
    store, drawn = kw.get("store"), kw.get("drawn")
    x, prompt = normal(roots, 2, seed=2), torch.arange(roots) % 2
    given_ = plan(kind, s, children, drawn)
    return roll(field or Counting(path), x, prompt, s, given_, sde, level, seeded(seed), store)


SHAPES = [("sde", ()), ("ode", ()), ("branches", (2, 0, 3, 0, 1)), ("branches", (4, 4, 4)), ("tree", (2, 1, 3))]
SHAPED = pytest.mark.parametrize("kind, children", SHAPES)


# counts and costs


@PATHS
@SHAPED
def test_rows_endpoints_and_forwards_are_those_of_the_plan(path, kind, children):
    """Defect 10 of section 7: a root is computed once, however many branches it has."""
    s, field, roots = steps_of(path), Counting(path), 3
    found = go(path, kind, children, roots, field)
    drawn = int(s.noisy.sum())
    rows = {"sde": drawn, "ode": K, "branches": sum(children)}
    if kind == "tree":
        states = torch.tensor([*children, *[1] * (K - len(children))]).cumprod(0)
        rows["tree"] = int(states[s.noisy].sum())
    the_plan = plan(kind, s, children)
    assert len(found.transitions) == roots * rows[kind]
    assert len(found.x_0) == len(found.prompt) == len(found.lineage) == roots * the_plan.endpoints()
    assert field.forwards == roots * the_plan.nfe()
    for f in fields(found.transitions):
        assert len(getattr(found.transitions, f.name)) == len(found.transitions)


def test_forwards_of_the_papers_profiles():
    """Section 4.4's profiles, and 4.3's; the released code asks the network at a root once for each of its branches."""
    s = steps_of(FLOW, 10)
    profiles = {  # children: rows, the notes' forwards
        (6,) * 9: (54, 333), (7, 7, 7, 7, 7, 7, 6, 6, 0): (54, 366), (3, 3, 4, 5, 6, 7, 7, 8, 11): (54, 278),
        (4, 5, 5, 6, 7, 8, 9, 10, 0): (54, 324), (6, 6, 8, 10, 0, 0, 0, 0, 0): (30, 257),
    }  # fmt: skip
    for children, (rows, theirs) in profiles.items():
        ours = plan("branches", s, children)
        assert ours.endpoints() == rows
        # the released root stops a step early; ours goes on to the end, for the anchor
        assert ours.nfe() == theirs - rows + 1
    sd15 = Plan("branches", torch.tensor([4 if k % 10 == 0 else 0 for k in range(50)]), torch.ones(50).bool())
    assert (sd15.endpoints(), sd15.nfe()) == (20, 650 - 20)


# what a row is


@PATHS
@SHAPED
def test_rows_are_transitions_of_the_sampler(path, kind, children):
    s, found = steps_of(path), go(path, kind, children)
    sde, level = ("flow-sde", 0.7) if path is FLOW else ("ddim", 1.0)
    rows = found.transitions
    for k in range(K):
        at = rows.step == k
        output = Counting(path)(rows.x[at], s.times[k], rows.prompt[at])
        torch.testing.assert_close(output.value, rows.output_old[at])
        if kind == "ode":
            torch.testing.assert_close(rows.x_next[at], euler(output, s.times[k + 1]))
            assert not rows.noise[at].any()
        else:
            step = gaussian_step(sde, output, s.times[k + 1], level, s.times[1])
            torch.testing.assert_close(rows.x_next[at], step.mean + s.sigma[k] * rows.noise[at])
    if kind != "ode":
        assert rows.noise.unique(dim=0).shape == rows.noise.shape  # every row has its own draw


@SHAPED
def test_no_noise_is_drawn_on_a_certain_step(kind, children):
    """DDIM's step to clean data has no density (defect 7): no row may claim one."""
    s, found = steps_of(TOY), go(TOY, kind, children)
    assert not s.noisy[-1]
    if kind != "ode":
        assert bool(s.noisy[found.transitions.step].all())
        assert not (found.lineage[:, -1] >= 0).any()


@PATHS
@pytest.mark.parametrize("kind, children", [("sde", ()), ("tree", (2, 1, 3)), ("ode", ())])
def test_an_endpoints_lineage_follows_its_states(path, kind, children):
    s, found = steps_of(path), go(path, kind, children)
    rows, last = found.transitions, K - 1 if kind == "ode" else int(s.noisy.nonzero().max())
    for k in range(last + 1):
        at = found.lineage[:, k]
        assert bool((rows.step[at] == k).all())
        assert torch.equal(rows.prompt[at], found.prompt)
        if k < last:
            assert torch.equal(rows.x_next[at], rows.x[found.lineage[:, k + 1]])
            assert torch.equal(rows.root[at], rows.root[found.lineage[:, k + 1]])
    after = rows.x_next[found.lineage[:, last]]
    if last < K - 1:
        after = euler(Counting(path)(after, s.times[K - 1], found.prompt), s.times[K])
    torch.testing.assert_close(found.x_0, after)


@PATHS
def test_branches_are_one_drawn_step_off_the_roots_ode(path):
    children = (2, 0, 3, 0, 1)
    s, found, ode = steps_of(path), go(path, "branches", children), go(path, "ode")
    rows = found.transitions
    assert torch.equal((found.lineage >= 0).sum(1), torch.ones(len(found.x_0)))
    row = found.lineage.max(1).values
    assert torch.equal(row.sort().values, torch.arange(len(rows)))  # each endpoint has a row of its own
    torch.testing.assert_close(rows.x, ode.transitions.x[rows.step * 3 + rows.root])  # the ODE's rows are (step, root)
    for end, r in enumerate(row.tolist()):
        x = rows.x_next[r : r + 1]
        for k in range(int(rows.step[r]) + 1, K):
            x = euler(Counting(path)(x, s.times[k], rows.prompt[r : r + 1]), s.times[k + 1])
        torch.testing.assert_close(found.x_0[end : end + 1], x)
        assert found.prompt[end] == rows.prompt[r]


def test_ode_states_are_the_roots_where_nothing_branches():
    found, ode = go(FLOW, "branches", (2, 0, 3, 0, 1)), go(FLOW, "ode")
    still: OdeStates = found.ode_states
    assert still.step.tolist() == [1, 1, 1, 3, 3, 3]  # not the last step
    torch.testing.assert_close(still.x, ode.transitions.x[still.step * 3 + torch.arange(3).repeat(2)])
    assert torch.equal(still.prompt, torch.tensor([0, 1, 0, 0, 1, 0]))
    assert not len(go(FLOW, "sde").ode_states.step)


def test_siblings_of_a_tree_share_their_state_and_no_more():
    found = go(FLOW, "tree", (2, 1, 3), roots=1)
    rows = found.transitions
    assert torch.bincount(rows.step).tolist() == [2, 2, 6, 6, 6, 6]
    states = [rows.x[rows.step == k].unique(dim=0).shape[0] for k in range(K)]
    assert states == [1, 2, 2, 6, 6, 6]
    assert found.x_0.unique(dim=0).shape[0] == 6


def test_steps_that_are_not_drawn_follow_the_ode():
    drawn = torch.tensor([False, True, True, False, False, False])
    s, found = steps_of(FLOW), go(FLOW, "sde", drawn=drawn)
    rows = found.transitions
    assert rows.step.tolist() == [1, 1, 1, 2, 2, 2]
    x, prompt = normal(3, 2, seed=2), torch.arange(3) % 2
    torch.testing.assert_close(rows.x[:3], euler(Counting(FLOW)(x, s.times[0], prompt), s.times[1]))
    x = rows.x_next[3:]
    for k in (3, 4, 5):
        x = euler(Counting(FLOW)(x, s.times[k], prompt), s.times[k + 1])
    torch.testing.assert_close(found.x_0, x)
    assert found.lineage.tolist() == [[-1, i, 3 + i, -1, -1, -1] for i in range(3)]


def test_an_ode_keeps_the_states_that_its_plan_asks_for():
    drawn = torch.tensor([False, True, False, False, False, True])
    found, whole = go(FLOW, "ode", drawn=drawn), go(FLOW, "ode", drawn=torch.ones(K).bool())
    assert found.transitions.step.tolist() == [1, 1, 1, 5, 5, 5]
    torch.testing.assert_close(found.x_0, whole.x_0)
    nothing = go(FLOW, "ode", drawn=torch.zeros(K).bool())
    assert len(nothing.transitions) == 0 and torch.equal(nothing.x_0, found.x_0)


@SHAPED
def test_a_seed_is_a_rollout(kind, children):
    first, again, other = (go(FLOW, kind, children, seed=seed) for seed in (5, 5, 6))
    for f in fields(Transitions):
        assert torch.equal(getattr(first.transitions, f.name), getattr(again.transitions, f.name))
    assert torch.equal(first.x_0, again.x_0)
    assert torch.equal(first.x_0, other.x_0) == (kind == "ode")


@SHAPED
def test_rows_wait_where_they_are_told_to(kind, children):
    found = go(FLOW, kind, children, store="cpu")
    tensors = [getattr(found.transitions, f.name) for f in fields(Transitions)] + [found.x_0, found.ode_states.x]
    assert {part.device.type for part in tensors} == {"cpu"}
    assert not any(part.requires_grad for part in tensors)
    if torch.cuda.is_available():
        assert found.transitions.to("cuda").x.device.type == "cuda"


def test_rows_can_be_picked():
    rows = go(FLOW, "sde").transitions
    at = torch.tensor([7, 2, 2])
    for f in fields(Transitions):
        assert torch.equal(getattr(rows[at], f.name), getattr(rows, f.name)[at])


# endpoints of a row


@PATHS
@SHAPED
def test_values_of_endpoints_are_averaged_over_those_that_a_row_leads_to(path, kind, children):
    found = go(path, kind, children)
    values = normal(len(found.x_0), 3, seed=8)
    for given_ in (values, values[:, 0]):
        ours = found.mean_over_endpoints(given_)
        for row in range(len(found.transitions)):
            leaves = (found.lineage == row).any(1)
            assert leaves.any()
            torch.testing.assert_close(ours[row], given_[leaves].mean(0))


def test_the_first_rows_of_a_tree_are_means_over_their_leaves():
    found = go(FLOW, "tree", (2, 1, 3), roots=1)
    reward = found.x_0[:, 0]
    torch.testing.assert_close(found.mean_over_endpoints(reward)[:2], reward.reshape(2, 3).mean(1))


@PATHS
@pytest.mark.parametrize("kind, children", [("sde", ()), ("tree", (2, 1, 3))])
def test_soft_returns_take_off_the_later_log_ratios_and_not_the_rows_own(path, kind, children):
    found = go(path, kind, children)
    rewards, log_rho = normal(len(found.x_0), seed=9), normal(len(found.transitions), seed=10)
    ours = soft_returns(found, rewards, log_rho)
    for row in range(len(found.transitions)):
        truth = []
        for end in (found.lineage == row).any(1).nonzero().squeeze(1).tolist():
            later = [r for r in found.lineage[end, int(found.transitions.step[row]) + 1 :].tolist() if r >= 0]
            truth.append(rewards[end] - log_rho[later].sum())
        torch.testing.assert_close(ours[row], torch.stack(truth).mean())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=K).filter(any))
def test_t13_reallocating_branches_leaves_every_active_step_the_same_weight(children):
    rows = go(FLOW, "branches", tuple(children)).transitions
    total = torch.zeros(K).index_add(0, rows.step, rows.weight)
    active = total[total > 0]
    torch.testing.assert_close(active, active.mean().expand_as(active))
    assert float(rows.weight.mean()) == pytest.approx(1, rel=1e-5)
    k = torch.tensor([c for c in children if c]).float()
    torch.testing.assert_close(total[total > 0] / 3, k.mean().expand_as(k))  # k_avg / k each, of the released code


@pytest.mark.parametrize("kind, children", [("sde", ()), ("ode", ()), ("tree", (2, 1, 3))])
def test_weights_are_equal_by_step_for_every_shape(kind, children):
    rows = go(FLOW, kind, children).transitions
    total = torch.zeros(K).index_add(0, rows.step, rows.weight)
    torch.testing.assert_close(total, total.mean().expand_as(total))


# which rows are trained


@given(st.integers(1, 60), st.integers(0, 5))
def test_thinning_keeps_the_last_step_and_one_of_each_block_without_repeats(keep, seed):
    """Defect 2 of section 7: the released draw takes columns with replacement."""
    ends, many = 4, 50
    lineage = torch.arange(ends * many).reshape(many, ends).T.clone()
    step = torch.arange(many).repeat_interleave(ends)
    rows = Transitions(*[torch.zeros(ends * many, 1)] * 4, step, step * 0, step * 0, torch.ones(ends * many),
                       torch.arange(ends * many))  # fmt: skip
    found = Rollout(rows, torch.zeros(ends, 1), torch.zeros(ends).long(), lineage, None, torch.arange(ends))
    kept = thinned(found, keep, ends, seeded(seed))
    for end in range(ends):
        steps = step[kept][torch.isin(kept, lineage[end])].tolist()
        assert len(steps) == len(set(steps)) == min(keep, many)
        assert many - 1 in steps
        for block in torch.arange(many - 1).tensor_split(keep - 1) if 1 < keep < many else ():
            assert len(set(steps) & set(block.tolist())) == 1


def test_thinning_draws_every_step_of_a_block():
    found = go(FLOW, "sde", roots=2)
    seen = {int(k) for seed in range(40) for k in found.transitions.step[thinned(found, 3, 2, seeded(seed))]}
    assert seen == set(range(K))


# the plan that settings ask for


def world(path, steps: int = K) -> Exact:
    grid = flow_grid(steps) if path is FLOW else ddim_grid(TOY, steps)
    return Exact(triangle(), path, grid)


def setting(path, reward=LINEAR, **settings) -> AlignContext:
    given_ = {"prompts": ("",), "steps": K, "prompts_per_epoch": 1, "rollouts": 3, "temperature": 0.5, **settings}
    return AlignContext.of(world(path), AlignConfig(**given_), reward)


def test_plans_of_settings():
    flow, vp = setting(FLOW).plan, setting(TOY).plan
    assert flow.is_stochastic.tolist() == [True] * K and vp.is_stochastic.tolist() == [True] * (K - 1) + [False]
    plan_ = setting(FLOW, window=(1, 3)).plan
    assert plan_.is_stochastic.tolist() == [False, True, True, True, False, False]
    assert setting(FLOW, rollout="branches", branches=(4,)).plan.num_branches.tolist() == [4] * K
    assert setting(TOY, rollout="branches", branches=(4,)).plan.num_branches.tolist() == [4] * (K - 1) + [0]
    assert setting(FLOW, rollout="branches", branches=(2, 0, 3)).plan.num_branches.tolist() == [2, 0, 3, 0, 0, 0]
    assert setting(FLOW, rollout="tree", branches=(2, 1, 3)).plan.num_branches.tolist() == [2, 1, 3, 1, 1, 1]
    assert setting(TOY, rollout="tree", branches=(2,)).plan.num_branches.tolist() == [2] * (K - 1) + [1]
    narrow = setting(FLOW, rollout="branches", branches=(4,), window=(2, 3)).plan
    assert narrow.num_branches.tolist() == [0, 0, 4, 4, 0, 0]
    assert setting(FLOW, rollout="ode", estimator="nft").plan.is_stochastic.tolist() == [False] * K
    assert setting(FLOW, rollout="ode", estimator="terminal").plan.is_stochastic.tolist() == [True] * K
    early = setting(FLOW, rollout="ode", estimator="terminal", window=(0, 1)).plan
    assert early.is_stochastic.tolist() == [True] * 2 + [False] * (K - 2)
    assert setting(FLOW, last_step="draw").plan.is_stochastic.tolist() == [True] * K
    assert setting(FLOW, last_step="ode").plan.is_stochastic.tolist() == [True] * (K - 1) + [False]
    with pytest.raises(InputError, match="leave no step with a density"):
        setting(FLOW, last_step="draw", window=(K - 1, K - 1))


@pytest.mark.parametrize("last_step", ["train", "draw", "ode"])
def test_the_last_step_is_trained_or_only_drawn_or_the_odes(last_step):
    """Both ways are releases': Flow-GRPO judges what the last drawn step gave, DanceGRPO the estimate of x_0 there."""
    one = setting(FLOW, last_step=last_step)
    batch = collect(one, 0, Log())
    last = K if last_step == "train" else K - 1
    assert batch.rollout.transitions.step.unique().tolist() == list(range(last))
    some = collect(setting(FLOW, last_step=last_step, train_steps=3), 0, Log()).rollout.transitions.step
    assert len(some) == 9 and int(some.max()) < last  # three rollouts
    if last_step == "train":
        assert int((some == K - 1).sum()) == 3


def test_a_deviation_of_the_collection_is_that_of_every_endpoint():
    one = setting(FLOW, prompts=("a", "b"), prompts_per_epoch=2, rollouts=4, advantage="global-std")
    batch, log = collect(one, 0, Log()), Log()
    rewards = batch.rewards.reshape(2, 4)
    truth = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    for k in range(K):
        rows = batch.rollout.transitions.step == k
        torch.testing.assert_close(batch.advantage[rows], truth.flatten())
    again = collect(replace(one, config=replace(one.config, advantage="global-std", estimator="nft", rollout="ode",
                                                renoise=1)), 0, log)  # fmt: skip
    assert again.advantage.abs().max() > 0 and log["deviation of all rewards"] > 0


# collections


def test_prompts_do_not_repeat_while_there_are_enough():
    one = setting(FLOW, prompts=("a", "b", "c", "d", "e"), prompts_per_epoch=5, rollouts=2)
    assert sorted(choose(one, seeded(3)).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    more = choose(replace(one, config=replace(one.config, prompts_per_epoch=7)), seeded(3))
    assert sorted(torch.bincount(more).tolist()) == [2, 2, 2, 4, 4]


def test_a_collection_is_judged_once_an_endpoint_and_differentiated_once_a_trajectory():
    """Defect 3 of section 7: the released code takes the clean gradient again at every step."""
    calls = []

    def reward(x: Tensor, prompts) -> Tensor:
        calls.append((len(x), x.requires_grad))
        return 3 - x[:, 0] / 2

    one = setting(TOY, Reward("counted", True, reward), estimator="terminal", rollouts=7, train_steps=2)
    with one.model.count_nfe() as nfe:
        batch = collect(one, 0, Log())
    assert calls == [(7, False), (7, True)]
    assert nfe.total == 7 * one.plan.nfe()
    assert len(batch.rollout.transitions) == 7 * 2
    assert not batch.guidance.requires_grad


@PATHS
def test_the_lean_adjoint_is_the_gradient_through_the_reference_chain(path):
    """a_{k+1} = d r(x_K) / d x_{k+1} with the noises held, for DDIM's certain last step too."""
    one = setting(path, estimator="adjoint", sde="ddim", state="current", rollouts=5)
    batch = collect(one, 0, Log())
    rows, s, lineage = batch.rollout.transitions, one.schedule, batch.rollout.lineage
    for k in range(int(s.noisy.nonzero().max()) + 1):
        row = lineage[:, k]
        x = rows.x_next[row].clone().requires_grad_(True)
        y = x
        for later in range(k + 1, K):
            t = s.times[later].to(y)
            pred = one.predict(y, t, torch.zeros(5).long())
            step = gaussian_step("ddim", pred, s.times[later + 1].to(y), 1.0, s.times[1].to(y))
            at = lineage[:, later]
            y = step.mean + (float(s.sigma[later]) * rows.noise[at] if s.noisy[later] else 0)
        (truth,) = torch.autograd.grad((3 - y[:, 0] / 2).sum() / 0.5, x)
        torch.testing.assert_close(batch.guidance[row], truth, rtol=2e-4, atol=2e-5)


def test_next_state_guidance_carries_omega_and_current_state_guidance_does_not():
    now, ahead = (
        collect(setting(TOY, estimator="terminal", state=state, rollouts=4), 0, Log()) for state in ("current", "next")
    )
    rows = now.rollout.transitions
    torch.testing.assert_close(now.guidance, torch.tensor([-1.0, 0.0]).expand(len(rows), 2))
    omega = steps_of(TOY).omega[rows.step]
    torch.testing.assert_close(ahead.guidance, L.over(omega, now.guidance) * now.guidance)


def test_tweedie_guidance_is_taken_where_the_settings_say():
    for state in ("current", "next"):
        one = setting(FLOW, estimator="tweedie", state=state, rollouts=4, sde="ddim")
        batch = collect(one, 0, Log())
        rows, s = batch.rollout.transitions, one.schedule
        for k in range(K):
            at = rows.step == k
            x, t = (rows.x[at], s.times[k]) if state == "current" else (rows.x_next[at], s.times[k + 1])
            truth = G.tweedie(lambda x: 2 * (3 - x[:, 0] / 2), one.place(rows.prompt[at]), x, t.to(x), "full")
            truth = truth * (1 if state == "current" else float(s.omega[k]))
            torch.testing.assert_close(batch.guidance[at], truth)


def test_advantages_compare_siblings_of_one_state_or_all_rows_of_a_prompt():
    shape = {"rollout": "branches", "branches": (3, 0, 2), "rollouts": 2, "advantage": "mean"}
    for group_by in ("root", "prompt"):
        one = setting(FLOW, group_by=group_by, **shape)
        batch = collect(one, 0, Log())
        rows = batch.rollout.transitions
        returns = batch.rollout.mean_over_endpoints(batch.rewards) / 0.5
        truth = torch.empty(len(rows))
        for k in (0, 2):
            for root in (0, 1):
                at = (rows.step == k) & (rows.root == root)
                peers = at if group_by == "root" else rows.step == k
                truth[at] = returns[at] - returns[peers].mean()
                assert rows.x[at].unique(dim=0).shape[0] == 1
        torch.testing.assert_close(batch.advantage, truth.clamp(-5, 5))


def test_shared_noise_is_one_start_a_prompt():
    one = setting(FLOW, shared_noise=True, prompts=("a", "b"), prompts_per_epoch=2, rollouts=3)
    rows = collect(one, 0, Log()).rollout.transitions
    first = rows.x[rows.step == 0]
    assert first.unique(dim=0).shape[0] == 2 and bool((first[:3] == first[0]).all())


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_renoised_rows_lie_on_the_path_at_the_samplers_own_times(name):
    one = setting(FLOW, estimator=name, rollout="ode", rollouts=5, renoise=4)
    batch = collect(one, 0, Log())
    rows, s = batch.rollout.transitions, one.schedule
    assert len(rows) == 5 * 4 == len(batch.advantage)
    t = s.times[rows.step].to(rows.x)
    torch.testing.assert_close(rows.x, noised(FLOW, rows.x_next, rows.noise, t))
    torch.testing.assert_close(rows.x_next, batch.rollout.x_0.repeat_interleave(4, 0))
    assert all(len(set(some.tolist())) == 4 for some in rows.step.reshape(5, 4))  # of one endpoint, no time twice
    torch.testing.assert_close(rows.output_old, one.output(rows.x, rows.step, rows.prompt))
    assert bool((batch.advantage.reshape(5, 4) == batch.advantage.reshape(5, 4)[:, :1]).all())


def test_t13_the_rewards_scale_over_the_temperature_is_all_that_counts():
    loud = Reward("loud", True, lambda x, prompts: 10 * (3 - x[:, 0] / 2))
    for kw in (
        {"estimator": "terminal"}, {"estimator": "tweedie"}, {"estimator": "adjoint", "sde": "ddim"},
        {"advantage": "raw", "soft": True}, {"advantage": "leave-one-out"},
    ):  # fmt: skip
        plain = collect(setting(FLOW, temperature=2.0, **kw), 0, Log())
        scaled = collect(setting(FLOW, loud, temperature=20.0, **kw), 0, Log())
        torch.testing.assert_close(scaled.advantage, plain.advantage)
        if plain.guidance is not None:
            assert plain.guidance.any()
            torch.testing.assert_close(scaled.guidance, plain.guidance)


@pytest.mark.parametrize("settings", [{"estimator": "balance", "auxiliary": "flow"}, {"auxiliary": "baseline"}])
def test_critics_learn_the_reward_over_the_temperature_whatever_the_advantage(settings):
    """DAG's flow ends at r / alpha: a normalised advantage, which does without alpha, must not take it away."""
    one = setting(FLOW, advantage="std", **settings)
    batch = collect(one, 0, Log())
    torch.testing.assert_close(batch.returns, batch.rollout.mean_over_endpoints(batch.rewards) / 0.5)


def test_soft_collections_are_soft_returns_of_the_reference():
    """At the start policy and reference agree, so that r_tilde is r; then the last layer moves."""
    one = setting(FLOW, advantage="raw", soft=True, rollouts=4, advantage_clip=1e9)
    batch = collect(one, 0, Log())
    normalised = collect(replace(one, config=replace(one.config, advantage="std")), 0, Log())
    torch.testing.assert_close(normalised.returns, batch.returns)  # log-ratios are in nats, so that r must be too
    plain = batch.rollout.mean_over_endpoints(batch.rewards) / 0.5
    torch.testing.assert_close(batch.advantage, plain)
    one.model.unfreeze("all")
    with torch.no_grad():
        one.model.network.last.bias += 0.3
    batch = collect(one, 0, Log())
    rows, s = batch.rollout.transitions, one.schedule
    shift = torch.full_like(rows.output_old, 0.3)  # f - f_ref
    log_rho = (
        L.log_ratio(rows.output_old, rows.output_old - shift, rows.noise, s.w[rows.step])
        + L.square(shift) * s.w[rows.step].to(shift).square()
    )
    truth = soft_returns(batch.rollout, batch.rewards / 0.5, log_rho)
    torch.testing.assert_close(batch.returns, truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["reinforce", "tempflow-grpo", "branch-grpo", "rsm-branch-sd35", "flow-grpo"])
def test_recipes_cost_what_their_plans_say(name):
    config = replace(
        AlignConfig.preset_of(name, "laptop", {}), prompts=("",), steps=10, prompts_per_epoch=1, rollouts=2
    )
    one = AlignContext.of(world(FLOW, 10), config, LINEAR)
    log = Log()
    with one.model.count_nfe() as nfe:
        collect(one, 0, log)
    reference = 2 * int(one.plan.is_stochastic.sum()) if config.soft else 0
    assert nfe.total == 2 * one.plan.nfe() + reference
    assert log["reward calls"] == 2 * one.plan.endpoints()
