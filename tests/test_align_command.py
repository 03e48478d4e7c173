"""`fieldsmith align` as a user meets it: every recipe runs, runs resume exactly, bad input is one sentence."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fieldsmith as fs
from fieldsmith import verb
from fieldsmith.cli import main
from fieldsmith.commands.verbs import settings
from fieldsmith.errors import InputError, NotFiniteError, RewardError
from fieldsmith.methods.align.config import FIRST_ORDER, PAPER, RECIPES, AlignConfig
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.rewards import Reward
from fieldsmith.run import Run
from fieldsmith.verb import Trained

pytestmark = pytest.mark.usefixtures("few_steps")
SMALL = "zoo:shapes-flux-small"
PROMPTS = ("a blue triangle", "a blue star")
TINY: dict[str, Any] = {"epochs": 1, "prompts": PROMPTS, "prompts_per_epoch": 2, "rollouts": 2, "chunk": 64}
REWARDED = [name for name, recipe in RECIPES.items() if recipe.get("estimator") != "dpo"]  # test_align_pairs.py
BRIGHT = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))


def preset(name: str, scale: str = "laptop", **changes: Any) -> AlignConfig:
    return AlignConfig.preset_of(name, scale, {}).replace(**changes)


def align(model: Model, config: AlignConfig, reward: Reward = BRIGHT, *more: Any) -> Trained:
    return verb.train(ALIGN, model, config, Inputs(reward), *more)[1]


def moved(model: Model) -> float:
    return max(float(p.detach().abs().max()) for key, p in model.trainable().items() if "lora_B" in key)


def refused(capsys: pytest.CaptureFixture[str], *words: str, says: str) -> None:
    assert main(["align", *words]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, text), text


def fits(name: str, flow: bool) -> bool:
    """Whether the recipe's steps are of this kind of path."""
    sde = preset(name).sde
    return sde in (("auto", "flow-sde", "dance-sde", "cps", "ddim") if flow else ("auto", "ddim", "ddim-uniform"))


@pytest.fixture(scope="module")
def flux(small_flux_folder: pathlib.Path) -> Model:
    return load(small_flux_folder)


@pytest.fixture(scope="module")
def deeper(flux_folder: pathlib.Path) -> Model:
    """Two blocks of each kind: in two or three steps some recipes' gradients vanish in a network of one."""
    return load(flux_folder)


@pytest.fixture(scope="module")
def unet(unet_folder: pathlib.Path) -> Model:
    return load(unet_folder)


@pytest.mark.parametrize("name", [name for name in REWARDED if fits(name, flow=True)])
def test_every_recipe_moves_a_flow(name, flux):
    flux.remove_training()
    config = preset(name, **TINY | {"prompts": ("a red circle", "a blue square"), "rank": 2})
    done = align(flux, config)
    assert done.steps == config.epochs * config.updates and done.nfe > 0
    assert 0 < moved(flux) < 1


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", REWARDED)
def test_few_sampling_steps_run_or_are_refused(name, steps, deeper, unet):
    """On a flow, and on a diffusion model where the recipe is not a flow's."""
    for model, prompts in ((deeper, ("a red circle",)), (unet, ("cat",))):
        if model is unet and fits(name, flow=True):
            continue
        model.remove_training()
        config = preset(name, **TINY | {"prompts": prompts, "prompts_per_epoch": 1, "steps": steps, "rank": 2})
        try:
            assert align(model, config).steps == config.updates
        except InputError as error:
            assert not model.trains and re.search(
                "no step with a density|is 0 at every|branch schedule|does not fit|leaves none of", str(error)
            )
        else:
            assert 0 < moved(model) < 1


def test_recipes_move_a_diffusion_unet(unet):
    for name in ("ddpo", "pcpo-diffusion", "sqdf", "residual-nabla-db-full", "adjoint-matching", "nft"):
        unet.remove_training()
        config = preset(name, **TINY | {"prompts": ("cat", "owl"), "steps": 5})
        assert align(unet, config).steps == config.updates
        assert moved(unet) > 0


def test_a_recipe_is_a_few_fields_and_published_scales_are_valid():
    assert all(len(recipe) < 15 for recipe in RECIPES.values())
    for name in RECIPES:
        given = {} if name in REWARDED else {"pairs": "given:1"}
        preset(name, **given).check()
        if name in PAPER:
            preset(name, "paper", **given).check()


def test_files_and_flags_come_after_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('preset = "nft"\nlr = 0.5\nrollouts = 3\n')
    config = settings("align", ["--config", str(file), "--rollouts", "4", "--out", "here"])
    assert (config.preset, config.estimator, config.lr, config.rollouts) == ("nft", "nft", 0.5, 4)
    for model, recipe, rank in (("a/model", "flow-grpo", 32), ("a/model", "draft", 16), (SMALL, "flow-grpo", 16)):
        assert settings("align", ["--model", model, "--preset", recipe, "--out", "here"]).rank == rank
    paper = settings("align", ["--preset", "flow-grpo", "--scale", "paper", "--out", "here"])
    assert paper.rank == 32 and settings("align", ["--preset", "flow-grpo", "--out", "here"]).rank == 16


def test_training_does_not_depend_on_the_chunk_or_on_where_trajectories_wait():
    ends = []
    for changes in ({"chunk": 512}, {"chunk": 17}, {"trajectories": "cpu"}):
        model = load(SMALL)
        align(model, preset("flow-grpo", **TINY | {"epochs": 2, "steps": 5} | changes))
        ends.append(torch.cat([p.detach().flatten() for key, p in model.trainable().items() if "lora_B" in key]))
    assert torch.equal(ends[0], ends[2])
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()  # Adam's first steps follow the sign of what rounds to 0


def test_pruned_and_full_differ_only_by_their_helper():
    for name in ("vgg-flow", "residual-nabla-db"):
        full = preset(f"{name}-full")
        assert full.replace(auxiliary="none", preset=name) == preset(name) and full.auxiliary != "none"


# what a reward is asked


def counting(asked: list[int], breaks_after: float = float("inf"), differentiable: bool = True) -> Reward:
    """Brightness that says how many images each call had, and raises from the call after `breaks_after` on."""

    def count(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if len(asked) >= breaks_after:
            raise KeyError("no more")
        asked.append(len(images))
        return images.mean((1, 2, 3))

    return Reward("counting", differentiable, count)


@pytest.mark.parametrize("name", ["flow-grpo", "nft", "rsm-branch-sd35", "draft"])
def test_a_reward_is_asked_once_for_each_image(name, flux):
    """What the preflight rolls out is the first collection, and its cost is that collection's."""
    flux.remove_training()
    asked: list[int] = []
    logs: list[dict[str, float]] = []
    config = preset(
        name,
        **TINY
        | {"prompts": ("a red circle", "a blue square"), "epochs": 2, "rank": 2, "chunk": 3 if name == "draft" else 64},
    )
    job, done = verb.train(
        ALIGN, flux, config, Inputs(counting(asked)), callback=lambda step, log: logs.append(log) if step else None
    )
    roots = config.prompts_per_epoch * config.rollouts
    collections = done.steps if name == "draft" else config.epochs
    assert sum(asked) == collections * roots * job.context.plan.endpoints()
    assert sum(log.get("reward calls", 0) for log in logs) == sum(asked)
    first, second = (log["nfe"] for log in logs[config.updates - 1 :: config.updates])
    assert second == 2 * first


def test_a_run_that_resumes_asks_for_no_collection_again(tmp_path, flux):
    config = preset("nft", **TINY | {"prompts": ("a red circle",), "epochs": 3, "rank": 2})
    asked: list[int] = []
    with pytest.raises(RewardError, match="'counting' raised KeyError: 'no more'"):
        flux.remove_training()
        align(flux, config, counting(asked, 2, differentiable=False), Run(tmp_path / "run", "align", config))
    flux.remove_training()
    done = align(flux, config, counting(asked), Run(tmp_path / "run", "align", config))
    assert done.steps == 3 * config.updates and len(asked) == 3
    flux.remove_training()
    whole = align(flux, config)
    assert whole.nfe == done.nfe


@pytest.mark.parametrize("name", ["flow-grpo", "draft"])
def test_a_reward_that_raises_midway_keeps_the_last_finished_update(name, tmp_path, flux):
    flux.remove_training()
    config = preset(name, **TINY | {"prompts": ("a red circle",), "epochs": 5, "rank": 2})
    with pytest.raises(RewardError, match="raised KeyError") as raised:
        align(flux, config, counting([], 3), Run(tmp_path / "run", "align", config))
    assert isinstance(raised.value.__cause__, KeyError)
    done = 3 if name == "draft" else 3 * config.updates
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == f"step-{done:08d}"


@pytest.mark.parametrize("name", ["flow-grpo", "draft"])
def test_images_of_diverged_weights_are_not_the_rewards_fault(name, flux):
    flux.remove_training()
    config = preset(name, **TINY | {"prompts": ("a red circle",), "epochs": 3, "rank": 2, "updates": 1})

    def diverge(step: int, log: dict[str, float]) -> None:
        if step == 1:
            for p in flux.trainable().values():
                p.data.fill_(float("nan"))

    with pytest.raises(NotFiniteError, match=r"holds nan in .* under 'a red circle', at step 1; .*lr than 0\.001"):
        align(flux, config, BRIGHT, None, diverge)


# from Python


def test_functions_and_any_iterable_serve_as_reward_and_prompts(flux, tmp_path):
    def dark(images, prompts):
        return [1 - float(image.mean()) for image in images]

    flux.remove_training()
    words = (word for word in ("a red circle", "a blue square"))
    result = fs.align(
        flux, dark, words, held_out_rewards=["brightness"], preset="nft", epochs=1, rollouts=2, steps=2, evaluate=2
    )
    assert result.config.reward == "function:dark" and result.config.prompts == ("a red circle", "a blue square")
    assert list(result.metrics["after"]) == ["dark", "brightness"] and result.metrics["rest"]["n"] >= 4
    assert result.metrics["after"]["dark"]["n"] == 4
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue circle\n")
    flux.remove_training()
    again = fs.align(flux, "brightness", file, preset="draft", epochs=1, updates=1, steps=2, evaluate=0)
    assert again.config.prompts == ("a red circle", "a blue circle") and not again.pairs
    with pytest.raises(InputError, match="no prompts given"):
        fs.align(flux, dark, preset="nft")


# the run directory

RUN = ["align", "--model", SMALL, "--reward", "brightness", "--prompts", *PROMPTS, "--preset", "rsm-branch-sd35",
       "--evaluate", "2", "--prompts-per-epoch", "2", "--rollouts", "1"]  # fmt: skip


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, capsys):
    words = [*RUN, "--epochs", "2", "--held-out-rewards", "classifier-heldout"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0

    def cut(done: int, log: dict[str, float]) -> None:  # in the middle of a collection: it has to be taken again
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fs.align(config=settings("align", [*words[1:], "--out", str(tmp_path / "cut")]), callback=cut)
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


def test_a_model_of_the_users_own_is_aligned_and_shown(tmp_path, small_flux_folder):
    words = ["align", "--model", str(small_flux_folder), "--reward", "brightness", "--prompts", "a red circle",
             "--preset", "nft", "--epochs", "1", "--prompts-per-epoch", "1", "--rollouts", "4", "--steps", "4",
             "--evaluate", "4"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["rewards"]) == {"brightness"} and metrics["rest"]["n"] >= 4  # no judge knows this model
    assert (tmp_path / "run" / "adapter").is_dir() and (tmp_path / "run" / "report.html").exists()
    again = ["--config", str(tmp_path / "run" / "config.toml"), "--evaluate", "0"]  # what trains hangs on no evaluation
    assert main(["align", *again, "--out", str(tmp_path / "again")]) == 0
    one, other = (load_file(tmp_path / n / "adapter" / "pytorch_lora_weights.safetensors") for n in ("run", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_black_box_reward_goes_up():
    """A black-box reward goes up, without a gradient from it."""
    black = Reward("brightness", False, BRIGHT.function)
    rewards: list[float] = []
    config = preset("rsm-branch-sd35", **TINY | {"epochs": 6, "lr": 3e-3})
    align(
        load(SMALL), config, black, None, lambda step, log: rewards.append(log["reward"]) if "reward" in log else None
    )
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.02


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
        (["--kl", "-1"], "kl=-1.0 must be at least 0"),
        (["--window", "3", "10"], r"window \(3, 10\) does not fit 10 sampler steps"),
        (["--reward", "remote:http://127.0.0.1:9/v1?model=m"], "does not answer"),
        (["--reward", "constant:same"], "'constant:same' gave 0.5 to all"),
        (["--preset", "nft", "--reward", "constant:same"], "'constant:same' gave 0.5 to all"),
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


def test_what_words_alone_refuse_is_refused_before_torch_is_imported(tmp_path):
    """A reward's, preset's or model's name, a missing file, a field's range."""
    wrong = [["--reward", "rihgt"], ["--held-out-rewards", "clip"], ["--preset", "flow-grop"], ["--model", "zoo:shape"],
             ["--prompts", "absent.txt"], ["--lr", "inf"], ["--epochs", "0"], ["--window", "3", "20"]]  # fmt: skip
    code = f"""
import sys
from fieldsmith.cli import main
codes = [main(["align", "--out", {str(tmp_path / "run")!r}, *words]) for words in {wrong!r}]
print(codes, {{"torch", "diffusers"}} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == f"{[2] * len(wrong)} set()", found.stderr


def test_first_order_recipes_need_a_gradient(flux):
    black = Reward("black", False, BRIGHT.function)
    for name in RECIPES:
        if preset(name).estimator in FIRST_ORDER and fits(name, flow=True):
            with pytest.raises(InputError, match="black box"):
                align(flux, preset(name, **TINY), black)
