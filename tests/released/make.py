"""Fixtures of releases: numbers that their own functions gave on random tensors, with gradients.

    python -m tests.released.make FLOW_GRPO DIFFUSION_NFT DANCE_GRPO AWM EDIT_R1

takes clones of yifan123/flow_grpo, NVlabs/DiffusionNFT, XueZeyue/DanceGRPO, scxue/advantage_weighted_matching and
PKU-YuanGroup/Edit-R1 and writes tests/released/*.json with the commit of each. Functions are taken out of their files
by name, losses that stand inside of training loops by their first and last line; nothing of them is kept here.
"""

from __future__ import annotations

import ast
import json
import math
import pathlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

HERE = pathlib.Path(__file__).parent
SHAPE = (3, 2, 2, 2)
GIVEN = {
    "torch": torch, "math": math, "np": numpy, "Optional": Any, "Union": {}, "randn_tensor": randn_tensor,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
}  # fmt: skip


def source(clone: str, path: str) -> str:
    return subprocess.run(
        ["git", "-C", clone, "show", f"HEAD:{path}"], check=True, capture_output=True, text=True
    ).stdout


def commit(clone: str) -> str:
    return subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout[
        :40
    ]


def named(clone: str, path: str, name: str) -> Any:
    """A function or class out of a file, without its imports."""
    text = "from __future__ import annotations\n"
    code = source(clone, path)
    for node in ast.parse(code).body:
        if getattr(node, "name", "") == name:
            text += ast.get_source_segment(code, node) or ""
    space = dict(GIVEN)
    exec(text, space)
    return space[name]


def between(clone: str, path: str, first: str, last: str, space: dict[str, Any]) -> dict[str, Any]:
    """The names that lines of a training loop leave behind, from the first that holds `first` to `last`."""
    lines = source(clone, path).splitlines()
    begin = next(k for k, line in enumerate(lines) if first in line)
    end = next(k for k, line in enumerate(lines) if k >= begin and last in line)
    space = {"torch": torch, "loss_terms": {}, **space}
    exec(textwrap.dedent("\n".join(lines[begin : end + 1])), space)
    return space


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double().tolist()
    if isinstance(value, numpy.ndarray):
        return value.tolist()
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def write(name: str, repository: str, clone: str, what: dict[str, Any]) -> None:
    head = {"repository": repository, "commit": commit(clone), "command": "python -m tests.released.make"}
    (HERE / f"{name}.json").write_text(json.dumps(head | plain(what)) + "\n")


def drawn(*names: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPE, generator=generator) for name in names}


def flow_grpo(clone: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    step = named(clone, "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py", "sde_step_with_logprob")
    x = drawn("output", "sample", "after", seed=0)
    output = x["output"].requires_grad_()
    at = [0, 4, 8]
    _, log_prob, mean, std = step(
        scheduler, output, scheduler.timesteps[at], x["sample"], noise_level=0.7, prev_sample=x["after"]
    )
    log_prob.sum().backward()
    steps = {**x, "sigmas": scheduler.sigmas, "step": at, "log_prob": log_prob, "mean": mean, "std": std.flatten(),
             "slope": output.grad}  # fmt: skip

    new = (torch.tensor([1e-5, -2e-4, 3e-4, -1e-5]) - 1.2).requires_grad_()
    means = [torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    train = SimpleNamespace(adv_clip_max=5.0, clip_range=1e-4, beta=0.04)
    space = {
        "sample": {"advantages": torch.tensor([[0.5], [-7.0], [9.0], [-0.3]]), "log_probs": torch.full((4, 1), -1.2)},
        "j": 0, "config": SimpleNamespace(train=train), "log_prob": new, "prev_sample_mean": means[0],
        "prev_sample_mean_ref": means[1], "std_dev_t": torch.tensor([0.6, 0.8, 1.1, 2.0]).reshape(4, 1, 1, 1),
    }  # fmt: skip
    found = _loss(clone, space)
    found["policy_loss"].backward()
    loss = {"new": new, "old": -1.2, "advantage": space["sample"]["advantages"].flatten(), "mean": means[0],
            "mean_ref": means[1], "std": space["std_dev_t"].flatten(), "policy_loss": found["policy_loss"],
            "kl_loss": found["kl_loss"], "slope": new.grad}  # fmt: skip

    tracker = named(clone, "flow_grpo/stat_tracking.py", "PerPromptStatTracker")
    prompts, rewards = ["a", "b", "a", "b", "c", "c", "a", "b"], [0.1, 0.8, 0.4, 0.8, 0.2, 0.21, 0.9, 0.7]
    advantages = {str(all_of_them): tracker(all_of_them).update(prompts, rewards) for all_of_them in (True, False)}
    write("flow_grpo", "yifan123/flow_grpo", clone, {
        "step": steps, "loss": loss, "advantages": {"prompts": prompts, "rewards": rewards, **advantages},
    })  # fmt: skip


def _loss(clone: str, space: dict[str, Any]) -> dict[str, Any]:
    found = between(clone, "scripts/train_sd3.py", "advantages = torch.clamp(", "policy_loss = torch.mean(", space)
    return found | between(clone, "scripts/train_sd3.py", "kl_loss = ((prev", "kl_loss = torch.mean(", found)


def dance_grpo(clone: str) -> None:
    step = named(clone, "fastvideo/train_grpo_flux.py", "flux_step")
    sigmas = 3 * torch.linspace(1, 0, 9) / (1 + 2 * torch.linspace(1, 0, 9))
    x, found = drawn("output", "sample", "after", seed=3), []
    for k in (0, 4, 7):
        output = x["output"].clone().requires_grad_()
        _, x_0, log_prob = step(output, x["sample"], 0.3, sigmas, k, x["after"], True, True)
        log_prob.sum().backward()
        found.append({"step": k, "x_0": x_0, "log_prob": log_prob, "slope": output.grad})
    write(
        "dance_grpo",
        "XueZeyue/DanceGRPO",
        clone,
        {**x, "sigmas": sigmas, "eta": 0.3, "steps": [plain(f) for f in found]},
    )


def diffusion_nft(clone: str) -> None:
    x = drawn("forward_prediction", "old_prediction", "x0", "noise", "ref_forward_prediction", seed=4)
    t, found = torch.tensor([0.9, 0.5, 0.2]), []
    t_expanded = t.reshape(3, 1, 1, 1)
    for beta in (1.0, 0.1):
        output = x["forward_prediction"].clone().requires_grad_()
        train = SimpleNamespace(adv_clip_max=5.0, beta=1e-4)
        space = x | {
            "forward_prediction": output, "advantages_clip": torch.tensor([2.0, -1.5, 5.0]), "t_expanded": t_expanded,
            "xt": (1 - t_expanded) * x["x0"] + t_expanded * x["noise"],
            "config": SimpleNamespace(beta=beta, train=train),
        }  # fmt: skip
        last = "loss += config.train.beta * torch.mean(kl_div_loss)"
        loss = between(clone, "scripts/train_nft_sd3.py", "# normalize advantage", last, space)["loss"]
        loss.backward()
        found.append({"beta": beta, "loss": loss, "slope": output.grad})
    decay = named(clone, "scripts/train_nft_sd3.py", "return_decay")
    at = [0, 10, 74, 75, 100, 208, 209, 600]
    write("diffusion_nft", "NVlabs/DiffusionNFT", clone, {
        **x, "t": t, "advantage": [2.0, -1.5, 5.0], "losses": [plain(f) for f in found],
        "old": {"updates": at, **{name: [decay(n, kind) for n in at] for name, kind in (("ramp", 1), ("late", 2))}},
    })  # fmt: skip


def awm(clone: str) -> None:
    path = "advantage_weighted_matching/scripts/train_sd3_awm.py"
    log_prob = named(clone, path, "compute_log_prob_awm")
    x, found = drawn("output", "old", "x0", "noise", seed=5), []
    t = torch.tensor([0.9, 0.5, 0.2]).reshape(3, 1, 1, 1)
    config = SimpleNamespace(train=SimpleNamespace(cfg=False, ghuber_power=0.25))
    for weighting in ("Uniform", "ghuber"):

        def of(prediction: Tensor, weighting: str = weighting) -> Tensor:
            network = lambda **_: (prediction,)  # noqa: E731
            return log_prob(network, None, None, t, None, None, config, x["x0"], x["x0"], x["noise"], weighting)[0]

        output = x["output"].clone().requires_grad_()
        value = of(output)
        value.sum().backward()
        found.append({"weighting": weighting, "log_prob": value, "old": of(x["old"]), "slope": output.grad})
    write(
        "awm", "scxue/advantage_weighted_matching", clone, {**x, "t": t.flatten(), "found": [plain(f) for f in found]}
    )


def edit_r1(clone: str) -> None:
    tracker = named(clone, "flow_grpo/stat_tracking.py", "PerPromptStatTracker")
    rewards = numpy.concatenate([0.5 + d * numpy.array([-1.0, 1.0, 1.0, -1.0]) for d in (0.3, 0.04, 0.01)])
    advantages, stds, means = tracker(global_std=True).update([name for name in "abc" for _ in range(4)], rewards)
    taught = (stds > 0.05) & (means < 0.9)
    write("edit_r1", "PKU-YuanGroup/Edit-R1", clone, {
        "rewards": rewards, "advantages": advantages, "stds": stds, "taught": taught,
    })  # fmt: skip


if __name__ == "__main__":
    for make, clone in zip((flow_grpo, diffusion_nft, dance_grpo, awm, edit_r1), sys.argv[1:], strict=True):
        make(clone)
