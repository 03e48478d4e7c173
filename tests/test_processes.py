"""Two processes are one: the same losses and weights from every verb, one writer, one voice; FSDP; who dies."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import yaml
from torch import multiprocessing

from experiments.tiny import flux_pipeline
from fieldsmith import processes, verb
from fieldsmith.api import erase_inputs
from fieldsmith.cli import main
from fieldsmith.commands import verbs
from fieldsmith.errors import InputError
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.models import load
from fieldsmith.run import Run
from tests import several
from tests.golden import parts

HERE = pathlib.Path(__file__).parent
# sums of many numbers differ in their order alone
ONE_A_VERB = ("erase", "align, zeroth order", "edit", "distill", "sharpen")
TOLERANCES = {"single": 1e-3, "double": 1e-5}
WORDS = [
    "erase", "--model", "zoo:shapes-flux-small", "--targets", "circle", "--anchors", "square", "--budget", "12",
    "--batch", "2", "--steps", "4", "--window", "0", "2", "--no-attacks", "--evaluate", "2",
]  # fmt: skip


def learned(
    folder: pathlib.Path,
    names: Sequence[str],
    config: str = "",
    count: int = 1,
    cut: bool = False,
    double: bool = False,
) -> dict[str, Any]:
    """What runs came to in so many processes; a second launch in the same folder goes on with them."""
    folder.mkdir(exist_ok=True)
    several.launch(
        several.learn, folder / "out.json", names, cut, double, config=config, count=count, RUNS=str(folder / "runs")
    )
    found = dict(json.loads((folder / "out.json").read_text()))
    assert found.pop("processes") == count and found.pop("sharded") == (config == "fsdp")
    return found


def told(folder: pathlib.Path, words: Sequence[str], count: int = 2) -> tuple[list[int], list[str]]:
    """Exit codes and sentences of a command in so many processes that no launcher watches."""
    several.launch(several.command, folder, words, config="processes", count=count)
    said = "".join((folder / f"err.{rank}").read_text() for rank in range(count))
    return [int((folder / f"code.{rank}").read_text()) for rank in range(count)], sentences(said)


def sentences(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("fieldsmith: ")]


def assert_same(one: dict[str, Any], two: dict[str, Any], tolerance: float, padded: bool = False) -> None:
    """`padded`: under FSDP processes go through the network equally often, and rows of weight 0 cost what others do."""
    assert [row["step"] for row in one["history"]] == [row["step"] for row in two["history"]] == [0, 1]
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - ({"nfe"} if padded else set()):
            # a loss of advantages that add up to 0 cancels: what is left is held against its terms, of size one
            floor = tolerance / 50 if key == "loss" else 1e-6
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=floor), key
    for name, norm in one["weights"].items():
        assert norm == pytest.approx(two["weights"][name], rel=tolerance, abs=1e-7), name
    assert one["forwards"] == two["forwards"] or (padded and one["forwards"] < two["forwards"])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One recipe a verb in two processes, in float32."""
    return learned(tmp_path_factory.mktemp("single"), ONE_A_VERB, "processes", 2)


@pytest.mark.parametrize("name", ONE_A_VERB)
def test_two_processes_learn_what_is_frozen(single: dict[str, Any], name: str) -> None:
    """Which one process learns to more places: test_golden.py."""
    assert_same(parts.golden("several")[name], single[name], TOLERANCES["single"])


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every recipe in one process and in two, in float64."""
    folder, names = tmp_path_factory.mktemp("double"), tuple(several.VERBS)
    return learned(folder / "one", names, double=True), learned(folder / "two", names, "processes", 2, double=True)


@pytest.mark.parametrize("name", several.VERBS)
def test_two_processes_learn_what_one_learns(double: Any, name: str) -> None:
    assert_same(double[0][name], double[1][name], TOLERANCES["double"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], pathlib.Path]:
    folder = tmp_path_factory.mktemp("sharded")
    names = tuple(several.SHARDED)
    return learned(folder / "one", names), learned(folder / "two", names, "fsdp", 2), folder


@pytest.mark.parametrize("name", several.SHARDED)
def test_fsdp_learns_the_same(sharded: Any, name: str) -> None:
    assert_same(sharded[0][name], sharded[1][name], TOLERANCES["single"], padded=True)


def test_one_process_under_fsdp_learns_the_same(sharded: Any) -> None:
    whole, _, folder = sharded
    name = "align, lora"
    assert_same(whole[name], learned(folder / "alone", [name], "fsdp", 1)[name], TOLERANCES["single"])


# a run goes on with another number of processes

RESUMES = [
    ("erase, lora", "processes", 2, "", 1), ("erase, lora", "", 1, "processes", 2),
    ("erase, lora", "processes", 2, "processes", 3), ("align, full", "fsdp", 2, "", 1),
    ("align, full", "", 1, "fsdp", 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "count", "then", "others"), RESUMES)
def test_a_run_goes_on_with_another_number_of_processes(
    sharded: Any, tmp_path: pathlib.Path, name: str, how: str, count: int, then: str, others: int
) -> None:
    learned(tmp_path / "run", [name], how, count, cut=True)
    parts = list((tmp_path / "run" / "runs").glob("*/checkpoints/step-00000001/*.safetensors"))
    assert len(parts) == (2 if how == "fsdp" else 1)
    whole, found = sharded[0][name], learned(tmp_path / "run", [name], then, others)[name]
    for ours, theirs in zip(whole["history"], found["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-6)
    for key, norm in whole["weights"].items():
        assert norm == pytest.approx(found["weights"][key], rel=1e-3, abs=1e-6), key


# the commands, as a user types them


def logged(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_command_line_in_two_processes(tmp_path: pathlib.Path) -> None:
    """A real launch, as the documentation has it."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                str(several.CONFIGS / "processes.yaml"), "--main_process_port", "0", "-m", "fieldsmith"]  # fmt: skip
    done = subprocess.run(
        [*launcher, *WORDS, "--out", "two"], cwd=tmp_path, env=parts.environment(), stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("page: ") == 1  # one process speaks
    config, inputs = erase_inputs(verbs.settings("erase", WORDS[1:]))
    verb.train(ERASE, load("zoo:shapes-flux-small"), config, inputs, Run(tmp_path / "one", "erase", {}))
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {"config.toml", "metrics.jsonl", "metrics.json", "checkpoints", "adapter", "samples", "report.html"}


ALIGN = ["align", "--model", "zoo:shapes-flux-small", "--epochs", "1", "--prompts-per-epoch", "2", "--evaluate", "1",
         "--prompts", "a blue triangle", "a red star", "--out", "out"]  # fmt: skip


def test_a_reward_that_is_not_differentiated_in_two_processes(tmp_path: pathlib.Path) -> None:
    """Once a TypeError, 'cannot pickle generator': tests drove the loop, not the command."""
    words = [*ALIGN, "--reward", "right", "--preset", "flow-grpo", "--rollouts", "4", "--steps", "3"]
    assert told(tmp_path, words)[0] == [0, 0]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == len(logged(tmp_path / "out")) > 0
    assert logged(tmp_path / "out")[0]["reward calls"] == 8


# what is refused, and who dies


def test_more_processes_than_groups_are_refused_before_loading(tmp_path: pathlib.Path) -> None:
    sentence = "fieldsmith: 3 processes share batch=2, so some idle; launch at most 2, or raise it"
    assert told(tmp_path, [*WORDS, "--out", "out"], count=3) == ([2] * 3, [sentence])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "launch with FSDP2 instead"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "launch with FSDP2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "launch with 'no' or 'bf16'"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "RANK": "0"}, "set fsdp_version: 2"),
    ],
)
def test_a_launchers_option_without_use_is_refused(
    settings: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert main(["erase", "--model", "zoo:shapes-flux"]) == 2
    assert sentence in capsys.readouterr().err


def test_under_fsdp_groups_have_to_be_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    processes.check_groups(3, "batch")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="batch=3 must be a multiple of 2; use 2 or 4"):
        processes.check_groups(3, "batch")


FAILING = """
import os
def score(images, prompts):
    if os.environ["RANK"] == "1":
        raise ValueError("no light")
    return [0.1 * i for i in range(len(prompts))]
"""


def test_what_fails_in_one_process_is_said_once_and_ends_all(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    codes, (sentence,) = told(tmp_path, [*ALIGN, "--reward", "mine.py:score", "--rollouts", "2", "--steps", "2"])
    assert 0 not in codes and "mine.py:score" in sentence and "no light" in sentence
    assert not (tmp_path / "out").exists()


def test_a_process_that_dies_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path: pathlib.Path) -> None:
    words = [*WORDS, "--budget", "30000", "--evaluate", "0", "--out", "out"]
    with pytest.raises(multiprocessing.ProcessExitedException, match="SIGKILL"):
        several.launch(several.dying, tmp_path, words, config="processes", count=2)
    assert list((tmp_path / "out" / "checkpoints").glob("step-*/state.json"))
    assert len(sentences("".join((tmp_path / f"err.{rank}").read_text() for rank in range(2)))) == 1


# the sample configs


@pytest.mark.parametrize("name", sorted(path.stem for path in several.CONFIGS.glob("*.yaml")))
def test_sample_configs_are_accelerates_own_form(name: str) -> None:
    """Each is named in docs/scale.md; accelerate's launcher reads it, and tells processes what it means."""
    config = yaml.safe_load((several.CONFIGS / f"{name}.yaml").read_text())
    assert f"{name}.yaml`" in (HERE.parent / "docs" / "scale.md").read_text()
    told = several.surroundings(name, 2 if config["num_processes"] > 1 else 1, "--num_machines", "1")
    assert int(told.get("WORLD_SIZE", 1)) == min(config["num_processes"], 2)
    assert told["ACCELERATE_MIXED_PRECISION"] == config["mixed_precision"]
    fsdp = config["distributed_type"] == "FSDP"
    assert ((told.get("ACCELERATE_USE_FSDP"), told.get("FSDP_VERSION")) == ("true", "2")) == fsdp


def test_a_reader_of_one_process_hears_itself() -> None:
    assert processes.exchange(3) == [3] and processes.is_main() and processes.count() == 1
    assert torch.equal(processes.total(torch.ones(2)), torch.ones(2))
    assert processes.owned(3).tolist() == [0, 1, 2]
    assert [(rows.tolist(), real) for rows, real in processes.chunks(torch.arange(3), 2)] == [([0, 1], 1.0), ([2], 1.0)]


# weights stream to the process that keeps them


def test_no_process_holds_a_network_that_streams_into_parts(tmp_path: pathlib.Path) -> None:
    """A network's peak in a process is its part and one shard, beside what is read at the moment."""
    shard = 24_000_000
    for name, sizes in (("small", several.SMALL), ("large", {"layers": 2, "single_layers": 3, "heads": 20})):
        pipeline = flux_pipeline(several.WORDS, **sizes)
        pipeline.save_pretrained(tmp_path / name)
        pipeline.transformer.save_pretrained(tmp_path / name / "transformer", max_shard_size=shard)
    files = [path.stat().st_size for path in (tmp_path / "large" / "transformer").glob("*-of-*.safetensors")]
    several.launch(several.stream, tmp_path / "out", tmp_path / "small", tmp_path / "large", config="fsdp", count=2)
    rows = json.loads((tmp_path / "out").read_text())
    assert len(rows) == 2 and len(files) > 3
    for peak, total in rows:
        assert total > 100e6
        assert peak < total / 2 + max(files) + 20e6
