"""What programs and shells are told: --quiet, --json, completion."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from fieldsmith.cli import VERBS, main
from fieldsmith.commands import completion
from fieldsmith.result import Result
from tests.test_cli import TINY

pytestmark = pytest.mark.usefixtures("few_steps")


def test_a_run_tells_a_program_where_it_is_and_what_it_found(flux_folder, tmp_path, capfd):
    out = tmp_path / "run"
    words = [*TINY, "--model", str(flux_folder), "--out", str(out)]
    assert main([*words, "--json", "--quiet"]) == 0
    text, errors = capfd.readouterr()
    told = json.loads(text)
    assert errors == ""
    assert told["command"] == "erase" and told["out"] == str(out)
    assert told["verdict"]["sentence"] and told["verdict"]["tone"] in ("good", "bad", "mixed")
    assert told["metrics"] == json.loads((out / "metrics.json").read_text())
    assert {str(out / name) for name in ("report.html", "metrics.json", "config.toml")} <= set(told["files"])
    assert not [file for file in told["files"] if "checkpoints" in file] and Result.open(out).verb == "erase"
    assert main([*words, "--json"]) == 0  # complete: the same is told, and people are told it on stderr
    again, errors = capfd.readouterr()
    assert json.loads(again) == told and "this run is complete" in errors


def test_what_is_wrong_is_an_object_too(capfd):
    assert main(["erase", "--json", "--steps", "none"]) == 2
    text, errors = capfd.readouterr()
    told = json.loads(errors)
    assert text == "" and told["exit"] == 2 and "steps" in told["error"]
    assert main(["nothing", "--quiet"]) == 2
    assert capfd.readouterr().err.startswith("fieldsmith: 'nothing' is not in the vocabulary")


def test_a_quiet_command_says_nothing_and_a_table_is_an_object(capfd):
    assert main(["families", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main(["families", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["metrics"]["flux"]["erase"] == "LoRA, full" and told["out"] is None and told["files"] == []
    assert main(["erase", "--help", "--json"]) == 0  # is for people
    assert "settings that matter" in capfd.readouterr().out


def script(shell: str, capsys: Any) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(shell: str, code: str, words: list[str]) -> set[str]:
    """What the shell itself offers for the last word."""
    if shell == "fish":
        asked = f"{code}\ncomplete -C '{' '.join(words)}'"
    elif shell == "zsh":  # compadd works in its line editor alone, so what it is given is printed
        quoted = " ".join(f"'{word}'" for word in words)
        asked = f"compdef() {{ }}\ncompadd() {{ shift; print -l -- $@ }}\n_files() {{ }}\n{code}\n"
        asked += f"words=({quoted}); CURRENT={len(words)}; _fieldsmith"
    else:
        quoted = " ".join(f"'{word}'" for word in words)
        asked = f"{code}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _fieldsmith\n"
        asked += "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run([shell, "-c", asked], capture_output=True, text=True, check=True)
    return {line.split("\t")[0] for line in done.stdout.splitlines() if line}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_flags_and_their_words(shell, capsys):
    code = script(shell, capsys)
    for verb, flags in completion.commands().items():
        assert verb in code
        assert all((f" -l {flag[2:]}" if shell == "fish" else flag) in code for flag in flags)
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here to ask")
    assert {"align", "erase", "export"} <= completed(shell, code, ["fieldsmith", ""])
    assert completed(shell, code, ["fieldsmith", "dist"]) >= {"distill"}
    offered = completed(shell, code, ["fieldsmith", "erase", "--t"])
    assert {"--targets", "--templates"} <= offered
    assert "diffusers" in completed(shell, code, ["fieldsmith", "export", "x", "--format", ""])
    assert "guidance" in completed(shell, code, ["fieldsmith", "diagnose", ""])


def test_the_words_of_a_flag_are_those_of_its_setting():
    found = completion.commands()
    assert list(found) == list(VERBS)
    assert found["export"]["--format"] == ("kohya", "comfyui", "diffusers")
    assert found["push"]["--private"] == () and found["push"]["--no-private"] == ()
    assert "gem" in (found["erase"]["--method"] or ("gem",)) and found["erase"]["--targets"] is None
    assert "--held-out-rewards" in found["plan"]


@pytest.mark.parametrize("words", [["completion"], ["completion", "bash", "zsh"], ["completion", "powershell"]])
def test_no_shell_or_an_unknown_one_is_refused(words, capsys):
    assert main(words) == 2
    assert "bash" in capsys.readouterr().err or "powershell" in words
