"""`fieldsmith sharpen`, `diagnose smoothness` and ancestral `sample`, as a user meets them, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

import fieldsmith as fs
from experiments.tiny import unet_pipeline
from fieldsmith.cli import main
from fieldsmith.models import load
from fieldsmith.models.unet import UNet

SHORT = ["--steps", "2", "--batch", "4", "--samples", "8", "--sampler-steps", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained model of columns at 32 pixels, folded by 4, whose card names its world."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = unet_pipeline(size=8, channels=16, widths=(8, 16), attention=False, prediction_type="sample", clip=True)
    UNet(pipeline, "tiny", fold=4).save(folder)
    (folder / "card.json").write_text(json.dumps({"data": "columns"}))
    return str(folder)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_guide_is_trained_and_the_model_stays(model, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["sharpen", "--model", model, "--scale", "laptop", "--out", str(out), *SHORT]) == 0
    found = metrics_of(out)
    assert found["method"] == "guide" and found["before"]["images"] == found["after"]["images"] == 8
    assert found["nfe"] > 0 and found["before"]["hallucinated"]["value"] == 1.0  # it is untrained
    assert set(found["rest"]["before"]) == set(found["rest"]["after"])
    guide, whole = (sum(p.numel() for p in load(name).network.parameters()) for name in (out / "guide", model))
    assert guide < whole / 2
    html = (out / "report.html").read_text()
    assert "hallucinated" in html and "data:image/png" in html and "--worse" in html
    assert main(["sharpen", "--model", model, "--scale", "laptop", "--out", str(out), *SHORT]) == 0  # complete already
    assert "complete" in capsys.readouterr().err
    again = ["--config", str(out / "config.toml"), "--samples", "0"]  # what trains hangs on no measuring
    assert main(["sharpen", *again, "--out", str(tmp_path / "again")]) == 0
    name = "guide/unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    grid = tmp_path / "grid.png"
    steered = ["--worse", str(out / "guide"), "--guidance", "2", "--prompts", "", "--each", "2", "--steps", "2"]
    assert main(["sample", "--model", model, *steered, "--out", str(grid)]) == 0 and grid.stat().st_size > 100


def test_published_vsm_says_that_it_does_next_to_nothing(model, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["sharpen", "--model", model, "--scale", "laptop", "--preset", "vsm", "--out", str(out), *SHORT]
    assert main(words) == 2
    assert "--add-head" in capsys.readouterr().err and not out.exists()
    assert main([*words, "--add-head"]) == 0
    found = metrics_of(out)
    assert 0 < found["gradient share"] < 1e-4 and "next to nothing" in found["warnings"][0]
    assert load(out / "model").learns_variance
    out = tmp_path / "strong"
    assert main([*words[: -len(SHORT) - 1], str(out), *SHORT, "--add-head", "--strength", "1e9"]) == 0
    assert metrics_of(out)["gradient share"] > 1 and "dominates" in metrics_of(out)["warnings"][0]


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["--data", "cards"], "cards"),
        (["--data", "nowhere"], "nowhere"),
        (["--method", "sharper"], "sharper"),
        (["--samples", "1"], "samples=1"),
        (["--times", "0.5", "0.2"], "rising"),
        (["--sampler-steps", "0"], "sampler_steps=0"),
        (["--sampler-steps", "2000"], "sampler_steps=2000"),
        (["--train", "head", "--method", "plain"], "variance head"),
        (["--guidance", "0.5"], "guidance=0.5"),
        (["--extractor", "./nowhere"], "nowhere"),
        (["--judge", "math:sqrt"], "judge of its own"),
        (["--model", "zoo:shapes-flux", "--method", "variance-penalty"], "rectified flow"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(words, output, model, tmp_path, capsys):
    first = [] if "--model" in words else ["--model", model]
    data = [] if "--data" in words or "--model" not in words else ["--data", "columns"]
    assert main(["sharpen", *first, *data, *words, "--scale", "laptop", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert output in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_a_judge_that_throws_loses_nothing(model, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("L", (32, 32), 40 * i).save(tmp_path / "images" / f"{i}.png")
    judge = tmp_path / "checks.py"
    judge.write_text("def broken(images):\n    raise RuntimeError('no')\ndef bright(images):\n"
                     "    return [(bool(x.mean() > 0.5), 'dark') for x in images]\n")  # fmt: skip
    words = ["sharpen", "--model", model, "--scale", "laptop", "--data", str(tmp_path / "images"), *SHORT]
    assert main([*words, "--judge", f"{judge}:broken", "--out", str(tmp_path / "run")]) == 3
    assert "RuntimeError: no" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*words, "--judge", f"{judge}:bright", "--preset", "neighbours", "--bank", "4",
                 "--out", str(tmp_path / "run")]) == 0  # fmt: skip
    assert metrics_of(tmp_path / "run")["world"] == str(tmp_path / "images")


def test_images_and_a_judge_in_python(model):
    """Images in memory, a judge that is a function, and a run that writes nothing and leaves the model as it was."""
    network = load(model)
    before = {name: weight.clone() for name, weight in network.network.state_dict().items()}
    images = [torch.full((1, 32, 32), i / 8) for i in range(8)]
    settings = {"scale": "laptop", "steps": 2, "batch": 4, "sampler_steps": 3}
    result = fs.sharpen(network, images, lambda x: x.mean((1, 2, 3)) > 0.5, samples=4, **settings)
    assert result.out is None and result.config.data == "given:list" and result.metrics["before"]["images"] == 4
    assert len(result.pairs) == 1 and result.show() and "<img" in result._repr_html_()
    after = network.network.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    bare = fs.sharpen(network, samples=0, **settings)
    assert bare.metrics["steps"] == 2 and "after" not in bare.metrics and not bare.pairs


def test_diagnose_smoothness_profiles_paths_and_tries_detectors(model, tmp_path, capsys):
    words = ["diagnose", "smoothness", "--model", model, "--steps", "4", "--samples", "2"]
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 0
    found = metrics_of(out)
    moments = found["profile"]["moments"]
    assert [m["t"] for m in moments] == sorted((m["t"] for m in moments), reverse=True)
    assert all(m["norms"] == sorted(m["norms"]) and m["gap"] is not None for m in moments)
    assert found["hallucinated"]["n"] == 8 and "|Jn|" in (out / "report.html").read_text()
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "few")]) == 2
    assert main(["diagnose", "smoothness", "--model", "zoo:shapes-flux", "--out", str(tmp_path / "flow")]) == 2
    assert "rectified flow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["--variance", "learned"], "learns no variance"),
        (["--variance", "small", "--schedule", "tag"], "leave out"),
        (["--variance", "small", "--model", "zoo:shapes-flux"], "rectified flow"),
    ],
)
def test_ancestral_sampling_refuses_what_it_cannot_do(words, output, model, tmp_path, capsys):
    first = [] if "--model" in words else ["--model", model]
    assert main(["sample", *first, "--prompts", "", *words, "--out", str(tmp_path / "x.png")]) == 2
    assert output in capsys.readouterr().err
