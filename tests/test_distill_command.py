"""`fieldsmith distill` as a user meets it: a run directory, a pipeline for diffusers, one sentence for bad input."""

from __future__ import annotations

import json
import pathlib
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fieldsmith as fs
from experiments.tiny import unet_pipeline
from fieldsmith.cli import main
from fieldsmith.commands.verbs import settings
from fieldsmith.errors import InputError
from fieldsmith.measure import sweep
from fieldsmith.measure.classifier import train_classifier
from fieldsmith.methods.distill import bank, teacher
from fieldsmith.methods.distill.config import PRESETS, DistillConfig
from fieldsmith.methods.distill.objectives import OBJECTIVES
from fieldsmith.models import load
from fieldsmith.models.shrink import shrink
from fieldsmith.models.unet import UNet

DIGITS = "zoo:digits-unet"
QUICK = ["--steps", "12", "--batch", "8", "--bank", "1", "--evaluate", "20", "--sampler-steps", "3", "--warmup", "2"]


def refused(capsys: pytest.CaptureFixture[str], *words: str, says: str) -> None:
    assert main(["distill", *words]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, text), text


@pytest.fixture(scope="module", autouse=True)
def hurry():
    """A judge of 30 steps, few states, small shards: what these tests look at does not depend on how good they are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bank, teacher):
            patch.setattr(module, "SHARD", 64)
        patch.setattr(
            sweep, "train_classifier", lambda images, labels, name, steps: train_classifier(images, labels, name, 30)
        )
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("distill") / "run"
    assert main(["distill", *QUICK, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_a_student_its_numbers_and_a_page(made):
    metrics = json.loads((made / "metrics.json").read_text())
    sizes = metrics["parameters"]
    assert sizes["teacher"] / sizes["student"] > 5.7
    assert set(metrics["curves"]["student"]) == {"1.0", "1.5", "2.0", "3.0"}
    assert metrics["nfe"] == 3 * 12 * 8 + metrics["teacher cost"] * metrics["teacher forwards"]
    assert {"noised data", "the teacher's guided path"} == set(metrics["guidance"])
    page = (made / "report.html").read_text()
    assert "5.9 times smaller" in page and "teacher" in page and "<svg" in page


def test_the_student_loads_in_plain_diffusers_and_draws_what_we_draw(made):
    pipe = diffusers.DDPMPipeline.from_pretrained(made / "model")
    student = load(made / "model")
    assert student.classes == tuple("0123456789") and student.null_class == 10
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5)
    ours = student.predict(x, t, student.encode(["3", ""])).eps
    theirs = pipe.unet(x, student.path.index(t), class_labels=torch.tensor([3, 10])).sample
    assert torch.equal(ours, theirs)


def test_a_run_repeats_from_its_own_config_to_the_last_bit(made, tmp_path):
    assert main(["distill", "--config", str(made / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    first, again = load_file(made / name), load_file(tmp_path / "again" / name)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_student_that_takes_the_scale_has_one_branch(tmp_path):
    out = tmp_path / "run"
    assert main(["distill", *QUICK, "--preset", "w-conditioned", "--bank", "0", "--out", str(out)]) == 0
    student = load(out / "model")
    assert student.scales == (1.0, 1.5, 2.0, 3.0, 4.0) and student.null_class is None
    assert set(json.loads((out / "metrics.json").read_text())["curves"]["student"]) == {
        "1.0",
        "1.5",
        "2.0",
        "3.0",
        "4.0",
    }


def test_folders_of_images_and_a_student_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "owl"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
                tmp_path / "data" / name / f"{i}.png"
            )
    UNet(unet_pipeline(size=8, widths=(16, 24), class_rows=3), "t", classes=("cat", "owl")).save(tmp_path / "teacher")
    (tmp_path / "student.json").write_text('{"block_out_channels": [8, 16]}')
    words = ["--teacher", str(tmp_path / "teacher"), "--scale", "laptop", "--data", str(tmp_path / "data")]
    assert (
        main(["distill", *QUICK, *words, "--student", str(tmp_path / "student.json"), "--out", str(tmp_path / "o")])
        == 0
    )
    assert load(tmp_path / "o" / "model").network.config.block_out_channels == [8, 16]


def test_pairs_and_a_student_in_python(tmp_path):
    """Images with classes in memory, a student of one's own, no folder: the result has both."""
    teacher = UNet(unet_pipeline(size=8, widths=(16, 24), class_rows=3), "t", classes=("cat", "owl"))
    student = shrink(teacher, 2.0)
    pairs = [(torch.rand(3, 8, 8), name) for name in ("owl", "cat") for _ in range(4)]
    small = {"scale": "laptop", "batch": 8, "bank": 64, "warmup": 1, "sampler_steps": 2}
    result = fs.distill(teacher, pairs, student, steps=2, evaluate=4, **small)
    assert result.model is student and result.config.data == "given:list" and result.out is None
    assert result.metrics["parameters"]["student"] < result.metrics["parameters"]["teacher"]
    assert [pair.label for pair in result.pairs] == ["cat", "owl"]
    result.save(tmp_path / "student", format="merged")
    assert load(tmp_path / "student").classes == ("cat", "owl")
    with pytest.raises(InputError, match="other classes than the model"):
        fs.distill(teacher, [(image, "dog" if name == "cat" else name) for image, name in pairs], 2.0, **small)


def test_every_objective_has_a_preset():
    recipes = [DistillConfig.preset_of(name, None, {}) for name in PRESETS]
    assert {recipe.objective for recipe in recipes} == set(OBJECTIVES)


def test_files_and_flags_come_after_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('objective = "gap"\nlr = 0.5\nlayout = "pairs"\n')
    config = settings("distill", ["--preset", "dash-released", "--config", str(file), "--lr", "0.25"])
    assert (config.objective, config.lr, config.curriculum) == ("gap", 0.25, "tirt")
    assert settings("distill", ["--teacher", "org/model"]).steps == 234_000


def test_what_is_measured_scales_with_the_run():
    sizes = {steps: settings("distill", ["--steps", str(steps)]).evaluate for steps in (3, 600, 1_500, 90_000)}
    assert sizes == {3: 20, 600: 120, 1_500: 300, 90_000: 300}
    assert settings("distill", []).evaluate == settings("distill", ["--preset", "dash", "--scale", "paper"]).evaluate
    assert settings("distill", ["--steps", "3", "--evaluate", "0"]).evaluate == 0
    assert settings("sharpen", ["--steps", "40"]).samples == 20 and settings("sharpen", []).samples == 200


def test_identifiability_is_told_without_a_run(capsys):
    assert main(["distill", "--identifiability", "--objective", "composite", "--composite-scales", "1", "4"]) == 0
    assert "131" in capsys.readouterr().out
    assert main(["distill", "--identifiability"]) == 0
    text = capsys.readouterr().out
    assert all(name[:10] in text for name in OBJECTIVES) and "inf" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--objective", "dsah"], "'dsah'.*did you mean 'dash'"),
        (["--preset", "dahs"], "'dahs'.*did you mean 'dash'"),
        (["--shrink", "0.5"], "shrink=0.5 must be above 1"),
        (["--null-share", "1.5"], "null_share=1.5"),
        (["--objective", "gap", "--layout", "split"], "'gap' needs both branches.*--layout pairs"),
        (["--objective", "fitnets", "--bank", "100"], "'fitnets'.*--bank 0"),
        (["--curriculum", "tirt", "--curriculum-from", "teacher"], "no curriculum.safetensors.*--curriculum-from fit"),
        (["--curriculum", "edm2", "--curriculum-from", "teacher"], "'edm2' is not stored"),
        (["--teacher", "zoo:digit-unet"], "not in the zoo; did you mean 'zoo:digits-unet'"),
        (["--data", "nowhere"], "'nowhere' is no folder"),
        (["--data", "shapes"], "shapes world"),
        (["--student", "nowhere.json"], "'nowhere.json' cannot be read"),
        (["--teacher", "zoo:shapes-flux", "--objective", "w-conditioned"], "guidance_scales"),
        (["--objective", "w-conditioned", "--anchor", "0.1"], "anchor=0.1.*one branch"),
        (["--sampler-steps", "2000"], "sampler_steps=2000"),
        (["--evaluate", "1"], "evaluate=1 is too few.*at least 2"),
        (["--times", "nan", "1"], "times=nan should be a finite"),
        (["--imitation", "0", "--unconditional", "0", "--anchor", "0"], "every weight.*is 0"),
        (["--stepz", "3"], "did you mean '--steps'"),
        (["--scale", "huge"], "'huge' is not in the vocabulary of distill's scales"),
        (["--ema", "1"], "ema=1"),
        (["--composite-scales"], "composite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(words, says, capsys, tmp_path):
    refused(capsys, *words, "--out", str(tmp_path / "out"), says=says)
    assert not (tmp_path / "out").exists()


def test_no_out_folder_a_bank_of_another_teacher_and_other_classes(capsys, tmp_path):
    refused(capsys, *QUICK, says="no out folder given")
    folder = tmp_path / "bank"
    words = [*QUICK, "--evaluate", "0", "--bank-folder", str(folder)]
    assert main(["distill", *words, "--out", str(tmp_path / "a")]) == 0
    assert "nothing was measured" in (tmp_path / "a" / "report.html").read_text()
    meta = json.loads((folder / "bank.json").read_text())
    (folder / "bank.json").write_text(json.dumps({**meta, "teacher": "0" * 16}))
    words += ["--out", str(tmp_path / "b")]
    refused(capsys, *words, says="was made with another teacher.*--bank-folder")
    assert not (tmp_path / "b").exists()
    UNet(unet_pipeline(size=8, channels=1, class_rows=3), "t", classes=("a", "b")).save(tmp_path / "odd")
    words = ["--teacher", str(tmp_path / "odd"), "--data", "digits", "--out", str(tmp_path / "c")]
    refused(capsys, *QUICK, *words, says="other classes than")
    UNet(unet_pipeline(size=8, channels=1, class_rows=10), "t", classes=tuple("0123456789")).save(tmp_path / "plain")
    words = ["--teacher", str(tmp_path / "plain"), "--data", "digits", "--out", str(tmp_path / "c")]
    refused(capsys, *QUICK, *words, says="needs a null class.*one embedding row more")


def test_the_scale_may_follow_tag_or_a_diagnosis(made, tmp_path, capsys):
    student = str(made / "model")
    words = [
        "sample",
        "--model",
        student,
        "--prompts",
        "3",
        "--each",
        "2",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main([*words, "--schedule", "tag"]) == 0
    bins = [{"t_high": 0.5, "recalibration": 0.2}, {"t_high": 1.0, "recalibration": 1.0}]
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"states": {"noised data": {}, "the teacher's guided path": {"bins": bins}}}))
    assert main([*words, "--schedule", str(file), "--guidance", "2"]) == 0
    assert main([*words, "--schedule", str(file)]) == 2
    assert "add --guidance" in capsys.readouterr().err
    assert main([*words, "--schedule", "nowhere.json"]) == 2
    assert "neither constant, tag nor" in capsys.readouterr().err
