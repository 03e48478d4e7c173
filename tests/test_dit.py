"""DiT against diffusers' own pipeline, its labels and null class, saving; and clipped, scheduled sampling."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline
from torch import Tensor

from experiments.tiny import dit_pipeline, flux_pipeline, unet_pipeline
from fieldsmith.errors import InputError
from fieldsmith.measure.drawing import sampler
from fieldsmith.models import load
from fieldsmith.models.branches import branches
from fieldsmith.models.core import LoraSpec, Model
from fieldsmith.models.dit import DiT
from fieldsmith.models.flux import Flux
from fieldsmith.models.unet import UNet
from fieldsmith.samplers import ddim_step, euler, rollout
from tests.drawn import seeded

LABELS = {0: "tench, Tinca tinca", 1: "cock", 2: "hen"}


def tiny_dit(**options: Any) -> DiT:
    return DiT(dit_pipeline(**options), "tiny")


def theirs(pipe: DiTPipeline, rows: list[int], steps: int, guidance: float) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(rows, guidance, seeded(), num_inference_steps=steps, output_type="pt").images


@torch.no_grad()
def field(model: Model) -> Tensor:
    """What the model says at fixed states; the same for the same weights."""
    return model.predict(model.noise(2, seeded(3)), torch.tensor([0.3, 0.8]), model.encode(["0", "2"])).value


# parity with diffusers


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"clip": True}])
def test_our_sampler_is_the_dit_pipelines(options: dict[str, bool], guidance: float) -> None:
    model = tiny_dit(**options)
    images = sampler(model, 6, guidance)(["7", "900"], 0)
    expected = theirs(model.pipeline, [7, 900], 6, guidance)
    assert images.shape == (2, 3, 16, 16) and expected.std() > 0.05
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_other_resolutions_are_the_dit_pipelines(guidance: float, learned: bool) -> None:
    model = DiT(dit_pipeline(learned_variance=learned), "tiny", resolution=24)
    images = sampler(model, 4, guidance)(["7", "900"], 0)
    model.network.register_to_config(sample_size=12)  # the plain pipeline's only way to another size
    assert images.shape == (2, 3, 24, 24)
    torch.testing.assert_close(images, theirs(model.pipeline, [7, 900], 4, guidance), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("family", ["dit", "unet"])
def test_gradients_are_the_networks(family: str, learned: bool, guidance: float | None, side: int) -> None:
    model: Any = (
        DiT(dit_pipeline(classes=4, learned_variance=learned), "tiny", resolution=side)
        if family == "dit"
        else UNet(unet_pipeline(class_rows=5, learned_variance=learned), "tiny", side, classes=list("abcd"))
    )
    model.unfreeze("attention")
    x, goal = model.noise(2, seeded()), model.noise(2, seeded(1))
    condition, index = model.encode(["1", "3"]), torch.tensor([200, 700])

    def raw(at: Tensor, rows: Tensor) -> Tensor:
        output: Tensor = model.network(at, index, class_labels=rows).sample
        return output[:, : model.channels]

    def through_network(at: Tensor) -> Tensor:
        output, null = raw(at, torch.tensor([1, 3])), raw(at, torch.tensor([4, 4]))
        return output if guidance is None else null + guidance * (output - null)

    def gradients(field: Any) -> tuple[Tensor, ...]:
        at = x.clone().requires_grad_()
        return torch.autograd.grad((field(at) - goal).square().mean(), [at, *model.trainable().values()])

    expected = gradients(through_network)
    found = gradients(lambda at: model.predict(at, model.path.time(index), condition, guidance).value)
    for one, two in zip(found, expected, strict=True):
        assert two.abs().max() > 0
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)


def test_parity_would_miss_no_guidance_and_no_class() -> None:
    pipe = dit_pipeline()
    plain = theirs(pipe, [7, 900], 6, 1.0)
    assert (plain - theirs(pipe, [7, 900], 6, 4.0)).abs().max() > 1e-2
    assert (plain - theirs(pipe, [8, 901], 6, 1.0)).abs().max() > 1e-2


@torch.no_grad()
def test_a_learned_variance_is_read_where_the_scheduler_knows_how() -> None:
    pipe = dit_pipeline(learned_variance=True)
    assert DiT(pipe, "tiny").predict(torch.zeros(1, 4, 8, 8), torch.tensor(0.5), _one()).log_variance is None
    pipe.scheduler.register_to_config(variance_type="learned_range")
    pred = DiT(pipe, "tiny").predict(torch.zeros(1, 4, 8, 8), torch.tensor(0.5), _one())
    assert pred.log_variance is not None and pred.log_variance.shape == pred.value.shape


def _one() -> Any:
    return tiny_dit().condition(torch.tensor([1]))


# clipped sampling


def clipped_unet(**options: Any) -> tuple[UNet, DDIMPipeline]:
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=True, **options)
    pipe = DDIMPipeline(unet_pipeline(train_times=100).unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return UNet(pipe, "tiny"), pipe


@pytest.mark.parametrize("radius", [1.0, 0.4])
def test_clipped_sampling_is_the_ddim_pipelines(radius: float) -> None:
    model, pipe = clipped_unet(clip_sample_range=radius)
    assert model.clip == radius and tiny_dit().clip is None
    expected = pipe(batch_size=2, generator=seeded(), num_inference_steps=7, output_type="pt").images
    torch.testing.assert_close(sampler(model, 7)(["", ""], 0), expected, atol=1e-4, rtol=0)
    model.clip = None
    assert (sampler(model, 7)(["", ""], 0) - expected).abs().max() > 1e-2  # so clipping bites here


@torch.no_grad()
def test_a_clipped_step_with_noise_is_the_schedulers() -> None:
    model, pipe = clipped_unet()
    pipe.scheduler.set_timesteps(10)
    x = 3 * model.noise(2, seeded())
    pred = model.predict(x, model.path.time(torch.tensor(40)), model.encode([""]))
    assert pred.x_0.abs().max() > 1.5
    step = ddim_step(pred, model.path.time(torch.tensor(30)), 1.0, clip=1.0)
    theirs = pipe.scheduler.step(pred.value, 40, x, eta=1.0, variance_noise=torch.ones_like(x)).prev_sample
    torch.testing.assert_close(step.mean + step.deviation, theirs, atol=1e-4, rtol=0)
    path = rollout(lambda x, t: model.predict(x, t, model.encode([""])), x, model.grid(4), clip=1.0)
    assert path.last.abs().max() <= 1.0


@torch.no_grad()
def test_clipping_is_refused_where_no_step_clips() -> None:
    flow = Flux(flux_pipeline(("a",)), "tiny")
    pred = flow.predict(flow.noise(1, seeded()), torch.tensor(0.5), flow.encode([""]))
    with pytest.raises(ValueError, match="rectified flow"):
        euler(pred, torch.tensor(0.4), clip=1.0)


def test_guidance_may_change_with_time() -> None:
    model = tiny_dit()
    seen: list[float] = []

    def schedule(t: Tensor) -> float:
        seen.append(float(t))
        return 3.0

    images = sampler(model, 4, schedule)(["7"], 0)
    assert seen == pytest.approx(model.grid(4)[:-1].tolist())
    assert torch.equal(images, sampler(model, 4, 3.0)(["7"], 0))
    late = sampler(model, 4, lambda t: 1.0 if t > 0.5 else 3.0)(["7"], 0)
    assert not torch.equal(late, images) and not torch.equal(late, sampler(model, 4)(["7"], 0))


# classes, the null class, states


@torch.no_grad()
def test_classes_have_the_pipelines_words_and_a_null_row() -> None:
    model = tiny_dit(classes=4, labels=LABELS)
    assert model.classes == ("Tinca tinca", "cock", "hen", "3") and model.null_class == 4
    assert model.encode(["tench", "Tinca tinca", "hen", "3", ""]).parts["label"].tolist() == [0, 0, 2, 3, 4]
    with pytest.raises(InputError, match="did you mean 'tench'"):
        model.encode(["tanch"])
    with pytest.raises(InputError, match="names 5 classes but its network has 4"):
        DiT(dit_pipeline(classes=4), "tiny", classes=list("abcde"))
    x, t = model.noise(2, seeded()), torch.tensor([0.4, 0.7])
    both = branches(model, x, t, model.encode(["hen"]))
    guided = model.predict(x, t, model.encode(["hen"]), guidance=2.0).value
    torch.testing.assert_close(guided, both.guided(2.0), atol=1e-5, rtol=1e-5)
    assert both.gap.abs().max() > 1e-2


def test_labels_are_never_dropped() -> None:
    model = tiny_dit(classes=4)
    before = field(model)
    model.network.train()
    assert all(torch.equal(field(model), before) for _ in range(30))  # 120 draws at 0.1 each would show


def test_resolution_and_states() -> None:
    model = DiT(dit_pipeline(classes=4), "tiny", resolution=24)
    states = model.noise(2, seeded()).requires_grad_()
    assert states.shape == (2, 4, 12, 12)
    images = model.decode(states, grad=True)
    assert images.shape == (2, 3, 24, 24) and images.requires_grad
    assert images.min() >= 0 and images.max() <= 1
    latents = model.encode_images(images.detach())
    mean = model.pipeline.vae.encode(images.detach() * 2 - 1).latent_dist.mean
    torch.testing.assert_close(latents, mean * 0.18215)
    with pytest.raises(InputError, match="resolution 18 is not a multiple of 4"):
        DiT(dit_pipeline(classes=4), "tiny", resolution=18)


# adapters and saving


@pytest.mark.parametrize("subset", ["attention", "all-linear"])
def test_an_adapter_trains_its_subset_and_leaves_the_reference(subset: str) -> None:
    model = tiny_dit(classes=4)
    base = field(model)
    model.adapt(LoraSpec(subset, rank=2))
    assert all(".attn1." in name for name in model.trainable()) == (subset == "attention")
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(1)))
    assert (field(model) - base).abs().max() > 1e-3
    with model.reference():
        assert torch.equal(field(model), base)


def test_a_merged_adapter_is_the_pipelines_image(tmp_path: pathlib.Path) -> None:
    model = tiny_dit()
    base = sampler(model, 4)(["7", "900"], 0)
    model.adapt(LoraSpec(rank=2, alpha=3.0))
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    images = sampler(model, 4)(["7", "900"], 0)
    assert (images - base).abs().max() > 1e-3
    model.save(tmp_path)
    for made in (theirs(DiTPipeline.from_pretrained(tmp_path), [7, 900], 4, 1.0), sampler(model, 4)(["7", "900"], 0)):
        torch.testing.assert_close(made, images, atol=1e-4, rtol=0)
    model.scale_adapter(0.0)
    assert torch.equal(sampler(model, 4)(["7", "900"], 0), base)


def test_saving_and_loading_keep_the_field_and_the_words(tmp_path: pathlib.Path) -> None:
    model = tiny_dit(classes=4, labels=LABELS)
    model.unfreeze("attention")
    with torch.no_grad():
        for p in model.trainable().values():
            p.mul_(1.5)
    model.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, DiT) and again.family == "dit"
    assert torch.equal(field(again), field(model)) and again.classes == model.classes
    assert json.loads((tmp_path / "classes.json").read_text()) == list(model.classes)
    images = theirs(DiTPipeline.from_pretrained(tmp_path), [1, 2], 4, 1.0)
    torch.testing.assert_close(sampler(again, 4)(["cock", "hen"], 0), images, atol=1e-4, rtol=0)
