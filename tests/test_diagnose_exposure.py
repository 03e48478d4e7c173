"""`fieldsmith diagnose exposure`, as a user meets it, on a tiny random editor."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import pytest
import torch

from experiments.tiny import kontext_pipeline
from fieldsmith.cli import main
from fieldsmith.diagnoses.exposure import Operation, by_operation, verdict_of, words_of
from fieldsmith.measure.editing import Scores
from fieldsmith.measure.exposure import Exposure
from fieldsmith.measure.intervals import Interval
from fieldsmith.models import load
from fieldsmith.models.core import LoraSpec
from fieldsmith.worlds.scenes import OPERATIONS, VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import judge

SMALL = ["--samples", "3", "--steps", "2", "--turns", "2", "--still", "2"]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An untrained editor of scenes. Read only."""
    folder = tmp_path_factory.mktemp("editor") / "model"
    kontext_pipeline(VOCABULARY, size=24, text_width=32).save_pretrained(folder)
    (folder / "card.json").write_text('{"world": "scenes", "size": 24}')
    return folder


def exposed(editor: pathlib.Path, out: pathlib.Path, *more: str) -> dict[str, Any]:
    assert main(["diagnose", "exposure", "--model", str(editor), *SMALL, *more, "--out", str(out)]) == 0
    return dict(json.loads((out / "metrics.json").read_text()))


def test_the_command_measures_every_turn_and_writes_a_page(tmp_path, editor, capsys):
    found = exposed(editor, tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.toml", "metrics.json", "report.html"}
    assert (found["method"], found["instrument"]) == ("diagnose", "exposure")
    assert found["nfe"] == 3 * 2 * (2 * 2 + 2)
    for name in ("following", "marginal", "conditional", "teacher_forced", "gap", "consistency", "overall", "drift",
                 "artefacts"):  # fmt: skip
        assert len(found[name]) == 2
        assert all(one["low"] <= one["value"] <= one["high"] and one["n"] == 3 for one in found[name])
    assert found["gap"][0]["value"] == 0  # the first source is the planned one
    assert found["drift"][0]["value"] > 0.1 and found["artefacts"][0]["value"] > 0.05  # it has learned nothing
    assert sum(one["own"]["n"] for one in found["operations"].values()) == 3 * 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 3 * 2 * 3 and page.count("<svg") == 2
    assert "Turn 2 is done in" in found["words"] and found["words"] in page.replace("&#39;", "'")
    assert "Turn 2 is done in" in " ".join(capsys.readouterr().err.split())
    again = ["diagnose", "exposure", "--model", str(editor), *SMALL, "--out", str(tmp_path / "run")]
    assert main(again) == 0 and "is complete" in " ".join(capsys.readouterr().err.split())


def test_the_run_can_be_repeated_from_its_own_record(tmp_path, editor):
    first = exposed(editor, tmp_path / "a", "--blur", "0.5", "--still", "0")
    config = str(tmp_path / "a" / "config.toml")
    assert main(["diagnose", "exposure", "--config", config, "--out", str(tmp_path / "b")]) == 0
    second = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert {**first, "seconds": 0} == {**second, "seconds": 0} and "drift" not in first
    assert "between turns blur 0.5" in (tmp_path / "b" / "report.html").read_text()


def test_an_adapter_and_a_channel_change_what_is_measured(tmp_path, editor):
    plain = exposed(editor, tmp_path / "plain")
    model = load(str(editor), 24)
    model.adapt(LoraSpec("attention", 2))
    with torch.no_grad():
        for weight in model.trainable().values():
            weight.add_(0.1)
    model.save(tmp_path / "adapter")
    adapted = exposed(editor, tmp_path / "adapted", "--adapter", str(tmp_path / "adapter"))
    assert adapted["artefacts"][0] != plain["artefacts"][0]
    assert (tmp_path / "adapted" / "config.toml").read_text().count("adapter") >= 1
    noisy = exposed(editor, tmp_path / "noisy", "--noise", "0.3", "--contrast", "0.5")
    assert noisy["artefacts"][0] == plain["artefacts"][0]  # the upload is clean
    assert noisy["artefacts"][1] != plain["artefacts"][1]


def test_operations_are_counted_on_both_sources_and_the_hardest_comes_first():
    sessions = ScenesWorld(24).sessions(40, 3, 0)
    first, own, clean = sessions.clean(0), [], []
    for turn in (1, 2, 3):
        planned, after = sessions.clean(turn - 1), sessions.clean(turn).clone()
        for row, plan in enumerate(sessions.plans):
            if plan.turns[turn - 1].operation == "swap":
                after[row] = planned[row]
        clean.append(judge(sessions, turn, planned, after, first))
        own.append(judge(sessions, turn, planned, planned, first))  # an editor that does nothing to its own results
    images = torch.zeros(40, 4, 3, 24, 24)
    rows = by_operation(Exposure(tuple(own), tuple(clean), images), sessions, OPERATIONS)
    assert next(iter(rows)) == "swap" and rows["swap"].teacher_forced.value == 0
    assert all(one.teacher_forced.value == 1 for name, one in rows.items() if name != "swap")
    assert all(one.own.value < 0.2 for one in rows.values())
    counted = [turn.operation for plan in sessions.plans for turn in plan.turns].count("swap")
    assert rows["swap"].own.n == counted


def test_one_session_is_shown_without_intervals(tmp_path, editor):
    found = exposed(editor, tmp_path / "run", "--samples", "1")
    assert all("low" not in one for one in (*found["gap"], *found["drift"]))
    assert "one session has no interval" in found["words"]
    assert "nan]" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("forced", "gap", "n", "good", "word", "says"),
    [
        (0.8, (0.2, 0.1, 0.3), 64, False, "Exposure bias", "loses 20.0 points [10.0, 30.0] to its own sources, and the "
         "interval excludes 0."),
        (0.8, (0.0, -0.03, 0.04), 64, True, "Bears its own results", "the interval holds 0."),
        (0.8, (0.0, 0.0, 0.0), 8, None, "Not shown", "the interval holds 0; more --samples narrow it."),
        (0.8, (0.1, -0.1, 0.2), 64, None, "Not shown", "the interval holds 0; more --samples narrow it."),
        (0.05, (0.0, 0.0, 0.0), 64, None, "Too weak to tell", "hardly does a turn even on a clean source"),
    ],
)  # fmt: skip
def test_verdicts(forced, gap, n, good, word, says):
    def turns(*values: float | tuple[float, float, float]) -> tuple[Interval, ...]:
        return tuple(Interval(*(v if isinstance(v, tuple) else (v, 0, 1)), n, "%") for v in values)

    same = turns(0.9, forced - gap[0])
    scores = Scores(same, same, same, same, same, turns(0.9, forced), turns(0, gap))
    by_kind = {name: Operation(*turns(value, value)) for name, value in (("swap", 0.1), ("add", 0.9))}
    assert verdict_of(scores) == (good, word)
    words = words_of(scores, by_kind, turns(0.25))
    assert says in words and f"done in {100 * forced:.1f}% of {n} sessions on its planned source" in words
    assert "Worst operation on planned sources: swap (10%); best: add (90%)." in words
    assert words.endswith("Asked for nothing once, it loses 25% of its likeness to the first image.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--model": None}, "no model given; add --model FOLDER, an editing model of the scenes world"),
        ({"--model": "nowhere"}, "'nowhere' does not exist"),
        ({"--model": "zoo:shapes-flux"}, "'zoo:shapes-flux' names no world whose planned images are known"),
        ({"--model": "no card"}, "names no world whose planned images are known.*card.json like"),
        ({"--model": "no editor"}, "family flux. draws from words alone"),
        ({"--adapter": "nowhere"}, "nowhere"),
        ({"--resolution": "32"}, "resolution=32: .* edits scenes of 24 pixels; leave it out"),
        ({"--samples": "0"}, "samples=0 must be at least 1"),
        ({"--turns": "1"}, "turns=1: the first turn has no source of the editor's own"),
        ({"--turns": "9"}, "turns=9: the scenes world plans sessions of 1 to 8 turns"),
        ({"--dependency": "1.5"}, "dependency=1.5 must be at most 1"),
        ({"--blur": "2"}, "blur=2.0 must be at most 1"),
        ({"--contrast": "0"}, "contrast=0.0 must be above 0"),
        ({"--noise": "-1"}, "noise=-1.0 must be at least 0"),
        ({"--still": "-1"}, "still=-1 must be at least 0"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, editor, flux_folder, capsys, change, says):
    for name, source in (("no card", editor), ("no editor", flux_folder)):
        if change.get("--model") == name:
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("card.json"))
            change = {"--model": str(tmp_path / name)}
            if name == "no editor":
                (tmp_path / name / "card.json").write_text('{"world": "scenes", "size": 24}')
    settings = {"--model": str(editor), **change}
    words = [word for flag, value in settings.items() if value is not None for word in (flag, value) if word]
    small = [word for flag in range(0, 8, 2) if SMALL[flag] not in change for word in SMALL[flag : flag + 2]]
    assert main(["diagnose", "exposure", *words, *small, "--out", str(tmp_path / "run")]) == 2
    sentence = " ".join(capsys.readouterr().err.split())
    assert re.search(says, sentence), sentence
    assert not re.search(r"[.!] [A-Z]|Traceback", sentence), sentence
    assert not (tmp_path / "run").exists()
