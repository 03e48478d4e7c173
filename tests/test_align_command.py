"""`fieldsmith align` as a user meets it: every recipe runs, runs resume exactly, bad input is one sentence."""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import replace

import pytest
import torch
from fieldsmith.commands.align import configure
from fieldsmith.methods.align.loop import align
from safetensors.torch import load_file

from fieldsmith import training
from fieldsmith.cli import main
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.align.config import FIRST_ORDER, PAPER, RECIPES, check, preset
from fieldsmith.models import load
from fieldsmith.rewards import Reward
from fieldsmith.rewards import load as load_reward
from fieldsmith.worlds.shapes import ShapesWorld

SMALL = "zoo:shapes-flux-small"
PROMPTS = ("a blue triangle", "a blue star")
TINY = {"epochs": 1, "prompts": PROMPTS, "prompts_per_epoch": 2, "rollouts": 2, "chunk": 64}
BRIGHT = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))


def refused(capsys: pytest.CaptureFixture[str], *words: str, says: str) -> None:
    assert main(["align", *words]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, text), text


def fits(name: str, flow: bool) -> bool:
    """Whether the recipe's steps are of this kind of path."""
    sde = preset(name).sde
    return sde in (("auto", "flow-sde", "dance-sde", "cps", "ddim") if flow else ("auto", "ddim", "ddim-uniform"))


@pytest.mark.parametrize("name", [name for name in RECIPES if fits(name, flow=True)])
def test_every_recipe_moves_a_flow(name):
    model = load(SMALL)
    config = replace(preset(name), **{**TINY, "seed": 3})
    result = align(model, config, BRIGHT)
    assert result.steps == config.epochs * config.updates and result.forward_equivalents > 0
    moved = [p.abs().max() for key, p in model.trainable().items() if "lora_B" in key]
    assert all(torch.isfinite(m) for m in moved) and max(moved) > 0


@pytest.mark.parametrize(
    "name", ["ddpo", "pcpo-diffusion", "sqdf", "residual-nabla-db-full", "adjoint-matching", "nft"]
)
def test_recipes_move_a_diffusion_unet(name, unet_folder):
    model = load(unet_folder)
    config = replace(preset(name), **{**TINY, "prompts": ("cat", "owl"), "steps": 5, "subset": "attention"})
    if config.rollout == "branches":
        config = replace(config, branches=(2,))
    result = align(model, config, BRIGHT)
    assert result.steps == config.updates
    assert max(p.abs().max() for key, p in model.trainable().items() if "lora_B" in key) > 0


def test_a_recipe_is_a_few_fields_and_published_scales_are_valid():
    assert all(len(recipe) < 15 for recipe in RECIPES.values())
    for name in RECIPES:
        check(preset(name))
        if name in PAPER:
            check(preset(name, "paper"))


def test_files_and_flags_come_after_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "nft"\nlr = 0.5\nrollouts = 3\n')
    config = configure(["--config", str(file), "--rollouts", "4", "--out", "here"])
    assert (config.preset, config.estimator, config.lr, config.rollouts) == ("nft", "nft", 0.5, 4)
    for model, recipe, rank in (("a/model", "flow-grpo", 32), ("a/model", "draft", 16), (SMALL, "flow-grpo", 16)):
        assert configure(["--model", model, "--preset", recipe, "--out", "here"]).rank == rank
    paper = configure(["--preset", "flow-grpo", "--scale", "paper", "--out", "here"])
    assert paper.rank == 32 and configure(["--preset", "flow-grpo", "--out", "here"]).rank == 16


def test_training_does_not_depend_on_the_chunk_or_on_where_trajectories_wait():
    ends = []
    for changes in ({"chunk": 512}, {"chunk": 17}, {"trajectories": "cpu"}):
        model = load(SMALL)
        align(model, replace(preset("flow-grpo"), **{**TINY, "epochs": 2, **changes}), BRIGHT)
        ends.append(torch.cat([p.detach().flatten() for key, p in model.trainable().items() if "lora_B" in key]))
    assert torch.equal(ends[0], ends[2])
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()  # Adam's first steps follow the sign of what rounds to 0


def test_pruned_and_full_differ_only_by_their_helper():
    for name in ("vgg-flow", "residual-nabla-db"):
        pruned, full = preset(name), preset(f"{name}-full")
        assert replace(full, auxiliary="none", preset=name) == pruned and full.auxiliary != "none"


# the run directory

RUN = ["align", "--model", SMALL, "--reward", "brightness", "--prompts", *PROMPTS, "--preset", "rsm-branch-sd35",
       "--evaluate", "4", "--prompts-per-epoch", "2", "--rollouts", "1"]  # fmt: skip


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, monkeypatch, capsys):
    words = [*RUN, "--epochs", "3", "--held-out-rewards", "classifier-heldout"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    real = training._gradient

    def cut(step, *rest):  # in the middle of a collection: it has to be taken again
        if step == 3:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(training, "_gradient", cut)
    assert main([*words, "--out", str(tmp_path / "cut")]) == 130
    monkeypatch.setattr(training, "_gradient", real)
    assert main([*words, "--out", str(tmp_path / "cut")]) == 0
    one, other = (load_file(tmp_path / n / "adapter" / "pytorch_lora_weights.safetensors") for n in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert set(metrics["rewards"]) == {"brightness", "classifier-heldout", "valid"}
    again = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert again["rewards"] == metrics["rewards"]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "brightness went from" in page or "No gain" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|<script[^>]+src""", page)
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert "this run is complete" in " ".join(capsys.readouterr().err.split())


def test_a_model_of_the_users_own_is_aligned_and_shown(tmp_path, flux_folder):
    words = [
        "align",
        "--model",
        str(flux_folder),
        "--reward",
        "brightness",
        "--prompts",
        "a red circle",
        "--preset",
        "nft",
    ]
    assert main([*words, "--epochs", "1", "--steps", "4", "--evaluate", "4", "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["rewards"]) == {"brightness"} and metrics["rest"]["n"] >= 4  # no judge knows this model
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "report.html").exists()


def test_a_black_box_reward_goes_up():
    """A black-box reward goes up, without a gradient from it."""
    model, world = load(SMALL), ShapesWorld(32)
    reward = load_reward("brightness", world)
    black = Reward("brightness", False, lambda images, prompts: reward(images, prompts).detach())
    seen: list[float] = []
    config = replace(preset("rsm-branch-sd35"), **{**TINY, "epochs": 6, "lr": 3e-3})
    align(model, config, black, None, lambda step, log: seen.append(log["reward"]) if "reward" in log else None)
    assert sum(seen[-2:]) > sum(seen[:2]) + 0.02


# bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--preset", "flow-grop"], "'flow-grop'.*did you mean 'flow-grpo'"),
        (["--reward", "rihgt"], "'rihgt'.*did you mean 'right'"),
        (["--scale", "huge"], "scale 'huge' is unknown; use laptop or paper"),
        (["--preset", "vgg-flow"], "'right' is a black box.*zeroth-order preset"),
        (["--preset", "pcpo-diffusion"], "sde 'ddim-uniform' does not fit the path of zoo:shapes-flux-small"),
        (["--preset", "rsm-branch-sd35", "--steps", "6"], "branch schedule has 10 entries, the sampler 6 steps"),
        (["--rollouts", "1"], "rollouts=1 compares each reward with itself.*at least 2"),
        (["--prompts", "a rde circle"], "'rde'.*did you mean 'red'"),
        (["--prompts", "empty.txt"], "prompt file 'empty.txt' has no line"),
        (["--epochs", "0"], "epochs=0 must be at least 1"),
        (["--temperature", "0"], "temperature=0.0 must be above 0"),
        (["--kl", "-1"], "kl=-1.0 must not be negative"),
        (["--window", "3", "10"], r"window \(3, 10\) does not fit 10 sampler steps"),
        (["--reward", "remote:http://127.0.0.1:9/v1?model=m"], "does not answer"),
        (["--reward", "constant:same"], "same' gave 0.5 to all"),
        (["--preset", "nft", "--reward", "constant:same"], "same' gave 0.5 to all"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(capsys, tmp_path, monkeypatch, words, says):
    code = tmp_path / "code"
    code.mkdir()
    (code / "constant.py").write_text(
        "import torch\ndef same(images, prompts): return torch.full((len(images),), 0.5)\n"
    )
    monkeypatch.syspath_prepend(str(code))
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    if "empty.txt" in words:
        pathlib.Path("empty.txt").write_text("\n \n")
    refused(capsys, "--model", SMALL, "--out", "run", "--prompts-per-epoch", "2", *words, says=says)
    assert {p.name for p in place.iterdir()} <= {"empty.txt"}


def test_a_reward_that_breaks_midway_keeps_what_was_trained(tmp_path, monkeypatch, capsys):
    code = tmp_path / "code"
    code.mkdir()
    (code / "breaking.py").write_text(
        "import torch\ncalls = 0\n\ndef nan(images, prompts):\n    global calls\n    calls += 1\n"
        "    good = images.mean((1, 2, 3))\n    return good if calls < 4 else good * float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(code))
    words = [*RUN, "--reward", "breaking:nan", "--epochs", "9", "--out", str(tmp_path / "run")]
    assert main(words) == 3
    assert re.search("NaN or infinity for .* images", capsys.readouterr().err)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_reward_of_the_wrong_shape_is_refused():

    wrong = Reward("wrong", False, lambda images, prompts: images.mean((1, 2, 3))[:, None])
    with pytest.raises(RunError, match="'wrong' returned"):
        align(load(SMALL), replace(preset("flow-grpo"), **TINY), wrong)


def test_first_order_recipes_need_a_gradient():
    black = Reward("black", False, BRIGHT.function)
    for name in RECIPES:
        if preset(name).estimator in FIRST_ORDER and fits(name, flow=True):
            with pytest.raises(InputError, match="black box"):
                align(load(SMALL), replace(preset(name), **TINY), black)
