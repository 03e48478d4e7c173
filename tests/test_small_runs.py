"""The least that can be asked: one prompt, one image, one step; what is measured scales with the run."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
import sys
from typing import Any, BinaryIO

import pytest

import fieldsmith as fs
from fieldsmith.cli import main
from fieldsmith.commands import demo, verbs


def test_one_prompt_and_one_image_have_no_interval(flux_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = fs.align(
        str(flux_folder), reward=lambda images, prompts: images.mean((1, 2, 3)), prompts=["a red circle"],
        preset="flow-grpo", epochs=1, prompts_per_epoch=1, rollouts=2, steps=2, ema_every=1, evaluate=1,
        out=tmp_path / "run",
    )  # fmt: skip
    (after,) = result.metrics["after"].values()
    assert after["n"] == 1 and after.get("low") is None
    assert "[" not in result.table()[0][1][1]
    assert fs.open_run(tmp_path / "run").table()[0][0] == result.table()[0][0]


@pytest.mark.parametrize("evaluate", [0, 1])
def test_an_erasure_draws_what_it_is_asked_to(flux_folder: pathlib.Path, evaluate: int) -> None:
    result = fs.erase(
        str(flux_folder), "red circle", "blue circle", preset="tiny", steps=2, window=(0, 1), batch=1, budget=2,
        subset=None, evaluate=evaluate,
    )  # fmt: skip
    assert len(result.pairs) == evaluate and all(len(pair.before) == 1 for pair in result.pairs)


def test_nothing_is_written_without_a_folder(
    flux_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fs.erase(str(flux_folder), "red circle", "blue circle", preset="tiny", steps=2, window=(0, 1), budget=1,
                      evaluate=0)  # fmt: skip
    assert result.out is None and list(tmp_path.iterdir()) == []


class Inside:
    """A process that is none: the command runs here, and has ended when it is first asked."""

    def __init__(
        self, command: list[str], stdout: BinaryIO, stderr: int, env: dict[str, str], start_new_session: bool
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "fieldsmith"] and int(env["OMP_NUM_THREADS"]) >= 1
        self.returncode = main(command[3:])

    def poll(self) -> int:
        return self.returncode


def test_a_chapter_that_stops_ends_the_demo_with_its_sentence(
    tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    wrong = dataclasses.replace(demo.CHAPTERS[0], words="--targets triangle --lr nan")
    monkeypatch.setattr(demo, "CHAPTERS", [wrong])
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "the chapter erase stopped (exit code 2): " in (said := capsys.readouterr().err) and "nan" in said
    assert "nan" in (tmp_path / "erase.log").read_text() and not (tmp_path / "index.html").exists()


def test_the_demo_is_commands_that_are_known_and_a_card_each(
    tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    for chapter in demo.CHAPTERS:
        verbs.settings(chapter.verb, chapter.words.split()).check()
    assert sum(chapter.share for chapter in demo.CHAPTERS) == pytest.approx(1)
    words = {
        "erase": "--targets triangle --anchors circle --budget 44 --batch 4 --window 0 10 --evaluate 1",
        "align": "--model zoo:shapes-flux-small --reward right --held-out-rewards classifier-heldout --prompts star "
        "--preset nft --epochs 1 --prompts-per-epoch 1 --rollouts 8 --steps 4 --evaluate 4",
    }
    some = [dataclasses.replace(chapter, words=words[chapter.verb]) for chapter in demo.CHAPTERS[:2]]
    monkeypatch.setattr(demo, "CHAPTERS", some)
    monkeypatch.setattr(demo, "Popen", Inside)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert (
        "align is done; about 0:0" in said.err
        and "erase is done\n" in said.err
        and f"open {tmp_path / 'index.html'}" in said.out
    )
    page = (tmp_path / "index.html").read_text()
    for chapter in some:
        assert (tmp_path / chapter.verb / "report.html").is_file() and f'href="{chapter.verb}/report.html"' in page
        assert chapter.command in page
        verdict = json.loads((tmp_path / chapter.verb / "metrics.json").read_text())["verdict"]
        assert verdict["sentence"] in html.unescape(page)
    assert "http" not in page
