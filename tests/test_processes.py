"""Two processes are one: the same losses and weights from every verb, one writer, one voice; FSDP; who dies."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
import several
import torch
import yaml

from experiments.tiny import flux_pipeline
from fieldsmith import processes
from fieldsmith.cli import main
from fieldsmith.commands import verbs
from fieldsmith.errors import InputError
from fieldsmith.models import load
from fieldsmith.run import Run
from tests import trained

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parent / "docs" / "accelerate"
# sums of many numbers differ in their order alone
ONE_A_VERB = ("erase", "align, zeroth order", "edit", "distill", "sharpen")
TOLERANCES = {"single": 1e-3, "double": 1e-5}
WORDS = [
    "erase", "--model", "zoo:shapes-flux", "--targets", "circle", "--anchors", "square", "--budget", "12",
    "--batch", "2", "--steps", "4", "--window", "0", "2", "--no-attacks", "--evaluate", "2",
]  # fmt: skip


def surroundings(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))  # for experiments.tiny
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path, **more}


def accelerated(arguments: Sequence[str], how: str = "processes", count: int = 2) -> list[str]:
    """As the documentation launches it."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{how}.yaml"),
            "--num_processes", str(count), "--main_process_port", "0", *arguments]  # fmt: skip


def run(command: Sequence[str], folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=surroundings(**environment), capture_output=True, text=True, timeout=600
    )


def together(
    folder: pathlib.Path, names: Sequence[str], how: str = "processes", count: int = 2, **environment: str
) -> dict[str, Any]:
    out = folder / "together.json"
    words = [str(HERE / "several.py"), str(out), ";".join(names)]
    done = run(accelerated(words, how, count), HERE, RUNS=str(folder / "runs"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(out.read_text()))
    assert found.pop("processes") == count and found.pop("sharded") == (how == "fsdp")
    return found


def alone(folder: pathlib.Path, names: Sequence[str], **environment: str) -> dict[str, Any]:
    out = folder / "alone.json"
    words = [sys.executable, str(HERE / "several.py"), str(out), ";".join(names)]
    done = run(words, HERE, RUNS=str(folder / "alone"), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(out.read_text()))


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


@pytest.fixture(scope="module", params=["single", "double"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Every verb in one process and in two: all recipes in float64, one a verb in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    names = tuple(several.VERBS) if request.param == "double" else ONE_A_VERB
    double = {"DOUBLE": "1"} if request.param == "double" else {}
    return alone(folder, names, **double), together(folder, names, **double), TOLERANCES[request.param]


@pytest.mark.parametrize("name", several.VERBS)
def test_two_processes_learn_what_one_learns(both: Any, name: str) -> None:
    one, two, tolerance = both
    if name not in one:
        pytest.skip("held in float64")
    assert_same(one[name], two[name], tolerance)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], pathlib.Path]:
    folder = tmp_path_factory.mktemp("sharded")
    return alone(folder, several.SHARDED), together(folder, several.SHARDED, "fsdp"), folder


@pytest.mark.parametrize("name", several.SHARDED)
def test_fsdp_learns_the_same(sharded: Any, name: str) -> None:
    assert_same(sharded[0][name], sharded[1][name], TOLERANCES["single"], padded=True)


def test_one_process_under_fsdp_learns_the_same(sharded: Any) -> None:
    whole, _, folder = sharded
    name = "align, lora"
    assert_same(whole[name], together(folder / "one", [name], "fsdp", 1)[name], TOLERANCES["single"])


# a run goes on with another number of processes

RESUMES = [
    ("erase", "processes", 2, "", 1), ("erase", "", 1, "processes", 2), ("erase", "processes", 2, "processes", 3),
    ("align, full", "fsdp", 2, "", 1), ("align, full", "", 1, "fsdp", 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "count", "then", "others"), RESUMES)
def test_a_run_goes_on_with_another_number_of_processes(
    sharded: Any, tmp_path: pathlib.Path, name: str, how: str, count: int, then: str, others: int
) -> None:
    environment = {"RUNS": str(tmp_path / "runs")}
    words = [str(HERE / "several.py"), str(tmp_path / "out.json"), name]

    def launch(how: str, count: int, **more: str) -> dict[str, Any]:
        command = accelerated(words, how, count) if how else [sys.executable, *words]
        done = run(command, HERE, **environment, **more)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads((tmp_path / "out.json").read_text()))[name]

    launch(how, count, CUT="1")
    assert len(list((tmp_path / "runs").glob("*/checkpoints/step-00000001/*.safetensors"))) == (
        2 if how == "fsdp" else 1
    )
    found = launch(then, others)
    whole = sharded[0][name] if name in sharded[0] else alone(tmp_path, [name])[name]
    for ours, theirs in zip(whole["history"], found["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-6)
    for key, norm in whole["weights"].items():
        assert norm == pytest.approx(found["weights"][key], rel=1e-3, abs=1e-6), key


# the commands, as a user types them


def logged(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_command_line_in_two_processes(tmp_path: pathlib.Path) -> None:
    done = run(accelerated(["-m", "fieldsmith", *WORDS, "--out", "two"]), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("page: ") == 1  # one process speaks
    trained.erase(load("zoo:shapes-flux"), verbs.settings("erase", WORDS[1:]), Run(tmp_path / "one", "erase", {}))
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {"config.toml", "metrics.jsonl", "metrics.json", "checkpoints", "adapter", "samples", "report.html"}


def test_torchrun_and_a_reward_that_is_not_differentiated(tmp_path: pathlib.Path) -> None:
    """Once a TypeError, 'cannot pickle generator': tests drove the loop, not the command."""
    words = ["align", "--model", "zoo:shapes-flux-small", "--reward", "right", "--preset", "flow-grpo",
             "--epochs", "1", "--prompts-per-epoch", "2", "--rollouts", "4", "--steps", "3", "--evaluate", "1",
             "--prompts", "a blue triangle", "a red star"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launcher, "-m", "fieldsmith", *words, "--out", "two"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["steps"] == len(logged(tmp_path / "two")) > 0
    assert logged(tmp_path / "two")[0]["reward calls"] == 8


# what is refused, and who dies


def sentences(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("fieldsmith: ")]


def test_more_processes_than_groups_are_refused_before_loading(tmp_path: pathlib.Path) -> None:
    done = run(accelerated(["-m", "fieldsmith", *WORDS, "--out", "three"], count=3), tmp_path)
    assert done.returncode != 0 and not (tmp_path / "three").exists()
    assert sentences(done.stderr) == [
        "fieldsmith: 3 processes share batch=2, so some idle; launch at most 2, or raise it"
    ]


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
    words = ["align", "--model", "zoo:shapes-flux-small", "--reward", "mine.py:score", "--epochs", "1",
             "--rollouts", "2", "--prompts-per-epoch", "2", "--steps", "2", "--prompts", "a blue triangle",
             "a red star"]  # fmt: skip
    done = run(accelerated(["-m", "fieldsmith", *words, "--out", "out"]), tmp_path)
    assert done.returncode != 0
    (sentence,) = sentences(done.stderr)
    assert "mine.py:score" in sentence and "no light" in sentence
    assert not (tmp_path / "out").exists()


def until(something: Callable[[], Any], seconds: float = 120) -> Any:
    began = time.monotonic()
    while not (found := something()):
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return found


def test_a_process_that_dies_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path: pathlib.Path) -> None:
    words = [*WORDS, "--budget", "30000", "--evaluate", "0", "--out", "out"]
    with (tmp_path / "err").open("w") as err:
        launched = subprocess.Popen(
            accelerated(["-m", "fieldsmith", *words]), cwd=tmp_path, env=surroundings(), stderr=err
        )
    try:
        until(lambda: list((tmp_path / "out" / "checkpoints").glob("step-*")))

        def second() -> int | None:
            for child in psutil.Process(launched.pid).children(recursive=True):
                if child.environ().get("RANK") == "1":
                    return child.pid
            return None

        os.kill(until(second), signal.SIGKILL)
        assert launched.wait(timeout=60) != 0
    finally:
        launched.kill()
    assert list((tmp_path / "out" / "checkpoints").glob("step-*/state.json"))
    assert len(sentences((tmp_path / "err").read_text())) == 1


# the sample configs


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_sample_configs_are_launched(name: str, tmp_path: pathlib.Path) -> None:
    """Each is accelerate's own form, named in docs/scale.md; a dry run says what each process is told."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert f"{name}.yaml`" in (HERE.parent / "docs" / "scale.md").read_text()
    told = tmp_path / "told.py"
    told.write_text(
        "from os import environ\n"
        "print(environ.get('WORLD_SIZE', 1), environ.get('ACCELERATE_USE_FSDP'), environ.get('FSDP_VERSION'))"
    )
    count = 2 if config["num_processes"] > 1 else 1
    done = run([*accelerated([], name, count), "--num_machines", "1", "--machine_rank", "0", str(told)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    fsdp = config["distributed_type"] == "FSDP"
    for line in done.stdout.splitlines():
        world, *rest = line.split()
        assert int(world) == count and (rest == ["true", "2"]) == fsdp


def test_a_reader_of_one_process_hears_itself() -> None:
    assert processes.exchange(3) == [3] and processes.is_main() and processes.count() == 1
    assert torch.equal(processes.total(torch.ones(2)), torch.ones(2))
    assert processes.owned(3).tolist() == [0, 1, 2]
    assert [(rows.tolist(), real) for rows, real in processes.chunks(torch.arange(3), 2)] == [([0, 1], 1.0), ([2], 1.0)]


# weights stream to the process that keeps them

STREAM = """
import resource, sys
from experiments.tiny import flux_pipeline
from fieldsmith import processes
processes.begin()
from fieldsmith.models import load
load(sys.argv[1])  # a small one, so that all is imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load(sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(p.numel() * p.element_size() for p in model.network.parameters())
print(processes.rank(), (peak - before) * 1024, total, flush=True)
"""


def test_no_process_holds_a_network_that_streams_into_parts(tmp_path: pathlib.Path) -> None:
    """A network's peak in a process is its part and one shard, beside what is read at the moment."""
    shard = 24_000_000
    for name, sizes in (("small", several.SMALL), ("large", {"layers": 2, "single_layers": 3, "heads": 20})):
        pipeline = flux_pipeline(several.WORDS, **sizes)
        pipeline.save_pretrained(tmp_path / name)
        pipeline.transformer.save_pretrained(tmp_path / name / "transformer", max_shard_size=shard)
    files = [path.stat().st_size for path in (tmp_path / "large" / "transformer").glob("*-of-*.safetensors")]
    (tmp_path / "stream.py").write_text(STREAM)
    done = run(accelerated(["stream.py", "small", "large"], "fsdp"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert sorted(row[0] for row in rows) == ["0", "1"] and len(files) > 3
    for _, peak, total in rows:
        assert int(total) > 100e6
        assert int(peak) < int(total) / 2 + max(files) + 20e6
