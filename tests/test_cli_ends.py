"""How the command line ends where something outside fails: a closed pipe, the disk, the network, a user's code."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import urllib.error
from typing import Any

import pytest
import torch

from fieldsmith import cli, disk, rewards
from fieldsmith.errors import RunError


def ends(monkeypatch: pytest.MonkeyPatch, capsys: Any, error: BaseException, *words: str) -> tuple[int, str]:
    """Exit code and what is printed on stderr where a command raises."""

    def command(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_command", command)
    return cli.main(list(words)), capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["erase", "--help"], ["families"]], ids=" ".join)
def test_a_closed_pipe_ends_quietly(words):
    process = subprocess.Popen(
        [sys.executable, "-m", "fieldsmith", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `| head` does once it has read enough, here before anything is written
    assert process.stderr.read() == "" and process.wait() == 141


def test_a_pipe_that_closes_during_a_command_ends_quietly(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_is_closed", lambda stream: stream is sys.stdout)
    assert ends(monkeypatch, capsys, BrokenPipeError(32, "Broken pipe"), "erase") == (141, "")


def test_a_pipe_of_somebody_else_is_the_network(monkeypatch, capsys):
    """A server that hangs up gives what a closed stdout gives, and once ended the command without a word."""
    with open("/dev/null", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(cli, "_is_closed", lambda stream: False)
        code, text = ends(monkeypatch, capsys, BrokenPipeError(32, "Broken pipe"), "erase")
    assert (code, text) == (3, "fieldsmith: the network failed: Broken pipe. The last good checkpoint stays\n")


def test_whether_who_reads_has_gone_is_asked_of_the_system():
    ear, mouth = os.pipe()
    with open(mouth, "w") as stream:
        assert not cli._is_closed(stream)
        os.close(ear)
        assert cli._is_closed(stream)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(28, "No space left on device", "runs/a"),
            "the disk: No space left on device: 'runs/a' (12.3 MB free).",
        ),
        (OSError(28, "No space left on device"), "the disk: No space left on device."),
        (PermissionError(13, "Permission denied", "/a"), "the disk: Permission denied: '/a'."),
        (OSError(30, "Read-only file system", "/a"), "the disk: Read-only file system: '/a'."),
        (urllib.error.URLError("no route"), "the network failed: <urlopen error no route>."),
        (OSError(113, "No route to host"), "the network failed: No route to host."),
        (ConnectionResetError(104, "Connection reset by peer"), "the network failed: Connection reset by peer."),
        (socket.gaierror(-2, "Name or service not known"), "the network failed: Name or service not known."),
        (TimeoutError("timed out"), "the network failed: timed out."),
        (OSError("cannot reach the hub"), "cannot reach the hub."),
        (OSError(), "OSError."),
    ],
)
def test_what_the_system_refuses_is_named(monkeypatch, capsys, error, sentence):
    monkeypatch.setattr(disk, "free", lambda path: 12_300_000)
    code, text = ends(monkeypatch, capsys, error, "erase")
    assert (code, text) == (3, f"fieldsmith: {sentence} The last good checkpoint stays\n")


BROKEN = """
import json


def score(images, prompts):
    return inner(prompts)


def inner(prompts):
    return json.loads(prompts[0])
"""


def test_a_users_function_that_fails_is_one_sentence_and_with_debug_its_own_lines(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    monkeypatch.setattr(
        cli, "_command", lambda words: rewards.load(f"{file}:score")(torch.zeros(1, 3, 2, 2), ["a cat"])
    )
    assert cli.main(["align"]) == 3
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "Traceback" not in sentence
    assert f"fieldsmith: reward '{file}:score' raised JSONDecodeError: Expecting value" in sentence
    assert "(mine.py, line 10) for an image of prompt 'a cat'; fix the function" in sentence
    for words in (["--debug", "align"], ["align", "--debug"]):
        assert cli.main(words) == 3
        debug, _, last = capsys.readouterr().err.rpartition("fieldsmith: ")
        assert f"fieldsmith: {last}" == sentence
        assert debug.startswith("In your code:\n") and debug.count('File "') == 2 and debug.count(str(file)) == 2
        assert "return inner(prompts)" in debug and "json.decoder.JSONDecodeError: Expecting value" in debug
        assert str(pathlib.Path(cli.__file__).parent) not in debug


def test_debug_says_nothing_more_where_no_code_of_the_users_failed(monkeypatch, capsys):
    assert ends(monkeypatch, capsys, RunError("no more"), "align", "--debug") == (3, "fieldsmith: no more\n")


def test_a_wrong_signature_is_one_sentence_with_debug_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def score(images):\n    return 0\n")
    monkeypatch.setattr(cli, "_command", lambda words: rewards.load(f"{tmp_path}/mine.py:score"))
    assert cli.main(["align"]) == 3
    assert "takes (images), but it is called with (images, prompts)" in capsys.readouterr().err


AWAY = """
def score(images, prompts):
    raise {error}


def judge(before, after, instructions):
    raise {error}
"""


@pytest.mark.parametrize(
    "error", ["OSError('server away')", "BrokenPipeError(32, 'Broken pipe')", "ConnectionResetError(104, 'reset')"]
)
def test_an_error_of_the_system_in_a_users_function_is_the_functions(tmp_path, monkeypatch, capsys, error):
    """Once 'server away: the disk': a reward whose server went away."""
    file = tmp_path / "mine.py"
    file.write_text(AWAY.format(error=error))
    monkeypatch.setattr(
        cli, "_command", lambda words: rewards.load(f"{file}:score")(torch.zeros(1, 3, 2, 2), ["a cat"])
    )
    assert cli.main(["align"]) == 3
    sentence = capsys.readouterr().err
    assert f"reward '{file}:score' raised {error.partition('(')[0]}: " in sentence and "fix the function" in sentence
    assert "disk" not in sentence and "network" not in sentence
