"""experiments: the studies' and recipes' command line, and how a summary counts."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from experiments.__main__ import STUDIES
from experiments.__main__ import main as experiment
from experiments.distill.tables import Runs, cost_at_equal, shapley
from experiments.pretrain import RECIPES
from experiments.study import Claim, Records, Run, Stage, Study, StudyConfig, Tables, mean, run
from experiments.zoo import emoji_flux, scenes_kontext, scores
from fieldsmith.errors import InputError
from fieldsmith.methods.distill import curriculum
from fieldsmith.models import load
from fieldsmith.worlds import emoji
from fieldsmith.worlds.emoji_captions import parse
from fieldsmith.worlds.emoji_groups import UNSEEN
from fieldsmith.worlds.model_cards import world_of


@pytest.mark.parametrize("words", [[], *[[name, "--help"] for name in STUDIES],
                                   *[["pretrain", name, "--help"] for name in RECIPES]], ids=" ".join)  # fmt: skip
def test_help_is_success(capsys, words):
    try:
        assert experiment(words) == 0
    except SystemExit as end:  # tyro's own help
        assert not end.code
    assert "usage" in capsys.readouterr().out.lower() or not words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ease"], "'ease'.*did you mean 'erase'"),
        (["pretrain"], "no recipe named.*shapes-flux"),
        (["pretrain", "shapes-flix"], "'shapes-flix'.*did you mean 'shapes-flux'"),
        (["pretrain", "shapes-flux"], "no out folder given; add --out"),
        (["pretrain", "shapes-flux", "--steps", "0", "--out", "o"], "steps=0"),
        (["erase", "--images", "0"], "images=0"),
        (["distill", "--seeds", "0"], "at least 2 different seeds"),
        (["distill", "--worlds", "cats"], "'cats'.*digits, shapes"),
        (["distill", "--part", "2", "2"], "no share of the runs"),
        (["distill", "--steps", "0"], "steps=0"),
        (["edit", "--arms", "base", "nothing"], "'nothing'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert experiment(words) == 2
    assert re.search(says, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_may_leave_its_curriculum_to_its_students(tmp_path, capsys):
    small = ["--steps", "3", "--batch", "8", "--widths", "16", "24"]
    assert experiment(["pretrain", "digits-unet", *small, "--curriculum", "tirt", "--out", str(tmp_path / "t")]) == 0
    teacher = load(str(tmp_path / "t" / "model"))
    importance = curriculum.read(tmp_path / "t" / "model", "the teacher", teacher.path)
    assert bool((importance != 0).any())
    for flags, says in ((["--data", "cats"], "data=cats is unknown"), (["--widths", "10"], "multiples of 8"),
                        (["--label-dropout", "0"], "label_dropout=0")):  # fmt: skip
        assert experiment(["pretrain", "digits-unet", *flags, "--out", str(tmp_path / "x")]) == 2
        assert says in capsys.readouterr().err


def test_the_editors_recipe_writes_a_model_and_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_kontext.write_card, "__defaults__", (8,))  # sessions
    config = scenes_kontext.ScenesKontext(sessions=20, heads=1, vae_steps=2, steps=2)
    scenes_kontext.train(config, tmp_path, "small")
    assert load(str(tmp_path / "model")).family == "flux-kontext"
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    scores = card["held-out sessions of 3 turns, dependency 0.7, 8 steps"]
    assert card["world"] == "scenes" and [one["n"] for one in scores["overall"]] == [8, 8, 8]
    assert "zoo:small" in (tmp_path / "model" / "README.md").read_text()


def toy(done: list[str], folder: pathlib.Path, lr: float = 0.1) -> tuple[Study, StudyConfig]:
    """Two arms by two seeds after a sweep of one run; `done` grows by every run that is made."""

    def stages(config: StudyConfig) -> list[Stage]:
        def one(arm: str, seed: int) -> Run:
            name = f"{arm}_{seed}"

            def work() -> dict[str, Any]:
                done.append(name)
                return {"arm": arm, "seed": seed, "settings": {"lr": lr, "other": 1}, "value": seed + len(arm)}

            return Run(arm, config.out / "runs" / f"{name}.json", work, {"settings": {"lr": lr}})

        return [[[one("sweep", 9)]], [[one(arm, seed) for arm in ("a", "bb")] for seed in config.seeds]]

    def tables(config: StudyConfig, records: Records) -> Tables:
        values = [record["value"] for name, record in records.items() if name.startswith("bb")]
        claim = Claim("toy.value", "a value", mean(values), "", "not", 0)
        return Tables([claim], {"files": list(records)}, {"steps": [], "samplers": [], "began": [], "starts": []}, {})

    return Study("bench", "none", StudyConfig, stages, tables), StudyConfig(folder, seeds=(0, 1))


def test_a_study_is_shared_resumed_and_made_again_where_its_settings_changed(tmp_path, capsys):
    done: list[str] = []
    study, config = toy(done, tmp_path)
    run(study, replace(config, part=(0, 2)))
    assert done == ["sweep_9", "a_0", "bb_0"] and "2 runs are still missing" in capsys.readouterr().out
    run(study, replace(config, arms=("bb",), part=(1, 2)))
    assert done[3:] == ["bb_1"] and not (tmp_path / "summary.json").exists()
    run(study, replace(config, partial=True))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["files"] == ["sweep_9", "bb_0", "bb_1"]
    assert (summary["claims"][0]["value"], summary["claims"][0]["seeds"]) == (2.5, [0, 1])
    run(study, config)
    assert done[4:] == ["a_1"] and "toy.value" in (tmp_path / "README.md").read_text()
    run(study, config)
    assert len(done) == 5
    run(*toy(done, tmp_path, lr=0.2))
    assert len(done) == 10
    for wrong, says in (({"arms": ("c",)}, "arms of this study"), ({"seeds": (1, 1)}, "2 different seeds")):
        with pytest.raises(InputError, match=says):
            run(study, replace(config, **wrong))


def test_shares_and_costs_of_the_summary_are_what_they_say():
    values = {on: 10.0 - 6 * on[0] - 1 * on[1] - 3 * on[0] * on[2] for on in itertools.product((0, 1), repeat=3)}
    assert shapley(values) == pytest.approx([7.5, 1.0, 1.5])  # the last two share what only both together give
    runs = Runs({})

    def arm(name, *pairs):
        runs.arms["w", name] = [{"price": price, "quality": q} for price, q in pairs]

    arm("ours x 0.5", (100, 4.0), (100, 4.0))
    arm("ours", (400, 1.0), (400, 3.0))
    arm("rival", (1000, 2.5), (1000, 2.0))
    found, missed = cost_at_equal(runs, "w", "rival", lambda run: run["quality"])
    assert missed == 1  # seed 1 never gets there and counts with all it spent; seed 0 does half way in log-cost
    assert found.value == pytest.approx((0.2 * 0.4) ** 0.5)


def test_the_emoji_recipe_resumes_and_writes_a_model_that_its_world_judges(tmp_path, monkeypatch):
    scenes = [parse("a cat on blue"), parse("two dogs")]
    monkeypatch.setattr(emoji_flux, "kinds", lambda: {"two scenes": scenes})
    monkeypatch.setattr(emoji_flux, "CHUNK", 6)
    monkeypatch.setattr(emoji_flux, "STEPS", 2)
    config = emoji_flux.EmojiFlux(
        vae_steps=(2, 1), vae_batch=2, images=12, heads=1, layers=1, single_layers=1, steps=(2, 1), batch=4
    )
    model = emoji_flux.train(config, tmp_path, "emoji-flux")
    again = emoji_flux.train(config, tmp_path, "emoji-flux")  # nothing is left to do but to write
    latents = model.pipeline.vae.config
    assert (latents.scaling_factor, latents.shift_factor) == (
        again.pipeline.vae.config.scaling_factor, again.pipeline.vae.config.shift_factor,
    )  # fmt: skip
    assert len(json.loads((tmp_path / "pool" / "captions.json").read_text())) == 12
    folder = tmp_path / "model"
    assert world_of(str(folder)).name == "emoji" and (folder / "samples.png").stat().st_size > 0
    assert json.loads((folder / "card.json").read_text())["judged right, 2 steps"]["two scenes"]["n"] == 4
    small = replace(config, autoencoder=str(folder), seed=1)
    taken = emoji_flux.train(small, tmp_path / "small", "emoji-flux-small").pipeline.vae
    for mine, its in zip(
        taken.state_dict().values(), load(str(folder)).pipeline.vae.state_dict().values(), strict=True
    ):
        assert torch.equal(mine.float(), its)


def test_the_study_of_the_zoo_counts_by_kind_of_prompt(tmp_path, tiny_zoo, monkeypatch):
    monkeypatch.setattr(scores, "STEPS", 2)
    folder = str(tiny_zoo / "emoji-flux-small")
    words = ["zoo", "--models", folder, "--guidances", "1", "2", "--each", "1", "--seeds", "0", "1"]
    assert experiment([*words, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    claims = {claim["id"]: claim for claim in summary["claims"]}
    assert set(claims) == {f"zoo.{name}" for name in scores.AIMS}
    assert all(claim["value"] == 0 and claim["verdict"] == "not" for claim in claims.values())  # it draws noise
    runs = [json.loads(file.read_text()) for file in (tmp_path / "runs").iterdir()]
    assert len(runs) == 6 and {run["seed"] for run in runs} == {0, 1, 2}  # the last chooses the guidance
    assert set(runs[0]["kinds"]) == {*emoji.KINDS, UNSEEN, scores.PLACED}
    assert "guidance 2" in (tmp_path / "README.md").read_text()
    assert experiment(["zoo", "--models", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
