"""One launch at a time writes into a run directory: who is refused, who takes over, and what stays behind."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from fieldsmith import owner
from fieldsmith.errors import InputError
from fieldsmith.run import Run


@contextmanager
def child_owns(folder: pathlib.Path, end: bool = False) -> Iterator[int]:
    """Another process that began this run and waits (or ended without letting go); its number."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        Run(folder, "erase", {"lr": 1}).begin()
        os.write(told, b"x")
        if not end:
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    if end:
        os.waitpid(pid, 0)
    try:
        yield pid
    finally:
        if not end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_second_process_is_refused_in_one_sentence_and_may_go_on_when_the_first_is_gone(tmp_path):
    out = tmp_path / "run"
    with child_owns(out) as pid:
        written = (out / "config.toml").stat().st_mtime_ns
        with pytest.raises(InputError, match=rf"belongs to process {pid} on this machine since .*; wait until it ends"):
            Run(out, "erase", {"lr": 1})
        with pytest.raises(InputError, match="name another folder"):  # who had looked before it began
            owner.take(out)
        assert (out / "config.toml").stat().st_mtime_ns == written
    run = Run(out, "erase", {"lr": 1})  # killed, so that its lock is still there
    run.begin()
    assert json.loads((out / owner.FILE).read_text())["process"] == os.getpid()
    run.end()
    assert [file.name for file in out.iterdir()] == ["config.toml"]


def test_of_two_that_looked_before_either_began_one_is_refused(tmp_path):
    late = Run(tmp_path / "run", "erase", {"lr": 1})
    with child_owns(tmp_path / "run"), pytest.raises(InputError, match="belongs to process"):
        late.begin()


def test_another_run_that_began_in_the_meantime_is_not_written_over(tmp_path):
    late = Run(tmp_path / "run", "erase", {"lr": 2})
    with child_owns(tmp_path / "run", end=True), pytest.raises(InputError, match=r"holds another run \(lr differ\)"):
        late.begin()
    assert not (tmp_path / "run" / owner.FILE).exists()


def test_a_process_number_that_was_given_out_again_is_no_owner(tmp_path):
    with child_owns(tmp_path / "run") as pid:
        path = tmp_path / "run" / owner.FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"began": psutil.Process(pid).create_time() - 3600}))
        Run(tmp_path / "run", "erase", {"lr": 1}).begin()
        assert json.loads(path.read_text())["process"] == os.getpid()  # it is ours now


def test_the_owner_on_another_machine_is_named_with_what_to_remove(tmp_path):
    Run(tmp_path / "run", "erase", {"lr": 1}).begin()
    path = tmp_path / "run" / owner.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "gpu-7"}))
    with pytest.raises(InputError, match=rf"on machine 'gpu-7' since .* if that process is gone, remove '{path}'"):
        Run(tmp_path / "run", "erase", {"lr": 1})
    owner.release(tmp_path / "run")
    assert path.exists()  # it is not ours


@pytest.mark.parametrize("left", ["", '{"mach', "[]", '{"machine": "HERE", "process": "x", "began": 1, "taken": ""}'])
def test_what_a_killed_process_leaves_hinders_nobody(tmp_path, monkeypatch, left):
    monkeypatch.setattr(owner, "PATIENCE", 0.05)
    (tmp_path / owner.FILE).write_text(left.replace("HERE", socket.gethostname()))
    (tmp_path / ".config.toml.77").write_text("verb")  # killed while it wrote
    (tmp_path / ".fieldsmith-x_7abc").mkdir()  # killed while it tried whether it may write
    Run(tmp_path, "erase", {"lr": 1}).begin()
    assert {file.name for file in tmp_path.iterdir()} == {owner.FILE, "config.toml"}
    assert owner._read(tmp_path / owner.FILE)["process"] == os.getpid()


def test_of_several_processes_of_a_launch_the_main_one_owns_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Run(tmp_path / "run", "erase", {"lr": 1}).begin()
    assert not (tmp_path / "run").exists()
