"""Two processes are one: the same losses and weights from every verb, one writer, one voice; FSDP."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import several
import torch

from fieldsmith import processes
from fieldsmith.cli import main
from fieldsmith.commands import verbs
from fieldsmith.errors import InputError
from fieldsmith.models import load
from fieldsmith.run import Run
from tests import trained

HERE = pathlib.Path(__file__).parent
# what is a sum of many numbers differs in its order alone; a gradient that is 0 but for rounding is left out
TOLERANCE = 1e-3


def launch(
    arguments: Sequence[str], folder: pathlib.Path, how: str = "processes", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Two processes, as the documentation launches them."""
    config = HERE.parent / "docs" / "accelerate" / f"{how}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port",
               "0", *arguments]  # fmt: skip
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=600)


def in_two(folder: pathlib.Path, names: Sequence[str], how: str = "processes") -> dict[str, Any]:
    out = folder / "two.json"
    done = launch([str(HERE / "several.py"), str(out), ";".join(names)], HERE, how, RUNS=str(folder / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(out.read_text()))
    assert found.pop("processes") == 2 and found.pop("sharded") == (how == "fsdp")
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every verb in this process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(folder / "one"))
        several.main(folder / "one.json", tuple(several.VERBS))
    return dict(json.loads((folder / "one.json").read_text()))


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert [row["step"] for row in one["history"]] == [row["step"] for row in two["history"]] == [0, 1]
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE, abs=1e-6)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=TOLERANCE, abs=1e-6)
    for name, norm in one["weights"].items():
        assert norm == pytest.approx(two["weights"][name], rel=TOLERANCE, abs=1e-6), name


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_two(tmp_path_factory.mktemp("together"), tuple(several.VERBS))


@pytest.mark.parametrize("name", several.VERBS)
def test_two_processes_learn_what_one_learns(alone: dict[str, Any], together: dict[str, Any], name: str) -> None:
    assert_same(alone[name], together[name])
    if name != "sharpen, jacobian":  # forward mode does not pass from process to process, two reverse passes do
        assert alone[name]["forwards"] == together[name]["forwards"]


def test_fsdp_learns_the_same(alone: dict[str, Any], tmp_path: pathlib.Path) -> None:
    found = in_two(tmp_path, several.ADAPTERS, "fsdp")
    for name in several.ADAPTERS:
        assert_same(alone[name], found[name])
    assert list((tmp_path / "two").glob("*/checkpoints/step-*/weights.safetensors"))


def test_the_command_line_in_two_processes(tmp_path: pathlib.Path) -> None:
    words = [
        "erase", "--model", "zoo:shapes-flux", "--targets", "circle", "--anchors", "square", "--budget", "12",
        "--batch", "2", "--steps", "4", "--window", "0", "2", "--no-attacks", "--evaluate", "2",
    ]  # fmt: skip
    done = launch(["-m", "fieldsmith", *words, "--out", "two"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("page: ") == 1  # one process speaks
    trained.erase(load("zoo:shapes-flux"), verbs.settings("erase", words[1:]), Run(tmp_path / "one", "erase", {}))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {"config.toml", "metrics.jsonl", "metrics.json", "checkpoints", "adapter", "samples", "report.html"}


def test_too_many_processes_and_deepspeed_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    processes.check_share(1, "batch")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes share batch=3, so some idle; launch at most 3"):
        processes.check_share(3, "batch")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["erase", "--model", "zoo:shapes-flux"]) == 2
    assert "launch with FSDP instead" in capsys.readouterr().err


def test_one_process_asks_itself() -> None:
    assert processes.once(lambda: 3) == 3 and processes.is_main() and processes.count() == 1
    assert torch.equal(processes.mean(torch.ones(2)), torch.ones(2))
