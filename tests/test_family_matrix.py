"""The matrix of families and verbs: every cell is run on a tiny pipeline, and the page is what the command prints."""

from __future__ import annotations

import contextlib
import importlib
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from conftest import WORDS
from torch import Tensor

from experiments.tiny import dit_pipeline, flux_pipeline, kontext_pipeline, unet_pipeline
from experiments.tiny_edit import (
    flux2_dev_pipeline,
    flux2_klein_pipeline,
    qwen_image_edit_pipeline,
    qwen_image_pipeline,
    z_image_pipeline,
)
from experiments.tiny_text import chroma_pipeline, sd3_pipeline, sd15_pipeline, sdxl_pipeline
from fieldsmith.cli import main
from fieldsmith.commands import arguments
from fieldsmith.commands.families import markdown
from fieldsmith.errors import InputError
from fieldsmith.measure import attacks
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.sampling import Steered, draw
from fieldsmith.models import export, shrink
from fieldsmith.models.chroma import Chroma
from fieldsmith.models.core import Model
from fieldsmith.models.dit import DiT
from fieldsmith.models.families import FAMILIES, VERBS, Family, named, supports
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux2_dev import Flux2Dev
from fieldsmith.models.flux2_klein import Flux2Klein
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.qwen_image import QwenImage
from fieldsmith.models.qwen_image_edit import QwenImageEdit
from fieldsmith.models.sd3 import SD3
from fieldsmith.models.sd15 import SD15
from fieldsmith.models.sdxl import SDXL
from fieldsmith.models.text_layers import check_text_layers
from fieldsmith.models.unet import UNet
from fieldsmith.models.z_image import ZImage
from fieldsmith.paths import RectifiedFlow
from fieldsmith.rewards import Reward
from fieldsmith.worlds.scenes_judge import Channel
from tests.trained import align, distill, edit, erase, sharpen

SMALL: dict[str, Any] = {"vae_channels": (8, 8, 8), "latent_channels": 4}
NAMES = ("cat", "dog")
# a model of each family, as small as shrinking it leaves room for; a new family needs a line here
MAKERS: dict[str, Callable[[], Model]] = {
    "flux": lambda: Flux(flux_pipeline(WORDS, **SMALL), "tiny"),
    "flux-kontext": lambda: FluxKontext(kontext_pipeline(WORDS, size=24, **SMALL), "tiny"),
    "chroma": lambda: Chroma(chroma_pipeline(WORDS), "tiny", 16),
    "sd15": lambda: SD15(sd15_pipeline(WORDS), "tiny"),
    "sdxl": lambda: SDXL(sdxl_pipeline(WORDS), "tiny"),
    "sd3": lambda: SD3(sd3_pipeline(WORDS), "tiny"),
    "flux2-klein": lambda: Flux2Klein(flux2_klein_pipeline(WORDS), "tiny", 16),
    "flux2-dev": lambda: Flux2Dev(flux2_dev_pipeline(WORDS), "tiny", 16),
    "z-image": lambda: ZImage(z_image_pipeline(WORDS), "tiny"),
    "qwen-image": lambda: QwenImage(qwen_image_pipeline(WORDS), "tiny", 16),
    "qwen-image-edit": lambda: QwenImageEdit(qwen_image_edit_pipeline(WORDS), "tiny", 16),
    "dit": lambda: DiT(dit_pipeline(classes=2, labels=dict(enumerate(NAMES))), "tiny"),
    "unet": lambda: UNet(unet_pipeline(size=8, widths=(16, 24), class_rows=3), "tiny", classes=NAMES),
}
WAYS = ("LoRA", "full")
CELLS = [(family, verb, way) for family in FAMILIES for verb in VERBS for way in WAYS]


def prompts_of(family: Family) -> tuple[str, ...]:
    return ("red circle", "blue square") if "words" in family.condition else NAMES


def pictures(model: Model, n: int) -> Tensor:
    """Random images of the model's own size, (n, 3, h, w) in [0, 1]."""
    with torch.no_grad():
        shape = model.decode(model.noise(1, torch.Generator().manual_seed(0))).shape[1:]
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(3))


# each verb once, for two steps at most


def aligned(model: Model, family: Family, full: bool) -> None:
    config = AlignConfig(
        prompts=prompts_of(family), steps=3, epochs=2, updates=1, prompts_per_epoch=1, rollouts=2, rank=2, full=full,
        subset="attention", guidance=None,
    )  # fmt: skip
    align(model, config, Reward("brightness", False, lambda images, prompts: images.mean((1, 2, 3))))


def erased(model: Model, family: Family, full: bool) -> None:
    target, anchor = prompts_of(family)
    config = EraseConfig(
        targets=(target,), anchors=(anchor,), steps=4, window=(1, 2), budget=4, rollout_guidance=1.0, dropout=0.0,
        rank=2, full=full, subset="attention",
    )  # fmt: skip
    erase(model, config)


@dataclass(frozen=True)
class Turns:
    """Sessions of two turns from given images."""

    first: Tensor
    turns = 2

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: Any) -> Turns:
        return Turns(self.first[rows])

    def prompts(self, turn: int) -> list[str]:
        return ["a red circle"] * len(self)

    def clean(self, turn: int) -> Tensor:
        return self.first


@dataclass(frozen=True)
class Scored:
    following: Tensor
    consistency: Tensor


def judge(sessions: Any, turn: int, before: Tensor, after: Tensor, first: Tensor) -> Scored:
    return Scored(after.mean((1, 2, 3)), 1 - (after - first).abs().mean((1, 2, 3)))


def edited(model: Model, family: Family, full: bool) -> None:
    config = EditConfig(
        epochs=2, groups=1, rollouts=2, turns=2, steps=2, updates=1, rank=2, max_mean=1.0, full=full, renoise=1,
        identity_prompt="a red square",
    )  # fmt: skip
    images = pictures(model, 4)
    edit(model, config, EditInputs(lambda n, seed, turns: Turns(images[:n]), judge, Channel()))


def distilled(model: Model, family: Family, full: bool) -> None:
    config = DistillConfig(bank=0, steps=2, batch=4, warmup=1, shrink=2.0)
    if not full:  # no setting of a run asks for it
        arguments.parse(config, ["--rank", "4"], "distill")
    student = shrink.shrink(model, config.shrink)
    prompts = prompts_of(family)
    states = model.encode_images(pictures(model, 4))
    distill(model, student, Source(states, torch.tensor([0, 1, 0, 1]), prompts), config)


def sharpened(model: Model, family: Family, full: bool) -> None:
    config = SharpenConfig(method="plain", steps=2, batch=4, warmup=1, ema=0.5, share_every=1)
    if not full:
        arguments.parse(config, ["--rank", "4"], "sharpen")
    sharpen(model, model.encode_images(pictures(model, 8)), config)


RUNS = {"align": aligned, "edit": edited, "erase": erased, "distill": distilled, "sharpen": sharpened}


@pytest.mark.parametrize(("family", "verb", "way"), CELLS, ids=[f"{f.name}-{v}-{w}" for f, v, w in CELLS])
def test_every_cell_is_as_the_table_says(family: Family, verb: str, way: str) -> None:
    assert family.name in MAKERS, f"MAKERS has no tiny model of family {family.name}"
    model = MAKERS[family.name]()
    assert model.family == family.name
    if way in supports(family, verb).ways:
        RUNS[verb](model, family, way == "full")
    else:
        with pytest.raises(InputError) as refused:
            RUNS[verb](model, family, way == "full")
        if not supports(family, verb).ways and way == "full" and family.sources != "required":
            assert supports(family, verb).note in str(refused.value)  # in the table's own words


@cache
def tiny(name: str) -> Model:
    return MAKERS[name]()


OF_WORDS = tuple(family.name for family in FAMILIES if "words" in family.condition and family.sources != "required")


@pytest.mark.parametrize("name", OF_WORDS)
def test_a_model_of_words_has_a_guide_and_a_floor_under_its_jacobian(name: str) -> None:
    model = MAKERS[name]()
    states = model.encode_images(pictures(model, 8))
    config = SharpenConfig(method="guide", steps=1, batch=4, warmup=1, ema=0.5, share_every=1, guide_size=2.0)
    if named(name).shrinks:
        job, trained = sharpen(model, states, config)
        assert trained.steps == 1 and job.model is not model
        assert shrink.parameters(job.model.network) < shrink.parameters(model.network)
        drawn = draw(job.trained, 2, 2, 5)
        assert drawn.isfinite().all() and not torch.equal(drawn, draw(model, 2, 2, 5))
        assert torch.equal(draw(Steered(model, job.model, 1.0), 2, 2, 5), draw(model, 2, 2, 5))
    else:
        with pytest.raises(InputError, match="no smaller network"):
            sharpen(model, states, config)
    floor = config.replace(method="jacobian-floor", strength=0.01)
    job, trained = sharpen(model, states, floor)
    assert job.model is model and 0 < job.facts()["gradient share"] < math.inf


@pytest.mark.parametrize("name", OF_WORDS)
def test_a_learned_word_is_read_by_every_text_encoder(name: str) -> None:
    model = tiny(name)
    latents = model.encode_images(pictures(model, 2))

    def read(at: Tensor) -> Any:
        with torch.enable_grad():
            return model._encode([f"red {attacks.SPARE}"] * len(at))

    with torch.no_grad():
        before = model._encode([f"red {attacks.SPARE}"]).parts
    with attacks._frozen(model), attacks._spare_word(model) as embeddings:
        attacks._descend(model, latents, read, torch.Generator().manual_seed(1))
        encoders = [part for part in ("text_encoder", "text_encoder_2", "text_encoder_3") if part in
                    model.pipeline.components and model.pipeline.components[part] is not None]  # fmt: skip
        assert len(embeddings) == len(encoders) and all(one.grad is not None and one.grad.any() for one in embeddings)
        with torch.no_grad():
            for one in embeddings:
                one += 1
            moved = model._encode([f"red {attacks.SPARE}"]).parts
    with torch.no_grad():
        after = model._encode([f"red {attacks.SPARE}"]).parts
    assert not torch.equal(moved["embeds"], before["embeds"])
    assert all(torch.equal(after[part], before[part]) for part in before)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_traits_are_those_of_the_model(family: Family) -> None:
    model = tiny(family.name)
    module, _, kind = family.made_by.partition(":")
    assert type(model) is getattr(importlib.import_module(f"fieldsmith.models.{module}"), kind)
    assert isinstance(model.path, RectifiedFlow) == (family.path == "flow")
    assert hasattr(model, "with_images") == (family.sources != "none")
    assert hasattr(model.pipeline, "load_lora_weights") == family.adapters
    assert (model.family in shrink.FAMILIES) == family.shrinks
    assert set(family.exports) == (set(export.FORMATS[:2]) if model.ORIGINAL_NAMES else set())
    assert export.part_of(family.name) in model.pipeline.components
    for prompt in prompts_of(family):
        assert len(model.encode([prompt])) == 1
    for pipeline in family.pipelines:
        assert hasattr(getattr(diffusers, pipeline), "load_lora_weights") == family.adapters
    if family.sources == "required":
        with pytest.raises(InputError):
            model.predict(model.noise(1, torch.Generator()), torch.tensor(0.5), model.encode(prompts_of(family)[:1]))


def test_an_unconditional_unet_is_no_teacher() -> None:
    model = UNet(unet_pipeline(size=8, widths=(16, 24)), "tiny")
    source = Source(model.encode_images(pictures(model, 4)), torch.zeros(4, dtype=torch.long), ("",))
    config = DistillConfig(bank=0, steps=2, batch=4, warmup=1, shrink=2.0)
    with pytest.raises(InputError, match="branches are one"):
        distill(model, shrink.shrink(model, 2.0), source, config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_where_words_enter_is_what_the_methods_find(family: Family) -> None:
    model = tiny(family.name)
    found = []
    for method in ("uce", "eraseanything"):
        with contextlib.suppress(InputError):
            check_text_layers(model, method, attention=method == "eraseanything")
            found.append(method)
    methods = {"nowhere": [], "inputs": ["uce"], "attention": ["uce", "eraseanything"]}
    assert found == methods[family.words_enter]


def test_a_family_that_needs_sources_never_draws_alone() -> None:
    family = Family("x", (), "x:X", sources="required")
    assert supports(family, "edit").ways == WAYS
    for verb in ("align", "erase", "distill", "sharpen"):
        found = supports(family, verb)
        assert not found.ways and "never draws from words alone" in found.note


def test_unknown_words_are_refused() -> None:
    assert named("dit").name == "dit"
    with pytest.raises(InputError, match="did you mean 'flux'"):
        named("flx")
    with pytest.raises(InputError, match="did you mean 'erase'"):
        supports(named("flux"), "eras")


# the command


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", "--markdown"]) == 0
    page = pathlib.Path(__file__).parent.parent / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == capsys.readouterr().out == markdown() + "\n"
    assert all(f"| {family.name} |" in markdown() for family in FAMILIES)


def test_the_command_prints_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    text = capsys.readouterr().out
    assert all(f"│ {family.name} " in text for family in FAMILIES) and "LoRA, full" in text


def test_the_command_does_not_import_torch() -> None:
    script = "import sys; from fieldsmith.cli import main; main(['families']); "
    script += "print({'torch', 'diffusers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip().endswith("set()"), output.stdout
