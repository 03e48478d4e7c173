"""`fieldsmith diagnose MODEL` and the diagnosis of a reward: what they find, what they leave out, what they refuse."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from torch import Tensor

import fieldsmith as fs
from fieldsmith.cli import main
from fieldsmith.diagnoses import concepts, reward, run, smoothness
from fieldsmith.diagnoses.overview import PARTS
from fieldsmith.errors import InputError
from fieldsmith.measure.intervals import Interval, wilson

SMALL = {"samples": 2, "steps": 2}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# the best of k images


@pytest.mark.parametrize("distinct", (True, False))
def test_the_best_of_k_is_the_mean_over_all_choices(distinct):
    values = torch.rand(3, 5, generator=seeded(0), dtype=torch.float64)
    chased = torch.rand(3, 5, generator=seeded(1), dtype=torch.float64)
    chased = chased if distinct else (3 * chased).floor()  # equal rewards: each of the best is as likely
    for k in range(1, 6):
        for row in range(3):
            means = []
            for chosen in itertools.combinations(range(5), k):
                top = max(chased[row, i] for i in chosen)
                best = [float(values[row, i]) for i in chosen if chased[row, i] == top]
                means.append(sum(best) / len(best))
            # where rewards are equal over the edge of a choice, only the mean over the equal ones is shared
            expected = sum(means) / len(means)
            found = float(reward.best_of(values, chased, k)[row])
            assert found == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(reward.best_of(values, chased, 1), values.mean(1))


def test_a_reward_that_can_be_hacked_is_told_from_one_that_pays_and_a_blind_one():
    words: dict[str, list[str]] = {"against": [], "with": [], "apart": []}
    for seed in range(40):
        trusted, other = torch.rand(2, 40, 8, generator=seeded(seed), dtype=torch.float64)
        for name, chased in (("against", -trusted + other / 5), ("with", trusted + other / 5), ("apart", other)):
            words[name].append(reward.verdict_of(reward.gain(trusted, chased, 8))[1])
    assert set(words["against"]) == {"Can be hacked"} and set(words["with"]) == {"Pays"}
    assert words["apart"].count("Blind") >= 34  # 95% intervals: 2 of 40 on average


def test_a_reward_is_seen_beside_a_judge_on_a_models_own_images(tmp_path):
    def dark(images: Tensor, prompts: list[str]) -> Tensor:
        return -images.mean((1, 2, 3))

    def bright(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    settings = {"prompts": ["a red circle", "a blue cross"], "samples": 3, "steps": 2, "out": tmp_path / "run"}
    found = fs.diagnose("zoo:shapes-flux-small", "reward", reward=dark, beside=bright, **settings)
    numbers = found.numbers
    assert numbers["best of"] == [1, 2, 3] and numbers["nfe"] == 2 * 3 * 2
    assert numbers["reward"]["value"] == pytest.approx(-numbers["beside"]["value"], rel=1e-5)
    assert numbers["reward"]["value"] > 0
    assert "raises it by" in found.words and (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(InputError, match="stands beside itself; add --beside"):
        fs.diagnose("zoo:shapes-flux-small", "reward", reward="right")
    with pytest.raises(InputError, match="says the same of all 3 images"):
        fs.diagnose("zoo:shapes-flux-small", "reward", reward=lambda images, _: [1.0] * len(images), **settings | {
            "out": None})  # fmt: skip


# verdicts


def test_shares_become_verdicts_with_their_intervals():
    right = wilson(90, 100)
    assert concepts.verdict_of([], wilson(199, 200)) == (True, "Draws what is asked")
    assert concepts.verdict_of([], wilson(50, 100)) == (False, "Misreads prompts")
    assert concepts.verdict_of([], right) == (None, "Between the two")
    assert concepts.verdict_of([wilson(0, 200)], right) == (True, "Gone")
    assert concepts.verdict_of([wilson(0, 200), wilson(30, 100)], right) == (False, "Still there")
    assert concepts.verdict_of([wilson(0, 8)], right) == (None, "Not shown to be gone")
    one = Interval(1.0, math.nan, math.nan, 1, "%")
    assert concepts.verdict_of([], one)[0] is None
    assert smoothness.verdict_of(wilson(30, 100).to_json()) == (False, "Hallucinates")
    assert smoothness.verdict_of(wilson(0, 200).to_json()) == (True, "Keeps to its data")
    assert smoothness.verdict_of(one.to_json())[0] is smoothness.verdict_of(None)[0] is None


# all that a model allows


def test_a_model_is_diagnosed_with_what_it_allows_and_the_next_command_is_filled_in(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["diagnose", "zoo:shapes-flux", "--targets", "triangle", "--samples", "2", "--steps", "4"]
    assert main([*words, "--out", str(out)]) == 0
    numbers = json.loads((out / "metrics.json").read_text())
    (only,) = numbers["findings"]
    assert (only["kind"], only["tone"], only["word"]) == ("concepts", "bad", "Still there")
    erase = (
        "fieldsmith erase --model zoo:shapes-flux --targets triangle --anchors (circle|square|cross) --out runs/erase"
    )
    assert re.fullmatch(erase, only["command"])
    assert set(numbers["left out"]) == {*PARTS} - {"concepts"}
    assert "rectified flow" in numbers["left out"]["smoothness"] and "--reward" in numbers["left out"]["reward"]
    page = (out / "report.html").read_text()
    assert "Run next" in page and only["command"].replace("'", "&#39;") in page and "Left out" in page
    assert {"concepts", "report.html", "config.toml"} <= {file.name for file in out.iterdir()}
    assert (out / "concepts" / "report.html").is_file()
    said = " ".join(capsys.readouterr().err.split())
    assert "Run next: fieldsmith erase" in said
    assert main([*words, "--out", str(out)]) == 0 and "is complete" in " ".join(capsys.readouterr().err.split())
    again = json.loads((out / "metrics.json").read_text())
    assert again == numbers


def test_an_interrupted_overview_keeps_the_diagnoses_that_it_made(tmp_path, monkeypatch):
    settings = {"targets": "circle", "reward": "brightness", **SMALL, "out": tmp_path / "run"}
    made = run.one

    def breaks(kind, *given):
        if kind == "reward":
            raise KeyboardInterrupt
        return made(kind, *given)

    monkeypatch.setattr(run, "one", breaks)
    with pytest.raises(KeyboardInterrupt):
        fs.diagnose("zoo:shapes-flux-small", **settings)
    before = (tmp_path / "run" / "concepts" / "metrics.json").stat().st_mtime_ns
    monkeypatch.setattr(run, "one", made)
    found = fs.diagnose("zoo:shapes-flux-small", **settings)
    assert {one["kind"] for one in found.numbers["findings"]} == {"concepts", "reward"}
    assert (tmp_path / "run" / "concepts" / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "says"),
    (
        ([], "nothing named after `fieldsmith diagnose`; give a model, or one of guidance, smoothness"),
        (["concept"], "did you mean 'concepts'"),
        (["some-words"], "neither a model nor one of diagnose's kinds.*or name a model"),
        (["zoo:shapes-flux"], "no out folder given; add --out DIR, e.g. --out runs/diagnosis"),
        (["--out", "never"], "no model given"),
        (["zoo:shapes-flux", "--targets", "trangle", "--out", "never"], "trangle"),
        (["zoo:shapes-flux", "--samples", "1", "--out", "never"], "samples=1 must be at least 2"),
        (["zoo:columns-ddpm", "--reward", "brightness", "--out", "never"], "names no world with prompts of its own"),
    ),
)
def test_what_cannot_be_diagnosed_is_refused_in_a_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    assert re.search(says, said), said
    assert not any(tmp_path.iterdir())  # nothing is left on disk


def test_a_model_that_allows_no_diagnosis_is_told_why(capsys, flux_folder, tmp_path):
    assert main(["diagnose", str(flux_folder), "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing can be diagnosed of" in said and "concepts: " in said and "guidance: it needs --teacher" in said
    assert not any(tmp_path.iterdir())


def test_a_reward_is_asked_in_parts_that_say_what_the_whole_says():
    model = fs.load("zoo:shapes-flux-small")
    prompts = ["a red circle", "a blue cross", "a green star"]
    sizes = []

    def bright(images: Tensor, prompts: list[str]) -> Tensor:
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    found = []
    for model.chunk in (64, 4):
        settings = {"prompts": prompts, "samples": 2, "steps": 2, "reward": bright, "beside": "jpeg-size"}
        found.append(fs.diagnose(model, "reward", **settings).numbers["reward"]["value"])
    assert sizes == [6, 4, 2] and found[0] == pytest.approx(found[1], rel=1e-5)
