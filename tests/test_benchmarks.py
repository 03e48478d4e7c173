"""The benchmarks' own code on toy sizes: plain loops agree with ours, replays repeat a step's calls, the GPU script."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import against_plain, gpu, gpu_checks, gpu_models, judges, plain, startup, steps
from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith.errors import RunError
from fieldsmith.models.core import Model
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.unet import UNet
from fieldsmith.worlds.scenes import VOCABULARY

WORDS = ("a", "red", "blue", "square", "circle")
SMALL: dict[str, Any] = {"layers": 1, "single_layers": 1, "heads": 1}
EDITOR: dict[str, Any] = {"vae_channels": (8, 8, 8), "latent_channels": 4, "text_length": 10, "size": 24, **SMALL}
PROMPTS = ("a red circle", "a blue square")


def lively(pipeline: Any) -> Any:
    """Images that differ, so that rewards do: an untrained decoder's are grey."""
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.mul_(20)
    return pipeline


def flux() -> Model:
    return Flux(lively(flux_pipeline(WORDS, **SMALL)), "tiny")


def kontext() -> Model:
    return FluxKontext(lively(kontext_pipeline(VOCABULARY, **EDITOR)), "tiny")


def tiny_cases() -> dict[str, against_plain.Case]:
    align = functools.partial(against_plain.aligning, model=flux, prompts=PROMPTS, groups=2, rollouts=2, steps=4)
    cases = [
        against_plain.erasing(flux, "a red circle", "a blue square", batch=2, steps=4, window=(1, 2)),
        align(name="flow-GRPO"),
        align(name="flow-GRPO from step 1", fork=1),
        align(name="NFT"),
        against_plain.editing(kontext, 2, 2, turns=2, steps=3, updates=2),
        against_plain.distilling(
            lambda: UNet(unet_pipeline(class_rows=3), "tiny", classes=("cat", "dog")), 2.0, 3, block=2
        ),
    ]  # fmt: skip
    return {case.name: case for case in cases}


@pytest.mark.parametrize("name", ["GEM", "flow-GRPO", "flow-GRPO from step 1", "NFT", "MT-NFT", "DASH"])
def test_a_plain_loop_and_ours_learn_the_same(name: str) -> None:
    """Not at the first step alone: the second collection is made with weights that have moved."""
    case = tiny_cases()[name]
    pair = against_plain.in_turns(
        lambda after: case.ours(case.model(), 2, after), case.plain(case.model(), 2), case.block
    )
    ours, theirs = pair.losses
    assert len(ours) == 2 * case.block and len(pair.seconds[0]) == 1
    assert against_plain.apart(ours[0], theirs[0]) <= 1e-5
    assert max(map(against_plain.apart, ours, theirs)) <= 1e-3
    assert ours[0] != ours[-1]


@pytest.mark.parametrize("name", ["GEM", "flow-GRPO", "flow-GRPO from step 1", "NFT", "MT-NFT", "DASH"])
def test_rearrangements_change_no_loss(name: str) -> None:
    case = tiny_cases()[name]
    first = next(case.plain(case.model(), 1))
    for rearrangement in case.rearranged:
        without = next(case.plain(case.model(), 1, without=(rearrangement,)))
        assert against_plain.apart(without, first) <= 1e-5, rearrangement


def test_losses_that_differ_end_the_comparison() -> None:
    case = tiny_cases()["DASH"]

    def other(*given: Any, **options: Any) -> Iterator[float]:
        for loss in case.plain(*given, **options):
            yield loss * 1.0001

    against_plain.first_losses(case)
    with pytest.raises(RunError, match="DASH: the first loss is"):
        against_plain.first_losses(against_plain.Case("DASH", case.model, case.ours, other, 1, ()))


def test_a_second_copy_of_the_network_is_seen_in_its_peak() -> None:
    case = tiny_cases()["GEM"]
    once, twice = (
        against_plain.peak(case.model(), lambda model, skip=skip: list(case.plain(model, 1, without=skip)))
        for skip in ((), (against_plain.COPY,))
    )
    weights = sum(p.numel() * p.element_size() for p in case.model().network.parameters())
    assert twice - once == pytest.approx(weights, rel=0.1)


def test_plain_loops_know_nothing_of_fieldsmith() -> None:
    files = sorted(pathlib.Path(plain.__file__).parent.glob("*.py"))
    assert len(files) >= 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("fieldsmith", "experiments")) for name in names), file


def test_a_replay_makes_the_recorded_calls() -> None:
    calls = steps.recorded("distill", 2)
    assert [[call.gradient for call in step] for step in calls] == [[False, True]] * 2  # frozen teacher, then student
    assert len(list(steps.replayed(calls))) == 2
    assert all(p.grad is not None for p in calls[0][1].trained) and calls[0][1].trained


@pytest.mark.parametrize("make", [steps.large_flux, steps.large_kontext, lambda: [steps.large_unet()]])
def test_large_networks_have_about_50_million_parameters(make: Callable[[], list[Model]]) -> None:
    assert 4.5e7 < sum(p.numel() for p in make()[0].network.parameters()) < 6e7


def test_start_up_is_measured_in_a_process_of_its_own() -> None:
    found = startup.measure(rounds=1)
    assert min(found.importing, found.loading, found.networks) > 0
    assert found.networks < found.preparing


# the GPU script


def test_judges_are_asked_of_images_whose_truth_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """With a reader that knows one word: the half that has it is a hit, the other words' halves are none."""

    def only_open(images: torch.Tensor) -> list[list[tuple[str, float]]]:
        return [[("open", 0.9)] for _ in images]

    monkeypatch.setattr(judges.detect.ocr, "read", only_open)
    monkeypatch.setattr(judges.detect.ocr, "engine", lambda: None)
    *words, any_text = judges.reading(4)  # OPEN and Bakery are asked for where they stand, two others where they do not
    assert len(words) == 6 and all(one.hits and one.hits.value == 0.5 for one in words)
    assert all(one.false_alarms and one.false_alarms.value == 0 for one in words)
    assert any_text.hits is None and any_text.false_alarms and any_text.false_alarms.value == 1
    assert all(len(images) == 3 and images.amin() >= 0 for images in judges.clothed(3).values())
    monkeypatch.setattr(judges, "sampler", lambda model: lambda prompts, seed: torch.zeros(len(prompts), 3, 32, 32))
    monkeypatch.setattr(judges, "load", lambda name: None)
    assert all(one.hits is None and one.agrees.n == 23 for one in judges.functions(23))


def test_the_gpu_script_runs_without_one(tmp_path: pathlib.Path) -> None:
    found = gpu.main(["--tiny", "--parts", "flux", "sd3", "dit", "--out", str(tmp_path)])
    assert [row.run for row in found.rows] == ["erase", "align", "align", "erase", "erase", "erase", "distill"]
    assert all(row.seconds > 0 for row in found.rows) and found.rows[0].share
    assert found.left_out == [  # of what a CPU lacks, and nothing else
        "erase, cuDNN attention: there is no cuDNN", "erase, compiled blocks: compiling pays on GPUs alone",
    ]  # fmt: skip
    assert "| FLUX.1 |" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "found.json").read_text())["drawn"][0]["theirs"] > 0


def test_what_goes_wrong_in_a_part_is_written_down_and_the_rest_runs(tmp_path: pathlib.Path) -> None:
    session = gpu.Session(gpu_models.TINY, "cpu", tmp_path, 1)
    with session.part("one", 1):
        raise ValueError("no room")
    with session.part("two", 1) as enough:
        assert enough
    assert session.found.left_out == ["one failed: ValueError: no room"]
    assert "one failed" in (tmp_path / "README.md").read_text()


def test_a_gpu_has_nine_minutes(tmp_path: pathlib.Path) -> None:
    session = gpu.Session(gpu_models.TINY, "cpu", tmp_path, 100)
    session.device = "cuda"
    with session.part("long", 101) as enough:
        assert not enough
    assert "long: 0 of 100 seconds were gone" in session.found.left_out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's side is made in this process, which spares a start."""
    right = gpu_checks.outputs

    def child(task: str, folder: pathlib.Path, *launcher: str, **environment: str) -> str:
        assert environment == {"CUDA_VISIBLE_DEVICES": ""}
        with monkeypatch.context() as patch:
            patch.setattr(gpu_checks, "outputs", right)
            gpu_checks.TASKS[task](folder)
        return ""

    monkeypatch.setattr(gpu_checks, "_child", child)


def test_families_are_checked(here: None, tmp_path: pathlib.Path) -> None:
    exact, rounded = gpu_checks.families(tmp_path, ["unet"])
    assert exact.passed and exact.value == 0  # a CPU is itself
    assert rounded.passed and rounded.value  # and bf16 is not float32


def test_a_device_that_computes_something_else_is_found(
    here: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_checks.outputs

    def wrong(*given: Any) -> dict[str, torch.Tensor]:
        return {name: part * 1.01 for name, part in right(*given).items()}

    monkeypatch.setattr(gpu_checks, "outputs", wrong)
    assert not next(gpu_checks.families(tmp_path, ["unet"])).passed


def test_interrupted_runs_are_checked(tmp_path: pathlib.Path) -> None:
    assert [check.value for check in gpu_checks.resumes(tmp_path, ["sharpen"])] == [0.0]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["FLUX.1", "SD3.5-medium", "DiT-XL/2"])
def test_its_models_predict_decode_and_count(name: str) -> None:
    model = gpu_models.built(name, gpu_models.TINY, "cpu")
    x = model.noise(2, torch.Generator().manual_seed(0))
    pred = model.predict(x, torch.tensor(0.5), model.encode(["1", "2"]))
    assert pred.value.shape == x.shape and len(model.decode(x)) == 2
    model.unfreeze("all")
    work = gpu_models.operations(model)
    assert work.forward > 0 and 2.5 < work.trained / work.forward < 3.5  # a backward of all weights is two forwards


def test_without_a_gpu_full_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "add --tiny" in capsys.readouterr().err
