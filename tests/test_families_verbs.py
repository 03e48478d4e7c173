"""The verbs on Stable Diffusion 1.5 and 3: a step or two of each, words found in their encoders, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import WORDS
from diffusers import PNDMScheduler
from parity import apart, ours, seeded
from torch import Tensor

from experiments.tiny_text import sd3_pipeline, sd15_pipeline
from fieldsmith.errors import InputError
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.erase import losses as L
from fieldsmith.methods.erase import states
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.pairs import encoded
from fieldsmith.methods.erase.step import Projected
from fieldsmith.models.sd3 import SD3
from fieldsmith.models.sd15 import SD15
from fieldsmith.models.text_layers import attention_maps, text_inputs, word_positions
from fieldsmith.models.variance_head import with_variance_head
from fieldsmith.rewards import Reward
from tests.trained import align, erase

QUICK = EraseConfig(
    targets=("red circle",), anchors=("blue circle",), steps=6, window=(1, 3), budget=6, rollout_guidance=2.0,
    dropout=0.0, rank=2, chunk=8, subset="attention", lr=0.02,
)  # fmt: skip
SHIPPED = PNDMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
)


def model_of(family: str, **options: Any) -> Any:
    """A tiny model; SD 1.5 with the scheduler that it ships with, whose grid ends before clean data."""
    if family == "sd3":
        return SD3(sd3_pipeline(WORDS, **options), "tiny")
    pipe: Any = sd15_pipeline(WORDS, **options)
    pipe.scheduler = SHIPPED
    return SD15(pipe, "tiny")


FAMILIES = pytest.mark.parametrize("family", ["sd15", "sd3"])


# erase


@FAMILIES
@pytest.mark.parametrize("method", ["gem", "esd", "concept-ablation"])
def test_erasing_moves_the_target_and_the_reference_stays(family: str, method: str) -> None:
    model = model_of(family)
    base = ours(model, ["red circle"])
    settings = {"prior": 1.0} if method == "concept-ablation" else {"retain": 1.0}
    logs: list[dict[str, float]] = []
    found = erase(
        model, replace(QUICK, method=method, budget=3 if method != "gem" else 6, **settings),
        callback=lambda step, log: logs.append(dict(log)),
    )  # fmt: skip
    assert found.steps == (2 if method == "gem" else 3) and all(log["loss"] == log["loss"] for log in logs[1:])
    assert apart(ours(model, ["red circle"]), base) > 1e-3
    with model.reference():
        assert torch.equal(ours(model, ["red circle"]), base)


@pytest.mark.parametrize("method", ["eraseflow", "eraseanything"])
def test_methods_of_flow_transformers_run_on_sd3_alone(method: str) -> None:
    config = replace(QUICK, method=method, budget=2, steps=3, window=(1, 2), subset="add_qk")
    for options in ({}, {"newer": False}):
        assert erase(model_of("sd3", **options), config).steps == (1 if method == "eraseflow" else 2)
    with pytest.raises(InputError, match=f"'{method}' needs "):
        erase(model_of("sd15"), config)


@FAMILIES
def test_uce_makes_the_targets_last_word_say_the_anchors(family: str) -> None:
    model = model_of(family)
    config = replace(QUICK, method="uce", subset="text-inputs", full=True, uce_lambda=1e-3)
    target, anchor = (text_inputs(model, [prompt]) for prompt in ("red circle", "blue circle"))
    before = {name: model.network.get_submodule(name) for name in target}
    wanted = {name: layer(anchor[name]).detach() for name, layer in before.items()}
    gaps = {name: apart(layer(target[name]).detach(), wanted[name]) for name, layer in before.items()}
    erase(model, config)
    for name, gap in gaps.items():
        assert apart(model.network.get_submodule(name)(target[name]).detach(), wanted[name]) < 0.1 * gap


@FAMILIES
@torch.no_grad()
def test_text_inputs_are_what_the_layers_get(family: str) -> None:
    model, prompts = model_of(family), ["a red square", "circle"]
    found = text_inputs(model, prompts)
    seen: dict[str, Tensor] = {}
    for name in found:
        layer = model.network.get_submodule(name)
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    model.predict(model.noise(2, seeded()), torch.tensor(0.5), model.encode(prompts))
    # the last words are the tokens 3 and 1 behind CLIP's mark of the start, 2 and 0 of T5's eight behind CLIP's eight
    places = [[3, 1]] if family == "sd15" else [[3, 1], [10, 8]]
    for name, rows in found.items():
        given = seen[name]
        expected = given if given.ndim == 2 else torch.cat([given[torch.arange(2), torch.tensor(at)] for at in places])
        assert torch.equal(rows, expected)
    words = [[1, 2, 3, 8, 9, 10], [1, 8]] if family == "sd3" else [[1, 2, 3], [1]]
    assert word_positions(model, prompts) == words


@pytest.mark.parametrize("newer", [True, False])
@torch.no_grad()
def test_attention_maps_are_shares_of_what_an_image_reads(newer: bool) -> None:
    model = model_of("sd3", newer=newer)
    with attention_maps(model) as maps:
        model.predict(model.noise(2, seeded()), torch.tensor(0.5), model.encode(["a red circle"]))
    assert maps[0].shape == (2, 2, 32, 16)  # heads, all tokens, text tokens of CLIP and T5
    assert maps[0].min() >= 0 and 0.1 < maps[0].sum(-1).max() < 1


@torch.no_grad()
def test_erasures_compare_eps_off_rectified_flow() -> None:
    model = model_of("sd15", prediction_type="v_prediction")
    kept = states.kept_states(model, QUICK, seeded())
    pred = model.predict(kept.x, kept.t, kept.condition, QUICK.loss_guidance)
    torch.testing.assert_close(kept.field, pred.eps, atol=1e-4, rtol=1e-4)
    index = model.path.index(states.uniform_times(model, 50, seeded()))
    torch.testing.assert_close(index, index.round(), atol=1e-3, rtol=0)
    assert index.min() > -0.5 and index.max() < 999.5 and len(set(index.tolist())) > 40
    x, t, condition = model.noise(1, seeded()), torch.tensor(0.5), model.encode(["a red circle"])
    projected = Projected(model, QUICK, encoded(model, QUICK.pairs)).predict(x, t, condition)
    n, p = (model.predict(x, t, model.encode([prompt])).eps for prompt in ("red circle", "blue circle"))
    torch.testing.assert_close(projected.eps, L.project(model.predict(x, t, condition).eps, p, n))


# align, and what is refused


@pytest.mark.parametrize(
    ("family", "name"), [("sd15", "ddpo"), ("sd15", "draft"), ("sd3", "flow-grpo"), ("sd3", "nft")]
)
def test_aligning_runs(family: str, name: str) -> None:
    model = model_of(family)
    brightness = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))
    config = replace(
        AlignConfig.preset_of(name, "laptop", {}), prompts=("a red circle", "a blue square"), steps=4, epochs=1,
        prompts_per_epoch=2, rollouts=2, rank=2, guidance=2.0,
    )  # fmt: skip
    base = ours(model, ["a red circle"])
    assert align(model, config, brightness).steps >= 1
    assert apart(ours(model, ["a red circle"]), base) > 1e-6
    with model.reference():
        assert torch.equal(ours(model, ["a red circle"]), base)


def test_what_has_no_place_on_a_family_is_refused() -> None:
    for family in ("sd15", "sd3"):
        with pytest.raises(InputError, match=f"family {family}, which has no variance head"):
            with_variance_head(model_of(family))
    with pytest.raises(InputError, match="subset 'qk_dual' is unknown for family sd15; known: attention"):
        erase(model_of("sd15"), replace(QUICK, subset="qk_dual"))
    with pytest.raises(InputError, match="sde 'cps' does not fit"):
        align(model_of("sd15"), replace(AlignConfig.preset_of("rlcm", "laptop", {}), prompts=("a",), steps=4),
              Reward("zero", True, lambda images, prompts: images.mean((1, 2, 3))))  # fmt: skip
