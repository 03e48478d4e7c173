"""Students: the published pair's counts, searches, refusals, selected weights, and networks that take the scale."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from experiments.tiny import dit_pipeline, flux_pipeline, unet_pipeline
from experiments.tiny_text import sd3_pipeline, sd15_pipeline, sdxl_pipeline
from fieldsmith.errors import InputError
from fieldsmith.measure.drawing import sampler
from fieldsmith.models import load
from fieldsmith.models.branches import branches
from fieldsmith.models.core import LoraSpec, Model
from fieldsmith.models.dit import DiT
from fieldsmith.models.flux import Flux
from fieldsmith.models.sd3 import SD3
from fieldsmith.models.sd15 import SD15
from fieldsmith.models.sdxl import SDXL
from fieldsmith.models.selection import evenly
from fieldsmith.models.shrink import FAMILIES, _fields, _search, candidates, fields_for, parameters, shrink
from fieldsmith.models.unet import UNet
from fieldsmith.samplers import rollout
from tests.drawn import seeded

WORDS = ("a", "red", "circle")
SCALES = (1.0, 2.0, 4.0)
CIFAR = {  # google/ddpm-cifar10-32, whose student DASH made
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "attention_head_dim": None, "num_class_embeds": 11,
}  # fmt: skip


def unet(**options: Any) -> UNet:
    settings = {"widths": (16, 32), "layers": 2, "class_rows": 4} | options
    classes = ("cat", "dog", "owl") if settings["class_rows"] == 4 else None
    return UNet(unet_pipeline(**settings), "teacher", classes=classes)


def dit(**options: Any) -> DiT:
    settings = {"classes": 3, "heads": 4, "head_width": 8, "layers": 4, "labels": {0: "cat", 1: "dog", 2: "owl"}}
    return DiT(dit_pipeline(**(settings | options)), "teacher")


def flux() -> Flux:
    return Flux(flux_pipeline(("a", "red"), layers=2, single_layers=4), "teacher", resolution=16)


def sd15() -> SD15:
    return SD15(sd15_pipeline(WORDS, widths=(32, 64)), "teacher")


def sdxl(**shape: Any) -> SDXL:
    """With heads by level, as SDXL has them, up to three transformer blocks a layer, and two layers a level."""
    pipeline = sdxl_pipeline(WORDS)
    fields = {"block_out_channels": (16, 32), "attention_head_dim": (2, 4), "layers_per_block": 2} | shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = type(pipeline.unet)
        unet = kind.from_config({**pipeline.unet.config, "transformer_layers_per_block": (1, 3), **fields})
    pipeline.register_modules(unet=unet.eval())
    return SDXL(pipeline, "teacher")


def sd3() -> SD3:
    return SD3(sd3_pipeline(WORDS, layers=4, heads=4, head_width=8), "teacher")


TEXT: list[Callable[[], Any]] = [sd15, sdxl, sd3]
MAKERS: list[Callable[[], Model]] = [unet, dit, flux, *TEXT]
CLASSY: list[Callable[[], Any]] = [unet, dit]


@torch.no_grad()
def field(model: Model, guidance: float | None = None, prompt: str = "") -> torch.Tensor:
    """What a model says at fixed states; the same for the same weights."""
    prompt = prompt or ("dog" if hasattr(model, "classes") else "a red")
    return model.predict(model.noise(2, seeded()), torch.tensor([0.3, 0.8]), model.encode([prompt]), guidance).value


# the published pair


def test_the_published_pair_has_the_published_counts_and_the_search_finds_it() -> None:
    with torch.device("meta"):
        teacher = UNet2DModel(**CIFAR)
        student = UNet2DModel(**(CIFAR | {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1}))
    assert parameters(teacher) == 35_751_939 and parameters(student) == 6_082_627
    model = UNet(DDPMPipeline(teacher, DDPMScheduler()), "cifar")
    found = _search(model, FAMILIES["unet"], _fields(model), 5.878)
    assert found == {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1}


# searching


@pytest.mark.parametrize(
    ("make", "ratio"), [(unet, 4.0), (dit, 4.0), (dit, 1.5), (flux, 3.0), (sd15, 3.0), (sdxl, 4.0), (sd3, 4.0)]
)
def test_a_ratio_finds_the_nearest_network_and_shares_the_rest(make: Callable[[], Model], ratio: float) -> None:
    model = make()
    student = shrink(model, ratio=ratio)
    assert 0.75 < parameters(model.network) / parameters(student.network) / ratio < 1.3
    assert type(student) is type(model) and type(student.pipeline) is type(model.pipeline)
    for name, part in model.pipeline.components.items():
        assert (student.pipeline.components[name] is part) == (name != model.PART)
    assert not student.network.training and not student.trainable()
    assert all(not p.requires_grad for p in student.network.parameters())
    assert field(student).shape == field(model).shape and field(student).std() > 0.01
    assert not torch.equal(field(student), field(model))


def test_counts_are_linear_in_depth_as_the_search_takes_them() -> None:
    for make in MAKERS:
        model = make()
        for candidate in candidates(model, _fields(model)):
            with torch.device("meta"):
                built = type(model.network)(**(_fields(model) | candidate.fields))
            assert parameters(built) == candidate.parameters


def test_equal_counts_are_decided_by_shape() -> None:
    model = dit(classes=1, heads=8, head_width=16, layers=8)
    # 3 heads by 8 layers come nearer (1.3 % off, not 4.1 %) but would be a thin and deep network
    found = _search(model, FAMILIES["dit"], _fields(model), 6.0)
    assert found == {"num_attention_heads": 4, "num_layers": 5}


def test_widths_keep_their_proportions_in_whole_groups() -> None:
    student = shrink(unet(widths=(16, 32, 32), layers=1), ratio=3.5)
    assert student.network.config.block_out_channels == (8, 16, 16)
    odd = shrink(unet(widths=(16, 24), layers=2), ratio=3.0)  # 2:3 of whole groups: the teacher's own only
    assert all(width % 8 == 0 for width in odd.network.config.block_out_channels)


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [(1.0, "above 1"), (0.5, "above 1"), (float("nan"), "above 1"), (1e6, "out of reach.*times smaller")],
)
def test_a_ratio_that_cannot_be_is_refused(ratio: float, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        shrink(dit(), ratio=ratio)


def test_a_teacher_that_cannot_shrink_is_refused() -> None:
    with pytest.raises(InputError, match="no smaller network of its own shape"):
        shrink(dit(heads=1, layers=1), ratio=2)
    with pytest.raises(InputError, match="neither"):
        shrink(dit())
    with pytest.raises(InputError, match="both"):
        shrink(dit(), ratio=2, config={})
    with pytest.raises(InputError, match="'warm' is unknown"):
        shrink(dit(), ratio=2, init="warm")  # type: ignore[arg-type]
    adapted = dit()
    adapted.adapt(LoraSpec(rank=1))
    with pytest.raises(ValueError, match="being trained"):
        shrink(adapted, ratio=2)


# configs


def test_a_config_as_read_from_a_file_overrides_the_teachers() -> None:
    model = unet()
    text = json.dumps({**model.network.config, "block_out_channels": [8, 16], "layers_per_block": 1})
    student = shrink(model, config=json.loads(text))
    assert tuple(student.network.config.block_out_channels) == (8, 16) and student.network.config.norm_num_groups == 8
    assert student.classes == ("cat", "dog", "owl") and student.null_class == 3  # type: ignore[attr-defined]
    assert field(student, guidance=2.0).shape == field(model).shape


@pytest.mark.parametrize(
    ("make", "config", "sentence"),
    [
        (unet, {"block_out_channel": [8, 16]}, "UNet2DModel's config; did you mean 'block_out_channels'"),
        (unet, {}, "no fewer than"),
        (unet, {"block_out_channels": [32, 64]}, "parameters, no fewer than the .* of teacher"),
        (unet, {"sample_size": 8, "layers_per_block": 1}, "changes sample_size from 16 to 8"),
        (unet, {"in_channels": 1, "layers_per_block": 1}, "changes in_channels from 3 to 1"),
        (unet, {"num_class_embeds": 3, "layers_per_block": 1}, "changes num_class_embeds from 4 to 3"),
        (unet, {"block_out_channels": [12, 20]}, "makes no UNet2DModel that takes the states"),
        (unet, {"block_out_channels": "thin"}, "makes no UNet2DModel"),
        (unet, {"_class_name": "DiTTransformer2DModel", "num_layers": 1}, "is of a DiTTransformer2DModel"),
        (dit, {"num_layer": 1}, "did you mean 'num_layers'"),
        (dit, {"out_channels": 8, "num_layers": 1}, "changes out_channels"),
        (dit, {"num_embeds_ada_norm": 2, "num_layers": 1}, "changes num_embeds_ada_norm"),
        (flux, {"patch_size": 2, "num_layers": 1}, "changes patch_size from 1 to 2"),
        (flux, {"joint_attention_dim": 32, "num_layers": 1}, "changes joint_attention_dim"),
        (flux, {"attention_head_dim": 16, "num_layers": 1}, "makes no FluxTransformer2DModel"),  # the axes stay 32
    ],
)
def test_a_config_that_makes_no_student_is_refused(make: Any, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as refused:
        shrink(make(), config=config)
    assert "\n" not in str(refused.value)


# weights


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("init", ["fresh", "copied"])
def test_students_are_seeded_and_leave_the_global_generator_alone(make: Callable[[], Model], init: Any) -> None:
    model = make()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fields = fields_for(model, 2, None, None)  # searched for once
    one, same, other = (shrink(model, config=fields, init=init, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(field(one), field(same))
    assert torch.equal(field(one), field(other)) == (init == "copied")  # everything fits in these


def test_places_are_even_and_heads_stay_whole() -> None:
    assert evenly(8, 4).tolist() == [0, 2, 4, 6] and evenly(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert evenly(8, 4, unit=2).tolist() == [0, 1, 4, 5]
    # a concatenation of six parts chooses in each what one part alone chooses
    parts = torch.cat([evenly(12, 8, 4) + 12 * part for part in range(6)])
    assert torch.equal(evenly(72, 48, 4), parts)


def test_surviving_blocks_are_even_over_depth_and_equal_to_the_teachers() -> None:
    model = dit()
    student = shrink(model, config={"num_layers": 2}, init="copied")
    ours, theirs = student.network.transformer_blocks, model.network.transformer_blocks
    for block, source in ((0, 0), (1, 3)):
        state, expected = ours[block].state_dict(), theirs[source].state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(student.network.proj_out_2.weight, model.network.proj_out_2.weight)
    fresh = shrink(model, config={"num_layers": 2})
    assert not torch.equal(fresh.network.proj_out_2.weight, model.network.proj_out_2.weight)


def test_a_narrower_transformer_takes_whole_heads_everywhere() -> None:
    model = dit()
    student = shrink(model, config={"num_attention_heads": 2}, init="copied")
    width = torch.cat((torch.arange(0, 8), torch.arange(16, 24)))  # heads 0 and 2 of 4
    ours, theirs = student.network, model.network
    assert torch.equal(ours.pos_embed.proj.weight, theirs.pos_embed.proj.weight[width])
    assert torch.equal(ours.proj_out_2.weight, theirs.proj_out_2.weight[:, width])
    block, source = ours.transformer_blocks[1], theirs.transformer_blocks[1]
    assert torch.equal(block.attn1.to_q.weight, source.attn1.to_q.weight[width][:, width])
    gates = torch.cat([32 * part + width for part in range(6)])
    assert torch.equal(block.norm1.linear.weight, source.norm1.linear.weight[gates][:, width])


def test_a_narrower_unet_takes_the_same_channels_everywhere() -> None:
    model = unet()
    student = shrink(model, config={"block_out_channels": (8, 16)}, init="copied")
    ours, theirs, low, high = student.network, model.network, evenly(16, 8), evenly(32, 16)
    assert torch.equal(ours.conv_in.weight, theirs.conv_in.weight[low])
    joined = torch.cat((high, 32 + evenly(16, 8)))  # what comes from below, and the skip
    conv, source = ours.up_blocks[0].resnets[2].conv1, theirs.up_blocks[0].resnets[2].conv1
    assert torch.equal(conv.weight, source.weight[high][:, joined])
    heads = torch.cat((torch.arange(0, 8), torch.arange(16, 24)))
    attention, source = ours.mid_block.attentions[0], theirs.mid_block.attentions[0]
    assert torch.equal(attention.to_q.weight, source.to_q.weight[heads][:, high])
    assert torch.equal(attention.to_out[0].weight, source.to_out[0].weight[high][:, heads])


def test_a_narrower_text_unet_takes_the_same_channels_and_whole_heads() -> None:
    model = sdxl()
    student = shrink(model, config={"block_out_channels": (8, 16), "attention_head_dim": (1, 2),
                                    "transformer_layers_per_block": (1, 2)}, init="copied")  # fmt: skip
    ours, theirs, low, high = student.network, model.network, evenly(16, 8), evenly(32, 16)
    assert torch.equal(ours.conv_in.weight, theirs.conv_in.weight[low])
    assert torch.equal(ours.add_embedding.linear_1.weight, theirs.add_embedding.linear_1.weight[evenly(64, 32)])
    heads = torch.cat((torch.arange(0, 8), torch.arange(16, 24)))  # heads 0 and 2 of 4
    for block, source in ((0, 0), (1, 2)):
        one = ours.down_blocks[1].attentions[0].transformer_blocks[block]
        two = theirs.down_blocks[1].attentions[0].transformer_blocks[source]
        assert torch.equal(one.attn2.to_k.weight, two.attn2.to_k.weight[heads])
        assert torch.equal(one.attn1.to_out[0].weight, two.attn1.to_out[0].weight[high][:, heads])
        gates = torch.cat((evenly(128, 64), 128 + evenly(128, 64)))  # values, and what gates them
        assert torch.equal(one.ff.net[0].proj.weight, two.ff.net[0].proj.weight[gates][:, high])
    joined = torch.cat((high, 32 + low))  # what comes from below, and the skip
    conv, source = ours.up_blocks[0].resnets[2].conv1, theirs.up_blocks[0].resnets[2].conv1
    assert torch.equal(conv.weight, source.weight[high][:, joined])


def test_one_number_of_heads_gets_narrower_heads() -> None:
    model = sd15()
    student = shrink(model, config={"block_out_channels": (16, 32)}, init="copied")
    assert student.network.config.attention_head_dim == model.network.config.attention_head_dim == 2
    one, two = (net.network.down_blocks[0].attentions[0].transformer_blocks[0].attn1 for net in (student, model))
    places = evenly(32, 16)  # of 2 heads of 16: 8 even places of each
    assert places[:8].max() < 16 <= places[8:].min()
    assert torch.equal(one.to_q.weight, two.to_q.weight[places][:, places])


def test_the_second_attention_of_sd3_stays_with_its_blocks() -> None:
    model = sd3()  # a second attention in the first block of four
    student = shrink(model, config={"num_layers": 2}, init="copied")
    ours, theirs = student.network.transformer_blocks, model.network.transformer_blocks
    for block, source in ((0, 0), (1, 3)):  # the last has no words to give on
        state, expected = ours[block].state_dict(), theirs[source].state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected) and state.keys() == expected.keys()
    narrow = shrink(model, config={"num_attention_heads": 2, "caption_projection_dim": 16}, init="copied")
    width = torch.cat((torch.arange(0, 8), torch.arange(16, 24)))
    one, two = narrow.network.transformer_blocks[0].attn2, theirs[0].attn2
    assert torch.equal(one.to_q.weight, two.to_q.weight[width][:, width])


@pytest.mark.parametrize("make", TEXT)
def test_a_text_student_is_a_pipeline_that_diffusers_draws_the_same_from(
    make: Callable[[], Any], tmp_path: pathlib.Path
) -> None:
    student = shrink(make(), ratio=2, init="copied")
    student.save(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    told = {k: v for k, v in student.pipeline.config.items() if k[0] != "_"}
    assert told == {k: v for k, v in pipe.config.items() if k[0] != "_"}
    pipe.set_progress_bar_config(disable=True)
    model: Any = load(tmp_path, resolution=16)
    for guidance in (1.0, 4.0):
        length = {"max_sequence_length": model.text_length} if make is sd3 else {}
        images = pipe(
            "a red circle", height=16, width=16, num_inference_steps=3, generator=seeded(), guidance_scale=guidance,
            output_type="pt", **length,
        ).images  # fmt: skip
        condition = model.encode(["a red circle"])
        field = partial(model.predict, condition=condition, guidance=guidance)
        last = rollout(field, model.noise(1, seeded()), model.grid(3)).last
        torch.testing.assert_close(model.decode(last), images, atol=1e-4, rtol=0)


def test_what_fits_nothing_stays_fresh() -> None:
    model = unet()
    changes = {"block_out_channels": (8, 40), "layers_per_block": 1}
    copied, fresh = shrink(model, config=changes, init="copied"), shrink(model, config=changes)
    wider = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(copied.network.get_parameter(wider), fresh.network.get_parameter(wider))
    assert torch.equal(copied.network.conv_in.weight, model.network.conv_in.weight[evenly(16, 8)])


# networks that take the guidance scale


@pytest.mark.parametrize("make", CLASSY)
def test_a_student_with_scales_answers_in_one_forward(make: Callable[[], Any]) -> None:
    model = make()
    student: Any = shrink(model, ratio=2, guidance_scales=SCALES)
    assert student.classes == model.classes and student.null_class is None and student.scales == SCALES
    assert student.encode(["owl"]).parts["label"].tolist() == [2]
    with student.count_nfe() as nfe:
        output = {scale: field(student, scale) for scale in SCALES}
    assert nfe.total == 2 * len(SCALES)
    row = torch.tensor([1 * 3 + 2])  # dog at the last scale
    x, index = student.noise(2, seeded()), torch.tensor([299.0, 799.0])
    with torch.no_grad():
        raw = student.network(x, index, class_labels=row.expand(2), return_dict=False)[0]
    torch.testing.assert_close(output[4.0], raw, atol=1e-4, rtol=1e-4)
    assert torch.equal(field(student), output[1.0])  # None reads as 1
    assert not torch.equal(output[1.0], output[2.0]) and not torch.equal(field(student, 2.0, "owl"), output[2.0])
    with pytest.raises(InputError, match=r"guidance=3 is no scale .*one of 1, 2, 4"):
        field(student, 3.0)
    with pytest.raises(InputError, match="null class"):
        branches(student, x, torch.tensor([0.3, 0.8]), student.encode(["dog"]))
    assert sampler(student, 2, lambda t: 4.0 if t > 0.5 else 1.0)(["dog"], 0).shape[1] == 3


@pytest.mark.parametrize("make", CLASSY)
def test_a_student_with_scales_survives_saving(make: Callable[[], Any], tmp_path: pathlib.Path) -> None:
    student: Any = shrink(make(), ratio=2, guidance_scales=(1.5, 3.0))
    with pytest.raises(InputError, match=r"no guidance, .*one of 1\.5, 3"):
        field(student)
    student.save(tmp_path)
    output = json.loads((tmp_path / "classes.json").read_text())
    assert output == {"classes": ["cat", "dog", "owl"], "guidance_scales": [1.5, 3.0]}
    again: Any = load(tmp_path)
    assert again.scales == (1.5, 3.0) and again.classes == student.classes
    assert torch.equal(field(again, 3.0), field(student, 3.0))
    smaller: Any = shrink(again, ratio=2)  # a student of its own takes the same scales
    assert smaller.scales == (1.5, 3.0)
    for wrong in ({"classes": ["cat"], "guidance_scales": [1.5, 3.0]}, {"classes": ["cat", "dog", "owl"]},
                  {"classes": ["cat", "dog", "owl"], "guidance_scales": ["high"]}):  # fmt: skip
        (tmp_path / "classes.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"classes\.json"):
            load(tmp_path)


@pytest.mark.parametrize("make", CLASSY)
def test_copied_class_rows_are_the_classes_at_every_scale(make: Callable[[], Any]) -> None:
    model = make()
    student = shrink(model, config={"layers_per_block": 1} if make is unet else {"num_layers": 2}, init="copied",
                     guidance_scales=(1.0, 2.0))  # fmt: skip
    name = "class_embedding.weight" if make is unet else (
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    )  # fmt: skip
    ours, theirs = student.network.get_parameter(name), model.network.get_parameter(name)
    assert torch.equal(ours[:6], theirs[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize(
    ("make", "scales", "sentence"),
    [
        (flux, SCALES, "family flux lacks"),
        (lambda: unet(class_rows=None), SCALES, "null class"),
        (lambda: unet(class_rows=3), SCALES, "null class"),
        (unet, (), "one or more"),
        (unet, (2.0, 2.0), "different numbers"),
        (unet, (1.0, float("inf")), "different numbers"),
    ],
)
def test_scales_that_mean_nothing_are_refused(make: Callable[[], Model], scales: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        shrink(make(), ratio=2, guidance_scales=scales)
