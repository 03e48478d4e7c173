"""One run goes on from another: a Result or a run directory given as the model is its base with its adapters."""

from __future__ import annotations

import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fieldsmith as fs
from fieldsmith.cli import main
from fieldsmith.errors import InputError
from fieldsmith.run import base_of

TINY = {
    "preset": "tiny",
    "budget": 12,
    "batch": 1,
    "steps": 6,
    "window": (1, 3),
    "evaluate": 0,
    "subset": "text-inputs",
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> fs.Result:
    """A short erasure of the zoo's small model. Read only."""
    out = tmp_path_factory.mktemp("first") / "run"
    return fs.erase("zoo:shapes-flux-small", "triangle", "circle", **TINY, out=out)


def adapter_of(run: pathlib.Path) -> dict[str, list[float]]:
    """Its weights; the header of the file has a set of layers, in any order."""
    stored = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    return {name: part.flatten().tolist() for name, part in stored.items()}


def test_a_result_given_as_the_model_is_its_base_with_its_adapter(first, tmp_path):
    second = fs.erase(first, "star", "square", **TINY, out=tmp_path / "second")
    assert second.config.model == "zoo:shapes-flux-small"
    assert second.config.adapter == (str(first.out / "adapter"),)
    fs.erase(str(first.out), "star", "square", **TINY, out=tmp_path / "by-name")
    assert adapter_of(tmp_path / "second") == adapter_of(tmp_path / "by-name")
    alone = fs.erase("zoo:shapes-flux-small", "star", "square", **TINY, out=tmp_path / "alone")
    assert adapter_of(tmp_path / "second") != adapter_of(tmp_path / "alone")
    third = fs.open_run(tmp_path / "second")  # both erasures are in what it loads
    images = [fs.sample(model, "a red star", n=1, steps=2)[0].tobytes() for model in (third.model, second.model)]
    assert images[0] == images[1] != fs.sample(alone.model, "a red star", n=1, steps=2)[0].tobytes()
    assert base_of(str(tmp_path / "second")).adapter == (
        str(first.out / "adapter"),
        str(tmp_path / "second" / "adapter"),
    )


def test_a_protected_runs_targets_are_kept_and_only_a_part_of_the_model_is_protected(first, tmp_path):
    held = {**TINY, "retain": 1.0, "protect": str(first.out)}
    second = fs.erase(first, "star", "square", **held, out=tmp_path / "second")
    assert second.config.keep == ("triangle",)
    both = fs.erase(first, "star", "square", **held, keep=("a ring", "triangle"))
    assert both.config.keep == ("a ring", "triangle")
    plain = fs.erase(first, "star", "square", **TINY, out=tmp_path / "plain")
    triangle = {}  # how far the field under the protected prompt has moved from what the first run made of it
    for name, result in (("held", second), ("plain", plain)):
        model = result.model
        x = model.noise(2, torch.Generator().manual_seed(0))
        t, condition = torch.full((2,), 0.9), model.encode(["triangle"] * 2)
        with torch.no_grad(), model.reference():
            before = model.predict(x, t, condition, None).value
        with torch.no_grad():
            triangle[name] = float((model.predict(x, t, condition, None).value - before).square().mean())
    assert 0 < triangle["held"] < triangle["plain"]
    for given, says in (
        ({"retain": 0.0}, "protect holds prompts by retain"),
        ({"model": "zoo:shapes-flux-small"}, "is no part of the model"),
        ({"targets": "triangle"}, "'triangle' is in keep and among the targets"),
        ({"protect": str(tmp_path)}, "is no run directory"),
    ):
        words = {"model": first, "targets": "star", "anchors": "square", **held, **given}
        with pytest.raises(InputError, match=says):
            fs.erase(**words)


def test_a_run_directory_is_a_model_wherever_one_is_named(first, tmp_path, capsys):
    loaded = fs.load(first.out)
    state = loaded.noise(1, torch.Generator().manual_seed(0))
    t = torch.tensor([0.5])
    with torch.no_grad():
        after, before = (
            model.predict(state, t, model.encode(["a red triangle"])).velocity
            for model in (loaded, fs.load("zoo:shapes-flux-small"))
        )
        trained = first.model.predict(state, t, first.model.encode(["a red triangle"])).velocity
    assert torch.allclose(after, trained, atol=1e-5) and not torch.allclose(after, before, atol=1e-4)
    words = ["--prompts", "a red triangle", "--steps", "2", "--each", "1"]
    assert main(["sample", "--model", str(first.out), *words, "--out", str(tmp_path / "run.png")]) == 0
    named = ["--model", "zoo:shapes-flux-small", "--adapter", str(first.out / "adapter")]
    assert main(["sample", *named, *words, "--out", str(tmp_path / "adapter.png")]) == 0
    assert (tmp_path / "run.png").read_bytes()[-2000:] == (tmp_path / "adapter.png").read_bytes()[-2000:]
    erase = ["erase", "--model", str(first.out), "--targets", "star", "--anchors", "circle", "--preset", "tiny"]
    more = ["--budget", "12", "--batch", "1", "--steps", "6", "--window", "1", "3", "--evaluate", "0"]
    assert main([*erase, *more, "--out", str(tmp_path / "next")]) == 0
    assert fs.open_run(tmp_path / "next").config["adapter"] == [str(first.out / "adapter")]
    found = fs.diagnose(first, "concepts", each=1, steps=1)
    assert found.numbers["right"]


def test_what_nothing_can_go_on_from_is_refused(first, tmp_path, capsys):
    unwritten = fs.Result("erase", None, {}, ())
    with pytest.raises(InputError, match=r"was not written.*give its run an out folder"):
        fs.erase(unwritten, "star", "square")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(first.out, unfinished)
    (unfinished / "metrics.json").unlink()
    refused(capsys, unfinished, "is not finished, so it is no model yet")
    shutil.copy(pathlib.Path(first.out) / "metrics.json", unfinished)
    shutil.rmtree(unfinished / "adapter")
    refused(capsys, unfinished, "left no weights")


def refused(capsys: pytest.CaptureFixture[str], run: pathlib.Path, says: str) -> None:
    words = ["erase", "--model", str(run), "--targets", "star", "--anchors", "circle", "--out", "never"]
    assert main(words) == 2
    assert says in capsys.readouterr().err
