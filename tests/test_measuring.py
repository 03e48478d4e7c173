"""Erasures judged on a model without a world: what is asked, what is refused before training, and measuring again."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

import fieldsmith as fs
from experiments.tiny import flux_pipeline
from fieldsmith.cli import main
from fieldsmith.errors import InputError
from fieldsmith.measure import detect
from fieldsmith.measure.drawing import sampler
from fieldsmith.methods.erase import judged
from fieldsmith.methods.erase.config import KEPT, TEMPLATES, EraseConfig
from fieldsmith.methods.erase.judged import PARAPHRASES

pytestmark = pytest.mark.usefixtures("few_steps")
SENTENCES = (*TEMPLATES, *PARAPHRASES, *KEPT, "red blue circle square star")
VOCABULARY = tuple(sorted({word for sentence in SENTENCES for word in sentence.replace("{}", "").split()}))
QUICK: dict[str, Any] = {
    "targets": ["red circle"], "anchors": ["blue square"], "neighbours": ["red square", "blue circle"],
    "preset": "tiny", "steps": 3, "window": (0, 2), "batch": 1, "budget": 6, "evaluate": 2,
}  # fmt: skip
WORDS = [
    "erase", "--targets", "red circle", "--anchors", "blue square", "--preset", "tiny", "--steps", "3", "--window", "0",
    "2", "--batch", "1", "--budget", "3", "--evaluate", "1", "--neighbours", "red square",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random Flux that knows the words of all prompts, and no card. Read only."""
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    flux_pipeline(
        VOCABULARY, vae_channels=(8, 8, 8), layers=1, single_layers=1, heads=1, text_length=12
    ).save_pretrained(folder)
    return folder


def redness(images: torch.Tensor, concepts: list[str]) -> list[float]:
    """Something that differs between seeds; squares are told from circles by name."""
    return [float(image[0].mean()) + ("square" in name) for image, name in zip(images, concepts, strict=True)]


def test_an_erasure_is_judged_by_prompt_and_seed_and_its_cost_is_told_before(folder, capsys, monkeypatch):
    asked: list[int] = []

    def counted(images: torch.Tensor, concepts: list[str]) -> list[float]:
        asked.append(len(images))
        return redness(images, concepts)

    result = fs.erase(str(folder), judge=counted, **QUICK)
    said = " ".join(capsys.readouterr().err.split())
    before, after, parts = (result.metrics[name] for name in ("before", "after", "parts"))
    n = {name: one["n"] for name, one in after.items()}
    everyday = len([prompt for prompt in KEPT if prompt])
    assert n == {
        "target detected": 20, "target invalid": 20, "neighbours right": 2, "unrelated right": everyday,
        "paraphrases detected": 8, "anchor leak": 4,
    }  # fmt: skip
    images = 20 + 2 + everyday + 8 + 4
    assert f"to measure: {images} images before and as many after (evaluate=2) in 3 steps each" in said
    assert said.index("to measure") < said.index("2 steps in")
    assert sum(asked) <= 2 * (images + 20 + everyday) + 8  # nobody is asked about every concept in every image
    # by hand
    model = fs.load(folder)
    prompts = [template.replace("{}", "red circle") for template in TEMPLATES for _ in range(2)]
    images_before = sampler(model, 3, 1.0)(prompts, [k for _ in TEMPLATES for k in range(2)])
    shown = torch.tensor(redness(images_before, prompts)) >= 0.5
    assert before["target detected"]["value"] == pytest.approx(float(shown.float().mean()))
    by_prompt, by_seed = parts["red circle"]["prompt"], parts["red circle"]["seed"]
    assert list(by_prompt) == prompts[::2] and len(by_seed) == 2
    assert by_seed["image 2 of each prompt"]["before"]["value"] == pytest.approx(float(shown[1::2].float().mean()))
    assert by_prompt[prompts[4]]["before"]["value"] == pytest.approx(float(shown[4:6].float().mean()))
    assert result.metrics["judge"]["threshold"] == 0.5 and result.metrics["rest"]


def test_neighbours_come_from_the_list_of_the_target_and_kept_prompts_from_both():
    def config(**more: Any) -> EraseConfig:
        return EraseConfig(**{"targets": ("a church",), "anchors": ("a field",), **more})

    near = judged.neighbours_of(config())
    assert len(near) == 5 and near[0] == "tench" and "church" not in near  # every other one of nine
    assert len(judged.neighbours_of(config(neighbours=("unlearncanvas-objects",)))) == 7
    assert judged.neighbours_of(config(targets=("cat",)))[0] == "architectures"
    assert judged.kept_of(config(targets=("a dog",), neighbours=("a cat",)))[:2] == ("a cat", "")
    assert not [prompt for prompt in judged.kept_of(config(targets=("dogs",))) if "dog" in prompt]
    assert judged.neighbours_of(config(targets=("teapot",))) == ()


def test_what_a_judge_cannot_see_is_looked_at_and_not_counted():
    closed = detect.Detector("few", "two classes", 0.5, lambda images, names: torch.zeros(0), ("cat", "dog"),
                             find=lambda words: words if words in ("cat", "dog", "a dog") else None)  # fmt: skip
    config = EraseConfig(targets=("cat",), anchors=("dog",), neighbours=("dog", "horse"))
    groups = judged.judged(closed, config).groups["cat"]
    assert [one.concept for one in groups["neighbours"]] == ["dog"]
    assert "a photo of horse" in [one.words for one in groups["others"]] and len(groups["target"]) == len(TEMPLATES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"judge": "{mine}:closed"}, "'red circle' is not in the vocabulary of what judge '.*closed' sees"),
        ({"judge": "{mine}:same"}, "the judge says 0.3 of every image of 'red circle' and 'blue square'"),
        ({"judge": "{mine}:absent"}, "has no 'absent'"),
        ({"keep": ["a Red  circle"]}, "'a Red  circle' is in keep and among the targets"),
        ({"neighbours": ["red circle"]}, "'red circle' is in neighbours and among the targets"),
        ({"neighbours": ["star", "a star"]}, "'a star' stands twice in neighbours"),
        ({"neighbours": ["dragon"]}, "'dragon' is not in the vocabulary of"),
        ({"neighbours": ["{mine}.txt"]}, "concept list '.*' cannot be read"),
        ({"templates": ["a photo"]}, "template 'a photo' should have one {}"),
        ({"model": "zoo:shapes-flux", "judge": "{mine}:shows"}, "the world of 'zoo:shapes-flux' has judge of its own"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_trained(folder, tmp_path, change, sentence):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def shows(images, concepts):\n    return images.mean((1, 2, 3))\n\n\n"
        "def same(images, concepts):\n    return [0.3] * len(images)\n\n\n"
        "def closed(images, concepts):\n    return [0] * len(images)\n\n\nclosed.names = ('cat',)\n"
    )
    change = {
        name: [part.format(mine=mine) if "mine" in part else part for part in value]
        if isinstance(value, list)
        else value.format(mine=mine)
        for name, value in change.items()
    }
    with pytest.raises(InputError, match=sentence) as refused:
        fs.erase(**{"model": str(folder), "judge": f"{mine}:shows", **QUICK, **change}, out=tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


# measuring again


AWAY = """
import pathlib


def shows(images, concepts):
    if pathlib.Path({flag!r}).exists() and len(images) > 8:  # the preflight asks about 8
        raise OSError("server away")
    return images[:, 0].mean((1, 2))


def other(images, concepts):
    return 1 - images[:, 0].mean((1, 2))
"""


def test_a_judge_that_fails_after_training_costs_no_page_and_measure_completes_it(folder, tmp_path, capsys):
    mine, flag, out = tmp_path / "mine.py", tmp_path / "away", tmp_path / "run"
    mine.write_text(AWAY.format(flag=str(flag)))
    words = [*WORDS, "--model", str(folder), "--judge", f"{mine}:shows", "--out", str(out)]
    flag.touch()
    assert main(words) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "raised OSError: server away" in said and f"`fieldsmith measure {out}` completes" in said
    metrics, page = json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()
    assert "server away" in metrics["missing"] and metrics["steps"] == 1 and metrics["nfe"] > 0
    assert "Trained, but not measured" in page and "server away" in page and (out / "adapter").is_dir()
    weights = (out / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    log, config = (out / "metrics.jsonl").read_text(), (out / "config.toml").read_text()
    assert main(["measure", str(out)]) == 3  # still away
    flag.unlink()
    assert main(["measure", str(out)]) == 0
    first = json.loads((out / "metrics.json").read_text())
    assert "missing" not in first and first["nfe"] == metrics["nfe"] and first["seconds"] == metrics["seconds"]
    assert "Trained, but not measured" not in (out / "report.html").read_text()
    assert main(["measure", str(out), "--judge", f"{mine}:other", "--evaluate", "2"]) == 0
    second = json.loads((out / "metrics.json").read_text())
    assert second["measured with"] == {"judge": f"{mine}:other", "evaluate": 2}
    assert second["before"]["target detected"]["n"] == 20 and first["before"]["target detected"]["n"] == 10
    assert not (out / ".owner").exists()
    assert (out / "metrics.jsonl").read_text() == log and (out / "config.toml").read_text() == config
    assert (out / "adapter" / "pytorch_lora_weights.safetensors").read_bytes() == weights
    assert main(words) == 0 and "this run is complete" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("method", ["gem", "uce"])
def test_a_run_measured_again_has_the_numbers_that_it_had(folder, tmp_path, method):
    mine = tmp_path / "mine.py"
    mine.write_text(AWAY.format(flag=str(tmp_path / "never")))
    change = {"full": True} if method == "uce" else {}
    settings = {**QUICK, "evaluate": 1, "method": method, "judge": f"{mine}:shows?threshold=0.48", **change}
    result = fs.erase(str(folder), **settings, out=tmp_path / "run")
    again = fs.open_run(tmp_path / "run").measure()
    assert again.metrics == result.metrics
    assert all(torch.equal(a.after, b.after) for a, b in zip(again.pairs, result.pairs, strict=True))
    if method == "gem":
        assert any(not torch.equal(pair.before, pair.after) for pair in again.pairs)


def test_attacks_are_counted_by_the_judge_and_keep_to_their_budget(folder, tmp_path):
    mine, file, out = tmp_path / "mine.py", tmp_path / "mma.csv", tmp_path / "run"
    mine.write_text(AWAY.format(flag=str(tmp_path / "never")))
    file.write_text('target_prompt,adv_prompt,evaluation_seed\nred circle,"red square, circle",7\nred circle,star,\n')
    words = ["--judge", f"{mine}:shows?threshold=0.48", "--attacks", "--attack-steps", "2", "--attack-images", "3"]
    file.write_text(file.read_text().replace(", circle", " circle"))
    assert main([*WORDS, "--model", str(folder), *words, "--attack-prompts", str(file), "--out", str(out)]) == 0
    metrics, page = json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()
    found, budget = metrics["attacks"]["red circle"], metrics["attack budget"]
    assert budget["token"] == budget["embedding"] == budget["relearning"] == 2 and budget["relearned"] == 3
    assert found["learned token"]["n"] == 20 and found["prompt embedding"]["n"] == 16
    assert 0 <= found["relearning steps"] <= 2 and "1.25" in found["detected by adapter scale"]
    model = fs.load(folder)
    asked = ["red square circle", "star"]  # the second one's seed counts on from the run's
    shown = sampler(model, 3, 1.0)(asked, [7, 1])[:, 0].mean((1, 2)) >= 0.48
    assert found["2 prompts of mma.csv"]["n"] == 2
    assert f"(before: {100 * float(shown.float().mean()):.1f}%" in page
    assert "A learned word has 2 updates of 4 states on 16 images of it" in page
    with pytest.raises(InputError, match="attacks are counted by a judge, and nobody judges the images of"):
        fs.erase(str(folder), **QUICK, attacks=True)


def test_what_cannot_be_measured_again_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "run"
    fs.erase(str(folder), **QUICK | {"evaluate": 0, "budget": 3, "neighbours": ["star"]}, out=out)
    for words, sentence in (
        (["measure"], "no run given"), (["measure", str(out), "--lr", "1"], "lr is a setting of training"),
        (["measure", str(tmp_path / "absent")], "cannot be read"), (["measure", "--judge", "ocr"], "no run given"),
        (["measure", str(out), "--jugde", "x"], "did you mean '--judge'"),
    ):  # fmt: skip
        assert main(words) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(InputError, match="only a run that is opened"):
        fs.erase(str(folder), **QUICK | {"evaluate": 0, "budget": 3}).measure()
    (checkpoint,) = (out / "checkpoints").iterdir()
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    assert main(["measure", str(out), "--evaluate", "1"]) == 2
    assert "has no checkpoint any more" in capsys.readouterr().err


def test_a_run_of_another_verb_is_measured_with_other_rewards(folder, tmp_path):
    settings = {"preset": "nft", "epochs": 1, "rollouts": 2, "steps": 2, "prompts_per_epoch": 1, "evaluate": 2}
    prompts = ["a red circle", "a blue square"]
    fs.align(str(folder), reward="brightness", prompts=prompts, **settings, out=tmp_path / "run")
    again = fs.open_run(tmp_path / "run").measure(held_out_rewards=["darkness"])
    assert set(again.metrics["after"]) == {"brightness", "darkness"}
