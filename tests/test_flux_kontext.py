"""FluxKontext against diffusers' own pipeline: source images, both guidances, adapters, gradients, wrong sizes."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from conftest import WORDS
from diffusers import FluxKontextPipeline
from torch import Tensor

from experiments.tiny import flux_pipeline, kontext_pipeline
from fieldsmith.errors import InputError
from fieldsmith.models import load
from fieldsmith.models.core import Condition, LoraSpec, stack
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.samplers import rollout
from tests.drawn import seeded

PROMPTS = ["a red square", "a blue circle", ""]


def pictures(n: int, height: int, width: int | None = None) -> Tensor:
    """Random images (n, 3, height, width) in [0, 1]."""
    return torch.rand(n, 3, height, width or height, generator=seeded(5))


def loaded(folder: pathlib.Path, **options: Any) -> FluxKontext:
    """A tiny random pipeline, saved into `folder` and loaded back."""
    pipe: Any = kontext_pipeline(WORDS, **options)
    pipe.save_pretrained(folder)
    model = load(folder)
    assert isinstance(model, FluxKontext)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random FluxKontextPipeline for 24-pixel images, saved, its latents scaled and shifted. Read only."""
    folder = tmp_path_factory.mktemp("kontext")
    pipe: Any = kontext_pipeline(WORDS, size=24)
    pipe.vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: pathlib.Path) -> FluxKontext:
    model = load(folder)
    assert isinstance(model, FluxKontext)
    return model


@torch.no_grad()
def ours(model: Flux, condition: Condition, guidance: float | None = None, n: int | None = None) -> Tensor:
    """Images (n, 3, height, width) after four steps."""
    start = model.noise(n or len(condition), seeded())
    path = rollout(lambda x, t: model.predict(x, t, condition, guidance), start, model.grid(4))
    return model.decode(path.last)


def theirs(model: Flux, prompts: list[str], images: Tensor | None, pipe: Any = None, **options: Any) -> Tensor:
    """The images (len(prompts), 3, height, width) of the diffusers pipeline itself."""
    pipe, size = pipe or model.pipeline, model.resolution
    pipe.set_progress_bar_config(disable=True)
    output: Tensor = pipe(
        image=images, prompt=prompts, height=size, width=size, num_inference_steps=4, generator=seeded(),
        _auto_resize=False, max_area=size * size, output_type="pt", max_sequence_length=8, **options,
    ).images  # fmt: skip
    return output


def same(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def velocity(model: Flux, condition: Condition) -> Tensor:
    """The field (2, tokens, channels) at fixed states; the same for the same weights."""
    with torch.no_grad():
        return model.predict(model.noise(2, seeded(3)), torch.tensor([0.3, 0.8]), condition).velocity


# parity with diffusers


@pytest.mark.parametrize("size", [24, 32])
def test_sampler_is_the_pipelines(tmp_path: pathlib.Path, size: int) -> None:
    model = loaded(tmp_path, size=size)
    assert model.latent_shape == ((size // 8) ** 2, 32)
    for n in (1, 3):  # the pipeline takes a batch of images beside a batch of prompts
        images = pictures(n, size)
        condition = model.with_images(model.encode(PROMPTS[:n]), images)
        assert condition.parts["source"].shape == (n, (size // 8) ** 2, 32)
        same(ours(model, condition), theirs(model, PROMPTS[:n], images))
        assert (ours(model, condition) - ours(model, model.encode(PROMPTS[:n]))).abs().max() > 1e-3  # it sees them


def test_scaled_latents_are_the_pipelines(model: FluxKontext) -> None:
    images = pictures(2, 24)
    condition = model.with_images(model.encode(PROMPTS[:2]), images)
    same(ours(model, condition), theirs(model, PROMPTS[:2], images))
    _, source, _, ids = model.pipeline.prepare_latents(images * 2 - 1, 2, 8, 24, 24, torch.float32, model.device)
    same(condition.parts["source"], source)
    assert torch.equal(condition.parts["source_ids"], ids.expand(2, -1, -1))


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (40, 16)])
def test_sources_of_other_sizes_are_the_pipelines(model: FluxKontext, size: tuple[int, int]) -> None:
    images = pictures(1, *size)
    same(ours(model, model.with_images(model.encode(PROMPTS[:1]), images)), theirs(model, PROMPTS[:1], images))


def test_without_a_source_it_is_flux(model: FluxKontext, tmp_path: pathlib.Path) -> None:
    condition = model.encode(PROMPTS)
    same(ours(model, condition), theirs(model, PROMPTS, None))
    flux = Flux(flux_pipeline(WORDS), "tiny")
    twin = loaded(tmp_path)
    for guidance in (None, 3.0):  # equal seeds are equal weights in both of the tiny pipelines
        assert torch.equal(ours(twin, twin.encode(PROMPTS), guidance), ours(flux, flux.encode(PROMPTS), guidance))


def test_true_guidance_is_the_pipelines(model: FluxKontext) -> None:
    images = pictures(3, 24)
    condition = model.with_images(model.encode(PROMPTS), images)
    with model.count_nfe() as nfe:
        guided = ours(model, condition, guidance=3.0)
    assert nfe.total == 3 * 4 * 2  # a state counts 1, whatever its tokens
    same(guided, theirs(model, PROMPTS, images, true_cfg_scale=3.0, negative_prompt=[""] * 3))
    assert (guided - ours(model, condition)).abs().max() > 1e-3


def test_embedded_guidance_is_the_pipelines(tmp_path: pathlib.Path) -> None:
    model = loaded(tmp_path, size=24, guidance_embeds=True)
    images = pictures(3, 24)
    condition = model.with_images(model.encode(PROMPTS), images)
    same(ours(model, condition, guidance=3.5), theirs(model, PROMPTS, images, guidance_scale=3.5))
    assert (ours(model, condition, guidance=3.5) - ours(model, condition)).abs().max() > 1e-5


# conditions


def test_one_prompt_or_one_image_serves_all(model: FluxKontext) -> None:
    images, prompts = pictures(3, 24), model.encode(PROMPTS)
    one_prompt, one_image = model.with_images(prompts[:1], images), model.with_images(prompts, images[:1])
    assert len(one_prompt) == len(one_image) == 3
    same(ours(model, one_prompt), theirs(model, PROMPTS[:1] * 3, images))
    same(ours(model, one_image), theirs(model, PROMPTS, images[:1].repeat(3, 1, 1, 1)))
    single = model.with_images(prompts[:1], images[:1])
    assert torch.equal(ours(model, single, n=2), ours(model, stack([single, single])))
    again = model.with_images(one_image, images)  # a new turn takes the old source's place
    assert torch.equal(again.parts["source"], one_prompt.parts["source"])
    stored = model.with_latents(prompts, model.encode_images(images))
    assert torch.equal(ours(model, stored), ours(model, again))


def test_wrong_images_are_refused(model: FluxKontext) -> None:
    condition = model.encode(PROMPTS)
    for size in ((20, 24), (24, 20), (25, 25), (0, 24)):
        with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels .* multiples of 8"):
            model.with_images(condition, torch.zeros(3, 3, *size))
    for shape in ((3, 24, 24), (3, 1, 24, 24), (0, 3, 24, 24)):
        with pytest.raises(InputError, match="give \\(n, 3, height, width\\)"):
            model.with_images(condition, torch.zeros(shape))
    with pytest.raises(InputError, match="2 source images do not go with 3 prompts"):
        model.with_images(condition, pictures(2, 24))
    one = condition[:1]  # 16 tokens both, in other places
    with pytest.raises(InputError, match=r"16 x 32 .* 9 x 32"):
        model.with_latents(one, torch.zeros(1, 16, 32))
    both = stack([model.with_images(one, pictures(1, 32)), model.with_images(one, pictures(1, 16, 64))])
    with pytest.raises(InputError, match="cannot share a batch"):
        velocity(model, both)


def test_components_that_the_index_leaves_empty(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["image_encoder"] == index["feature_extractor"] == [None, None]
    without = {name: part for name, part in index.items() if name not in ("image_encoder", "feature_extractor")}
    for part in folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text(json.dumps(without))
    assert isinstance(load(tmp_path), FluxKontext)


# gradients and adapters


def test_gradient_through_predict_is_the_networks(model: FluxKontext) -> None:
    x, t = model.noise(2, seeded()), torch.tensor([0.2, 0.9])
    condition = model.with_images(model.encode(PROMPTS[:2]), pictures(2, 24))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    with model.count_nfe() as nfe:
        model.predict(one, t, condition).velocity.square().sum().backward()
    assert nfe.total == 2 * 3
    _, source, ids, source_ids = model.pipeline.prepare_latents(
        pictures(2, 24) * 2 - 1, 2, 8, 24, 24, torch.float32, model.device, latents=x
    )
    output = model.network(
        hidden_states=torch.cat((two, source), dim=1), timestep=t, pooled_projections=condition.parts["pooled"],
        encoder_hidden_states=condition.parts["embeds"], txt_ids=torch.zeros(8, 3),
        img_ids=torch.cat((ids, source_ids)),
    ).sample[:, :9]  # fmt: skip
    output.square().sum().backward()
    assert one.grad is not None and two.grad is not None
    torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-6)


def test_gradient_reaches_the_images_where_it_is_asked_for(model: FluxKontext) -> None:
    images = pictures(2, 24).requires_grad_()
    condition = model.encode(PROMPTS[:2])
    assert not model.with_images(condition, images).parts["source"].requires_grad
    seen = model.with_images(condition, images, grad=True)
    model.predict(model.noise(2, seeded()), torch.tensor(0.5), seen).velocity.square().sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_adapter_goes_to_diffusers_and_off(folder: pathlib.Path, model: FluxKontext, tmp_path: pathlib.Path) -> None:
    images = pictures(3, 24)
    condition = model.with_images(model.encode(PROMPTS), images)
    base = ours(model, condition)
    model.adapt(LoraSpec(rank=4, alpha=8.0))
    assert torch.equal(ours(model, condition), base)  # a fresh adapter is zero
    generator = seeded(7)
    with torch.no_grad():
        for name, p in model.trainable().items():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    expected = ours(model, condition)
    assert (expected - base).abs().max() > 1e-3
    model.save(tmp_path)
    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path)
    same(theirs(model, PROMPTS, images, pipe), expected)
    model.scale_adapter(0.0)
    assert torch.equal(ours(model, condition), base)
    model.scale_adapter(1.0)
    with model.reference():
        assert torch.equal(ours(model, condition), base)
    model.remove_training()
    assert torch.equal(ours(model, condition), base)
