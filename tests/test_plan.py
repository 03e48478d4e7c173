"""`fieldsmith plan`: memory against what runs have alive, costs as runs count them, and models of JSON alone."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from benchmarks import plan_error
from benchmarks.plan_error import Compared, Setting, compare
from fieldsmith import planning
from fieldsmith.cli import main
from fieldsmith.commands import plan
from fieldsmith.errors import InputError
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.distill import bank, teacher
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.models import folders, load
from fieldsmith.models.core import LoraSpec
from fieldsmith.models.estimate_memory import Component, Live, components, moments_of, size_of
from fieldsmith.models.meta_model import meta_model

PAIR = ["--targets", "red circle", "--anchors", "blue circle"]
ZOO = ("zoo:shapes-flux", "zoo:scenes-kontext", "zoo:digits-unet", "zoo:columns-ddpm")


# memory and costs, against runs


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return tmp_path_factory.mktemp("planned")


# the first is what the second is on a larger network
@pytest.mark.parametrize("setting", plan_error.SETTINGS[1:], ids=lambda setting: setting.name)
def test_a_plan_is_what_its_run_then_takes(setting, pipelines):
    found = compare(setting, pipelines)
    assert found.error < 0.05
    assert found.nfe[0] == pytest.approx(found.nfe[1], rel=1e-9) and found.reward_calls[0] == found.reward_calls[1]


def erase(**changes):
    return (
        "flux",
        "erase",
        plan_error.ERASE.replace(**{"batch": 2, "chunk": 6, "budget": 12, "dropout": 0.0, **changes}),
    )


def align(name, **changes):
    """A recipe on four sampler steps; branch schedules are cut to them."""
    given = AlignConfig.preset_of(name, None, {})
    short = {"steps": 4, "epochs": 2, "prompts_per_epoch": 1, "chunk": 8, "rank": 2, "prompts": ("red circle", "a")}
    cut = {"rollouts": min(2, given.rollouts), "branches": given.branches[:4]}
    return "flux", "align", given.replace(**cut | short | {"reward": "brightness"} | changes)


def edit(name, **changes):
    short = {"epochs": 2, "groups": 2, "rollouts": 2, "turns": 2, "steps": 3, "updates": 2, "rank": 2, "max_mean": 1.0}
    return "kontext", "edit", EditConfig.preset_of(name, None, {}).replace(**short | {"chunk": 8} | changes)


RUNS = {
    "guidance, retain": erase(rollout_guidance=3.0, loss_guidance=2.0, retain=1.0, keep=("blue square", "")),
    "concept-ablation": erase(method="concept-ablation", prior=0.5, budget=4),
    "eraseflow": erase(method="eraseflow"),
    "esd": erase(method="esd", budget=16),
    "eraseanything": erase(method="eraseanything", budget=6),
    "nft": align("nft", guidance=2.0),
    "rsm-branch-sd35": align("rsm-branch-sd35", rollouts=1, branches=(2, 3, 0, 0)),
    "sqdf": align("sqdf"),
    "adjoint-matching": align("adjoint-matching"),
    "residual-nabla-db-full": align("residual-nabla-db-full", steps=3),
    "draft": align("draft", truncate=2),
    "rsm-terminal-sd15": align("rsm-terminal-sd15", updates=3, train_steps=2),
    "mt-grpo": edit("mt-grpo", kl=0.1, window=(0, 1)),
    "budget": edit("mt-nft", budget=40),
    "bank": ("unet", "distill", plan_error.DISTILL.replace(bank=512, curriculum="edm2", steps=3)),
    "guided input": ("unet", "distill", plan_error.DISTILL.replace(objective="w-conditioned")),
    "guide": ("unet", "sharpen", plan_error.SHARPEN.replace(method="guide", guide_size=3.0)),
    "covariance": ("unet", "sharpen", plan_error.SHARPEN.replace(method="covariance", add_head=True)),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_spends_is_what_its_plan_says(name, pipelines, monkeypatch):
    monkeypatch.setattr(bank, "SHARD", 128)
    monkeypatch.setattr(teacher, "PROFILE", 128)
    found = compare(Setting(name, *RUNS[name]), pipelines)
    assert found.nfe[0] == pytest.approx(found.nfe[1], rel=1e-9) and found.reward_calls[0] == found.reward_calls[1]
    assert found.error < 0.1  # on networks this small a few states are a share


def test_the_worst_setting_is_the_error(monkeypatch):
    found = [Compared(planned, 100, (0, 0), (0, 0)) for planned in (110, 80, 100)]
    monkeypatch.setattr(plan_error, "compare", lambda setting, folder: found[setting])
    assert plan_error.plan_error((0, 1, 2)) == pytest.approx(0.2)


def test_live_bytes_are_those_of_storages():
    kept = torch.zeros(100)
    with Live() as live:
        live.hold([kept], "kept")
        a = torch.ones(1000)  # 4,000 bytes
        b = a.view(10, 100).t()  # the same storage
        c = b + 1  # 4,000 more
        assert sum(live.now.values()) == 8_400
        del a, c
        assert sum(live.now.values()) == 4_400  # b keeps a's
        del b
        assert live.now == {"kept": 400, "working memory": 0}
        live.spike(9_000)
    assert sum(live.peak.values()) == 9_400


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_blocks_are_tried_once_and_counted_all(checkpointing, pipelines, monkeypatch):
    """The mid-size network's six blocks, recalled and run."""
    place = pipelines / "flux-mid"
    if not place.exists():
        plan_error.PIPELINES["flux-mid"](place)
    config = plan_error.ERASE.replace(budget=12, checkpointing=checkpointing)
    peaks = []
    for least in (4, 100):
        monkeypatch.setattr("fieldsmith.models.rehearsal.BLOCKS", least)
        inputs = plan_error.INPUTS["erase"](config, planning.Judged())
        seen = planning.rehearse(planning.INPUTS["erase"][0], meta_model(place), config, inputs)
        peaks.append(sum(seen.memory.values()))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


@pytest.fixture(scope="module")
def small_folder(pipelines):
    if not (pipelines / "flux").exists():
        plan_error.PIPELINES["flux"](pipelines / "flux")
    return pipelines / "flux"


def test_memory_options_move_the_parts_that_they_are_for(small_folder):
    config = plan_error.ERASE.replace(model=str(small_folder), rank=64, budget=12)
    base, small = (
        planning.plan("erase", config.replace(**options))
        for options in ({}, {"dtype": "bf16", "offload": True, "checkpointing": True})
    )
    frozen, kept = "frozen weights: transformer", "activations for the backward pass"
    assert small.memory[frozen] * 2 == base.memory[frozen]
    assert "frozen weights: vae" in base.memory and not any("vae" in name or "text" in name for name in small.memory)
    assert small.memory.get(kept, 0) < 0.5 * base.memory[kept] and small.peak < base.peak
    assert base.trainable * 4 == base.memory["trainable weights"] == base.disk["adapter/"]


def test_moments_of_8_bits_are_a_quarter(small_folder):
    model = meta_model(small_folder).model
    model.adapt(LoraSpec("attention", 128))  # 32 x 128 numbers a matrix: none too small for 8 bits
    weights = list(model.trainable().values())
    large, small = (size_of(moments_of(weights, kind)) for kind in ("adamw", "adamw8bit"))
    assert large == 2 * size_of(weights) and small == pytest.approx(large / 4, rel=0.01)


# models of JSON alone


@pytest.mark.parametrize("name", ZOO)
def test_a_meta_model_is_the_model_without_its_weights(name):
    real, meta = load(name), meta_model(name)
    assert components(meta.model) == components(real) and meta.downloads == 0
    with meta.rehearsal.open():
        x = meta.model.noise(2, torch.Generator().manual_seed(0))
        shapes = {key: part.shape for key, part in real.encode([""]).parts.items()}
        assert {key: part.shape for key, part in meta.model.encode([""]).parts.items()} == shapes
        assert meta.model.decode(x).shape == real.decode(torch.zeros(x.shape)).shape


def test_twelve_billion_parameters_cost_nothing(tmp_path, flux_folder, monkeypatch):
    """FLUX.1's transformer, from the defaults that diffusers publishes it with."""
    folder = tmp_path / "whole"
    shutil.copytree(flux_folder, folder)
    (folder / "transformer/config.json").write_text(json.dumps({"guidance_embeds": True}))
    monkeypatch.setattr(folders, "_check_shapes", lambda folder, kind: None)  # the weights are the tiny one's
    config = plan_error.ERASE.replace(model=str(folder), budget=12, dtype="bf16", dropout=0.0)
    found = planning.plan("erase", config)
    transformer = found.components[0]
    assert transformer.parameters == 11_901_408_320 and transformer.bytes == 2 * transformer.parameters
    assert found.peak > transformer.bytes + found.memory["activations for the backward pass"] > transformer.bytes


@pytest.fixture
def hub(flux_folder, tmp_path, monkeypatch):
    """A hub that holds the tiny Flux, and what was asked of it."""
    import huggingface_hub

    from fieldsmith import models

    asked_for: list[str] = []

    def fetch(name, allow_patterns):
        asked_for.extend(allow_patterns)
        shutil.copytree(flux_folder, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(models, "offline_copy", lambda name: None)  # as where the hub answers
    monkeypatch.setattr(models, "_index", lambda name, _: json.loads((flux_folder / "model_index.json").read_text()))
    return asked_for


def test_of_a_hub_id_only_json_is_fetched(hub, flux_folder):
    meta, here = meta_model("org/name"), meta_model(flux_folder)
    assert hub and all(pattern.endswith(".json") for pattern in hub)
    assert components(meta.model) == components(here.model)
    assert meta.downloads == sum(part.parameters * 4 for part in components(meta.model))


# the command


def test_a_plan_as_json_and_as_tables(small_folder, capsys):
    words = ["plan", "erase", "--model", str(small_folder), *PAIR, "--preset", "tiny", "--budget", "24"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found["verb"] == "erase" and found["peak"] == sum(found["memory"].values())
    assert found["trainable"] * 4 == found["disk"]["adapter/"] and found["reward_calls"] == 0
    assert found["components"][0]["name"] == "transformer"
    capsys.readouterr()
    plan._print(planning.Plan(**{**found, "components": [Component(**part) for part in found["components"]]}))
    text = capsys.readouterr().out
    assert found["seconds"] > 0 and "ms each, measured here" in text.replace("\n", " ")
    assert "network evaluations" in text and "text_encoder_2" in text and f"{found['trainable']:,}" in text


def test_a_network_that_trains_beside_another_is_planned_too(capsys):
    assert main(["plan", "sharpen", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    whole, small = found["components"]
    assert small["name"] == "unet that trains" and found["trainable"] == small["parameters"] < whole["parameters"] / 3
    assert found["memory"]["frozen weights: the teacher's unet"] == whole["bytes"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no verb given after `fieldsmith plan`"),
        (["earse", *PAIR], "did you mean 'erase'"),
        (["erase"], "no target given"),
        (["erase", *PAIR, "--budgt", "3"], "did you mean '--budget'"),
        (["erase", *PAIR, "--model", "nowhere"], "the folder 'nowhere' does not exist; give"),
        (["erase", *PAIR, "--model", "zoo:shape-flux"], "is not in the zoo"),
        (["erase", *PAIR, "--model", "HALF"], "is not whole: 'vae' has no weights; download"),
        (["erase", *PAIR, "--model", "BROKEN"], "config 'BROKEN/vae/config.json' is not JSON"),
        (
            ["erase", "--targets", "1", "--anchors", "2", "--model", "zoo:digits-unet", "--preset", "tiny"],
            "'text-inputs' is unknown for family unet",
        ),
        (["erase", *PAIR, "--subset", "heads"], "'heads' is unknown"),
        (["erase", *PAIR, "--resolution", "33"], "resolution 33 is not a multiple"),
        (["erase", *PAIR, "--method", "uce"], "trains nothing, so there is nothing to plan"),
        (["erase", *PAIR, "--optimizer", "adamw8bit"], "pip install fieldsmith[8bit]"),
        (["edit", "--model", "zoo:shapes-flux"], "names no world of sessions"),
        (["align", "--model", "zoo:digits-unet", "--reward", "brightness"], "no prompts given"),
        (["sharpen", "--model", "zoo:shapes-flux", "--add-head"], "is on rectified flow"),
        (["sharpen", "--method", "plain", "--dtype", "bf16"], "trains full ones"),
        (["distill", "--shrink", "1e9"], "out of reach"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_bad_input_is_one_sentence(words, says, flux_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("HALF", "BROKEN"):
        if name in words:
            shutil.copytree(flux_folder, tmp_path / name)
    if "HALF" in words:
        (tmp_path / "HALF/vae/diffusion_pytorch_model.safetensors").unlink()
    if "BROKEN" in words:
        (tmp_path / "BROKEN/vae/config.json").write_text("{")
    assert main(["plan", *words]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("fieldsmith: ") and sentence.count("\n") == 1 and says in sentence, sentence


def test_a_hub_id_without_a_network_is_refused(monkeypatch):
    import diffusers
    import huggingface_hub

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: {"_class_name": "FluxPipeline"})

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("fieldsmith.models.offline_copy", lambda name: None)  # as where the hub answered just before
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="configs of 'org/name' could not be fetched from the hub"):
        meta_model("org/name")


def test_time_is_that_of_one_evaluation_that_is_measured_here(small_folder, flux_folder, tmp_path, monkeypatch):
    ticks = itertools.count(0, 2)  # each evaluation takes 2 seconds
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(ticks))
    config = plan_error.ERASE.replace(model=str(small_folder))
    assert planning.evaluation_seconds(str(small_folder), config, None, 4) == 2 / 4
    bare = tmp_path / "bare"
    shutil.copytree(flux_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert planning.evaluation_seconds(str(bare), config, None, 4) is None  # no weights
    monkeypatch.setattr(planning, "free_memory", lambda device: 1e3)
    assert planning.evaluation_seconds(str(small_folder), config, None, 4) is None  # no room
