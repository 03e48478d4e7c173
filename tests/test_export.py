"""Adapters under other tools' keys: exact names, round trips, and diffusers' own converters as independent readers."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import torch
from conftest import WORDS
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin, QwenImageLoraLoaderMixin, ZImageLoraLoaderMixin
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from experiments.tiny import flux_pipeline, kontext_pipeline, word_tokenizer
from experiments.tiny_edit import z_image_pipeline
from experiments.tiny_text import chroma_pipeline
from fieldsmith.cli import main
from fieldsmith.errors import InputError
from fieldsmith.models import denoiser_of, export, load, load_adapter
from fieldsmith.models.adapters import read, read_tensors
from fieldsmith.models.changes import low_rank
from fieldsmith.models.core import LoraSpec
from fieldsmith.models.export import Adapter, LowRank, exported, sizes_of, write
from fieldsmith.models.families import FAMILIES
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.samplers import rollout
from tests.drawn import seeded

PROMPTS = ["a red square", "a blue circle", ""]
SMALL: dict[str, Any] = {"vae_channels": (8, 8, 8), "latent_channels": 4}


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def sdxl() -> UNet2DConditionModel:
    """Of SDXL's levels, two layers each and the lower two with attention."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8, 8), layers_per_block=2, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    ).eval()  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    """Of SD3.5-medium's kind: the first block has a second attention, the last gives no words on."""
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def flux2(guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=guidance_embeds,
    )  # fmt: skip


def qwen() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip


def flux() -> nn.Module:
    network: nn.Module = flux_pipeline(WORDS, guidance_embeds=True, **SMALL).transformer
    return network


def chroma() -> nn.Module:
    network: nn.Module = chroma_pipeline(WORDS).transformer
    return network


def z_image() -> nn.Module:
    network: nn.Module = z_image_pipeline(WORDS).transformer
    return network


NETWORKS = {"sd15": unet, "sdxl": sdxl, "sd3": sd3, "flux": flux, "flux-kontext": flux, "chroma": chroma,
            "flux2-klein": flux2, "flux2-dev": lambda: flux2(guidance_embeds=True), "z-image": z_image,
            "qwen-image": qwen, "qwen-image-edit": qwen}  # fmt: skip


def some_adapter(sizes: export.Sizes, keep: str = "", even: bool = False) -> Adapter:
    """A LoRA on every layer with `keep` in its name; ranks and scales differ from layer to layer unless `even`."""
    generator = seeded(3)
    found = {}
    for i, (layer, (wide, tall, *kernel)) in enumerate(sizes.items()):
        rank, scale = (3, 0.5) if even else (1 + i % 3, (1.0, 0.5, 2.0, 0.125)[i % 4])
        down = torch.randn(rank, wide, *kernel, generator=generator)
        up = torch.randn(tall, rank, *[1] * len(kernel), generator=generator)
        if keep in layer:
            found[layer] = LowRank(down, up, scale)
    return found


def change(one: LowRank) -> Tensor:
    """The layer's whole change, (out, in) or (out, in * height * width)."""
    return one.scale * one.up.flatten(1) @ one.down.flatten(1)


def imported(tensors: dict[str, Tensor], family: str, sizes: export.Sizes, name: str) -> Adapter:
    return low_rank(read_tensors(tensors, family, sizes, name, pathlib.Path("a.safetensors")), sizes)


def adapter_in(file: pathlib.Path, family: str, sizes: export.Sizes, name: str) -> Adapter:
    return low_rank(read(file, family, sizes, name), sizes)


def same(ours: Adapter, theirs: Adapter, rtol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for layer in ours:
        torch.testing.assert_close(change(ours[layer]), change(theirs[layer]), rtol=rtol, atol=1e-6)


# names


NAMES = {
    "sd15": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q":
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0":
            "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_attn2_to_out_0",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj":
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "mid_block.resnets.0.time_emb_proj": "lora_unet_mid_block_resnets_0_time_emb_proj",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.2.attentions.1.proj_in": "lora_unet_input_blocks_8_1_proj_in",
        "mid_block.attentions.0.transformer_blocks.1.ff.net.2":
            "lora_unet_middle_block_1_transformer_blocks_1_ff_net_2",
        "mid_block.resnets.1.time_emb_proj": "lora_unet_middle_block_2_emb_layers_1",
        "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0":
            "lora_unet_output_blocks_2_1_transformer_blocks_1_attn2_to_out_0",
        "up_blocks.1.attentions.0.proj_out": "lora_unet_output_blocks_3_1_proj_out",
        "down_blocks.1.resnets.0.time_emb_proj": "lora_unet_input_blocks_4_0_emb_layers_1",
        "time_embedding.linear_2": "lora_unet_time_embed_2",
        "add_embedding.linear_1": "lora_unet_label_emb_0_0",
    },
    "sd3": {
        "transformer_blocks.0.attn.to_k": "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "transformer_blocks.0.attn2.to_v": "lora_unet_joint_blocks_0_x_block_attn2_qkv",
        "transformer_blocks.1.attn.add_q_proj": "lora_unet_joint_blocks_1_context_block_attn_qkv",
        "transformer_blocks.0.attn.to_add_out": "lora_unet_joint_blocks_0_context_block_attn_proj",
        "transformer_blocks.1.ff.net.0.proj": "lora_unet_joint_blocks_1_x_block_mlp_fc1",
        "transformer_blocks.0.ff_context.net.2": "lora_unet_joint_blocks_0_context_block_mlp_fc2",
        "transformer_blocks.1.norm1_context.linear": "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1",
        "time_text_embed.text_embedder.linear_2": "lora_unet_y_embedder_mlp_2",
        "norm_out.linear": "lora_unet_final_layer_adaLN_modulation_1",
    },
    "flux": {
        "transformer_blocks.0.attn.to_q": "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer_blocks.1.attn.add_v_proj": "lora_unet_double_blocks_1_txt_attn_qkv",
        "transformer_blocks.1.attn.to_add_out": "lora_unet_double_blocks_1_txt_attn_proj",
        "transformer_blocks.0.ff.net.0.proj": "lora_unet_double_blocks_0_img_mlp_0",
        "transformer_blocks.0.ff_context.net.2": "lora_unet_double_blocks_0_txt_mlp_2",
        "transformer_blocks.0.norm1.linear": "lora_unet_double_blocks_0_img_mod_lin",
        "single_transformer_blocks.1.attn.to_v": "lora_unet_single_blocks_1_linear1",
        "single_transformer_blocks.1.proj_mlp": "lora_unet_single_blocks_1_linear1",
        "single_transformer_blocks.0.proj_out": "lora_unet_single_blocks_0_linear2",
        "single_transformer_blocks.0.norm.linear": "lora_unet_single_blocks_0_modulation_lin",
        "context_embedder": "lora_unet_txt_in",
        "time_text_embed.text_embedder.linear_1": "lora_unet_vector_in_in_layer",
        "time_text_embed.guidance_embedder.linear_2": "lora_unet_guidance_in_out_layer",
    },
    "flux2-klein": {
        "transformer_blocks.0.attn.to_k": "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer_blocks.0.ff.linear_in": "lora_unet_double_blocks_0_img_mlp_0",
        "transformer_blocks.0.ff_context.linear_out": "lora_unet_double_blocks_0_txt_mlp_2",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "lora_unet_single_blocks_0_linear1",
        "single_transformer_blocks.0.attn.to_out": "lora_unet_single_blocks_0_linear2",
        "double_stream_modulation_img.linear": "lora_unet_double_stream_modulation_img_lin",
    },
    "flux2-dev": {
        "transformer_blocks.0.attn.add_v_proj": "lora_unet_double_blocks_0_txt_attn_qkv",
        "single_stream_modulation.linear": "lora_unet_single_stream_modulation_lin",
        "time_guidance_embed.guidance_embedder.linear_1": "lora_unet_guidance_in_in_layer",
    },
    "chroma": {
        "transformer_blocks.1.attn.add_v_proj": "lora_unet_double_blocks_1_txt_attn_qkv",
        "single_transformer_blocks.0.proj_out": "lora_unet_single_blocks_0_linear2",
        "distilled_guidance_layer.layers.1.linear_2": "lora_unet_distilled_guidance_layer_layers_1_out_layer",
        "distilled_guidance_layer.in_proj": "lora_unet_distilled_guidance_layer_in_proj",
        "proj_out": "lora_unet_final_layer_linear",
    },
    "z-image": {
        "layers.1.attention.to_k": "lora_unet_layers_1_attention_qkv",
        "noise_refiner.0.attention.to_out.0": "lora_unet_noise_refiner_0_attention_out",
        "context_refiner.0.feed_forward.w2": "lora_unet_context_refiner_0_feed_forward_w2",
        "layers.0.adaLN_modulation.0": "lora_unet_layers_0_adaLN_modulation_0",
        "all_x_embedder.2-1": "lora_unet_x_embedder",
        "all_final_layer.2-1.adaLN_modulation.1": "lora_unet_final_layer_adaLN_modulation_1",
        "t_embedder.mlp.2": "lora_unet_t_embedder_mlp_2",
    },
    "qwen-image": {
        "transformer_blocks.1.attn.to_q": "lora_unet_transformer_blocks_1_attn_to_q",
        "transformer_blocks.0.attn.to_out.0": "lora_unet_transformer_blocks_0_attn_to_out_0",
        "transformer_blocks.0.attn.add_k_proj": "lora_unet_transformer_blocks_0_attn_add_k_proj",
        "transformer_blocks.0.img_mlp.net.0.proj": "lora_unet_transformer_blocks_0_img_mlp_net_0_proj",
        "transformer_blocks.0.txt_mod.1": "lora_unet_transformer_blocks_0_txt_mod_1",
    },
}  # fmt: skip
NAMES |= {"flux-kontext": NAMES["flux"], "qwen-image-edit": NAMES["qwen-image"]}
# every layer outside of the blocks, as their clients name it
OUTER = {"sd15": {name: name for name in ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out")},
         "sdxl": {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
                  "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
                  "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2"}}  # fmt: skip
ENDS = (".lora_down.weight", ".lora_up.weight", ".alpha")


@pytest.mark.parametrize("family", [family.name for family in FAMILIES if family.exports])
def test_names_are_the_other_tools(family: str) -> None:
    sizes = sizes_of(NETWORKS[family]())
    for layer, key in NAMES[family].items():
        one = {layer: LowRank(torch.ones(2, sizes[layer][0]), torch.ones(sizes[layer][1], 2), 0.5)}
        assert set(exported(one, family, sizes, "kohya")) == {key + end for end in ENDS}
        dotted = exported(one, family, sizes, "comfyui")
        assert len(dotted) == 3 and {name.replace(".", "_") for name in dotted} == {
            (key if family == "sd15" else key.replace("lora_unet_", "diffusion_model.")).replace(".", "_") + end
            for end in ("_lora_down_weight", "_lora_up_weight", "_alpha")
        }
    whole = exported(some_adapter(sizes), family, sizes, "kohya")
    assert len(whole) == 3 * len(export.layout(family, sizes))
    assert sum(len(parts) for parts in export.layout(family, sizes).values()) == len(sizes)  # no layer is lost


def test_names_with_dots() -> None:
    sizes = sizes_of(flux())
    keys = exported(some_adapter(sizes, "0.attn.to_q"), "flux", sizes, "comfyui")
    assert set(keys) == {"diffusion_model." + name + end for end in ENDS
                         for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")}  # fmt: skip


# fused layers


def test_a_fused_lora_is_blocks_of_its_parts() -> None:
    sizes = sizes_of(flux())
    layer = "transformer_blocks.0.attn.to_"
    qk = some_adapter(sizes, layer, even=True)
    qk = {layer + "q": qk[layer + "q"], layer + "k": qk[layer + "k"]}
    found = exported(qk, "flux", sizes, "kohya")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up, alpha = (found[key + end] for end in ENDS)
    assert down.shape == (6, 128) and up.shape == (3 * 128, 6) and alpha.ndim == 0
    assert alpha.item() == 0.5 * 6  # alpha / rank is still a half
    assert torch.equal(up[:128, :3], qk[layer + "q"].up) and torch.equal(up[128:256, 3:], qk[layer + "k"].up)
    assert not up[:128, 3:].any() and not up[128:256, :3].any() and not up[256:].any()
    back = imported(found, "flux", sizes, "tiny")
    assert back.keys() == qk.keys()
    for name, one in qk.items():  # the same tensors, not only the same product
        assert torch.equal(back[name].down, one.down) and torch.equal(back[name].up, one.up)
        assert back[name].scale == one.scale


def test_parts_of_different_scales_keep_them() -> None:
    sizes = sizes_of(flux())
    layer = "transformer_blocks.1.attn.add_"
    two = {layer + "q_proj": LowRank(torch.ones(2, 128), torch.ones(128, 2), 0.25),
           layer + "v_proj": LowRank(torch.ones(1, 128), torch.ones(128, 1), 3.0)}  # fmt: skip
    found = exported(two, "flux", sizes, "kohya")
    key = "lora_unet_double_blocks_1_txt_attn_qkv"
    assert found[key + ".alpha"].item() == len(found[key + ".lora_down.weight"]) == 3
    same(two, imported(found, "flux", sizes, "tiny"))


def test_a_dense_fused_lora_comes_apart() -> None:
    """As kohya trains it: one A for all of q, k and v."""
    sizes = sizes_of(flux())
    key = "lora_unet_single_blocks_0_linear1"
    down, up = torch.randn(4, 128, generator=seeded()), torch.randn(3 * 128 + 512, 4, generator=seeded(1))
    tensors = {key + ENDS[0]: down, key + ENDS[1]: up, key + ENDS[2]: torch.tensor(2.0)}
    back = imported(tensors, "flux", sizes, "tiny")
    block = "single_transformer_blocks.0."
    parts = [back[block + name] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert len(back) == 4 and all(part.scale == 0.5 for part in parts)
    torch.testing.assert_close(torch.cat([change(part) for part in parts]), 0.5 * up @ down)


def test_a_lora_that_is_still_zero_survives() -> None:
    sizes = sizes_of(flux())
    fresh = {name: LowRank(one.down, torch.zeros_like(one.up), one.scale) for name, one in some_adapter(sizes).items()}
    same(fresh, imported(exported(fresh, "flux", sizes, "kohya"), "flux", sizes, "tiny"))


def test_scale_zero_is_not_read_as_no_alpha() -> None:
    """kohya's scripts read alpha = 0 as alpha = rank."""
    sizes = sizes_of(unet())
    off = {name: LowRank(one.down, one.up, 0.0) for name, one in some_adapter(sizes).items()}
    found = exported(off, "sd15", sizes, "kohya")
    assert all(tensor.item() > 0 for key, tensor in found.items() if key.endswith("alpha"))
    assert not any(tensor.any() for key, tensor in found.items() if key.endswith("up.weight"))


@pytest.mark.parametrize("form", export.FORMATS)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "chroma", "flux2-dev", "z-image", "qwen-image"])
def test_round_trip(family: str, form: str, tmp_path: pathlib.Path) -> None:
    sizes = sizes_of(NETWORKS[family]())
    for keep in ("", "attn.to_", "to_q", "proj"):
        adapter = some_adapter(sizes, keep)
        if adapter:
            write(adapter, family, sizes, form, tmp_path / "a.safetensors")
            same(adapter, adapter_in(tmp_path / "a.safetensors", family, sizes, "tiny"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# diffusers as an independent reader


def folded(state: dict[str, Tensor], layer: str) -> Tensor:
    """The change that a diffusers state of scale 1 makes of a layer."""
    return state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_diffusers_reads_qwen(form: str) -> None:
    sizes = sizes_of(qwen())
    adapter = some_adapter(sizes)  # those outside of the blocks too: the last modulation keeps its halves' order
    state = QwenImageLoraLoaderMixin.lora_state_dict(exported(adapter, "qwen-image", sizes, form))
    assert len(state) == 2 * len(adapter)
    for layer, one in adapter.items():
        torch.testing.assert_close(folded(state, f"transformer.{layer}"), change(one))


def test_diffusers_reads_flux2() -> None:
    sizes = sizes_of(flux2())
    adapter = some_adapter(sizes, "transformer_blocks") | some_adapter(sizes, "embedder")
    state = Flux2LoraLoaderMixin.lora_state_dict(exported(adapter, "flux2-klein", sizes, "kohya"))
    for layer, one in adapter.items():
        torch.testing.assert_close(folded(state, f"transformer.{layer}"), change(one))


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize("family", OUTER)
def test_a_key_of_every_layer_outside_of_the_blocks_holds_its_change(family: str, form: str) -> None:
    """Against their clients' names: sd-scripts has SD 1.5's layers as diffusers does, and SDXL's as its release did."""
    sizes = sizes_of(NETWORKS[family]())
    assert OUTER[family].keys() == {layer for layer in sizes if "block" not in layer}
    adapter = some_adapter(sizes)
    found = exported(adapter, family, sizes, form)
    for layer, name in OUTER[family].items():
        dotted = form == "comfyui" and family == "sdxl"
        key = f"diffusion_model.{name}" if dotted else "lora_unet_" + name.replace(".", "_")
        down, up, alpha = (found[key + end] for end in ENDS)
        made = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        torch.testing.assert_close(made, change(adapter[layer]), msg=layer)


def test_the_change_of_sdxls_checkpoint_is_ours() -> None:
    """As for the families below, of every layer; diffusers' converter of UNets looks for biases, and a last norm."""
    network = sdxl()
    sizes = sizes_of(network)
    adapter = some_adapter(sizes)
    found = exported(adapter, "sdxl", sizes, "comfyui")
    checkpoint = {f"model.diffusion_model.out.0.{kind}": torch.zeros(4) for kind in ("weight", "bias")}
    for key in [key for key in found if key.endswith(ENDS[0])]:
        name = key.removesuffix(ENDS[0])
        down, up, alpha = (found[name + end] for end in ENDS)
        checkpoint[f"model.{name}.weight"] = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        checkpoint[f"model.{name}.bias"] = torch.zeros(len(up))
    weights = convert_ldm_unet_checkpoint(checkpoint, dict(network.config))
    for layer, one in adapter.items():
        torch.testing.assert_close(weights[f"{layer}.weight"], change(one), msg=layer)


def test_diffusers_reads_z_image() -> None:
    """All of its blocks under kohya's keys; in ComfyUI's it knows no fused layer."""
    sizes = sizes_of(z_image())
    adapter = some_adapter(sizes, "attention") | some_adapter(sizes, "feed_forward")
    state = ZImageLoraLoaderMixin.lora_state_dict(exported(adapter, "z-image", sizes, "kohya"))
    assert len(state) == 2 * len(adapter)
    for layer, one in adapter.items():
        torch.testing.assert_close(folded(state, f"transformer.{layer}"), change(one))


def test_diffusers_reads_flux_at_its_full_width() -> None:
    """diffusers splits single blocks at FLUX.1's own widths."""
    block, sizes = "single_transformer_blocks.0.", {}
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        sizes[block + name] = (3072, 12288 if name == "proj_mlp" else 3072)
    x = torch.randn(3072, 2, generator=seeded())
    for keep in ("", "to_", "to_q"):
        adapter = some_adapter(sizes, keep)
        state = _convert_kohya_flux_lora_to_diffusers(exported(adapter, "flux", sizes, "kohya"))
        for layer in sizes:
            output = state[f"transformer.{layer}.lora_B.weight"] @ (state[f"transformer.{layer}.lora_A.weight"] @ x)
            one = adapter.get(layer)
            expected = one.scale * one.up @ (one.down @ x) if one else torch.zeros_like(output)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)


def test_diffusers_swaps_the_last_modulation_back() -> None:
    sizes = sizes_of(flux())
    one = {"norm_out.linear": LowRank(torch.randn(2, 128), torch.randn(256, 2), 1.0)}
    state = _convert_kohya_flux_lora_to_diffusers(exported(one, "flux", sizes, "kohya"))
    torch.testing.assert_close(folded(state, "norm_out.linear"), change(one["norm_out.linear"]))


class Rest(dict[str, Tensor]):
    """A checkpoint whose biases and norms are all zero."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(6))


CONVERTERS: dict[str, Any] = {
    "flux": convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": convert_sd3_transformer_checkpoint_to_diffusers,
    "chroma": convert_chroma_transformer_checkpoint_to_diffusers,
    "flux2-dev": convert_flux2_transformer_checkpoint_to_diffusers,
    "z-image": convert_z_image_transformer_checkpoint_to_diffusers,
    "qwen-image": lambda checkpoint: checkpoint,  # a Qwen-Image checkpoint is diffusers' own
}

LAST = {"chroma": ("proj_out",), "z-image": ("all_final_layer.2-1.adaLN_modulation.1", "all_final_layer.2-1.linear")}


@pytest.mark.parametrize("family", CONVERTERS)
def test_the_change_of_an_original_checkpoint_is_ours(family: str) -> None:
    """The exported change, as weights of an original checkpoint, through diffusers' converter of checkpoints."""
    sizes = sizes_of(NETWORKS[family]())
    adapter = some_adapter(sizes)
    found = exported(adapter, family, sizes, "comfyui")
    checkpoint = Rest()
    for key in [key for key in found if key.endswith(ENDS[0])]:
        name = key.removesuffix(ENDS[0])
        down, up, alpha = (found[name + end] for end in ENDS)
        checkpoint[name.removeprefix("diffusion_model.") + ".weight"] = (
            alpha / len(down) * up.flatten(1) @ down.flatten(1)
        )
    fused = [name for name in checkpoint if family in ("flux", "chroma") and name.endswith("linear1.weight")]
    for name in fused:  # which diffusers splits at full width
        checkpoint[name] = torch.zeros(3 * 3072 + 12288, 1)
        checkpoint[name.replace("weight", "bias")] = torch.zeros(3 * 3072 + 12288)
    weights = CONVERTERS[family](checkpoint)
    compared = [layer for layer in adapter if not (fused and re.search(r"single.*(to_[qkv]|proj_mlp)$", layer))]
    assert set(LAST.get(family, ("norm_out.linear", "proj_out"))) <= set(compared)
    for layer in compared:
        torch.testing.assert_close(weights[f"{layer}.weight"], change(adapter[layer]), msg=layer)


@torch.no_grad()
def ours(model: Flux) -> Tensor:
    condition = model.encode(PROMPTS)
    return model.decode(
        rollout(lambda x, t: model.predict(x, t, condition), model.noise(3, seeded()), model.grid(3)).last
    )


def theirs(pipe: Any, size: int) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    more = (
        {"image": None, "_auto_resize": False, "max_area": size * size} if isinstance(pipe, FluxKontextPipeline) else {}
    )
    output: Tensor = pipe(
        prompt=PROMPTS, height=size, width=size, num_inference_steps=3, generator=seeded(), output_type="pt",
        max_sequence_length=8, **more,
    ).images  # fmt: skip
    return output


def shake(model: Flux) -> None:
    generator = seeded(7)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("family", ["flux", "flux-kontext"])
def test_diffusers_draws_our_image_from_a_kohya_file(
    family: str, scale: float, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # every layer of the dual blocks; single ones diffusers reads at full width alone
    monkeypatch.setitem(Flux.SUBSETS, "dual", r"transformer_blocks\..*")
    editor = family == "flux-kontext"
    model = (FluxKontext if editor else Flux)((kontext_pipeline if editor else flux_pipeline)(WORDS, **SMALL), "tiny")
    base = ours(model)
    model.adapt(LoraSpec("dual", rank=2, alpha=6.0))
    shake(model)
    model.scale_adapter(scale)
    expected = ours(model)
    sizes = sizes_of(model.network)
    pipe: Any = (kontext_pipeline if editor else flux_pipeline)(WORDS, **SMALL)
    for form in ("kohya", "comfyui"):
        write(model.adapter(), family, sizes, form, tmp_path / f"{form}.safetensors")
        pipe.load_lora_weights(tmp_path, weight_name=f"{form}.safetensors")
        torch.testing.assert_close(theirs(pipe, model.resolution), expected, atol=1e-4, rtol=0)
        pipe.unload_lora_weights()
    assert (expected - base).abs().max() > 1e-3


def stable_diffusion() -> StableDiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=len(WORDS) + 5, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=8)
        return StableDiffusionPipeline(
            vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=word_tokenizer(WORDS, 8, bos=True),
            unet=unet(), scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip


def test_diffusers_draws_our_image_from_a_kohya_file_of_stable_diffusion(tmp_path: pathlib.Path) -> None:
    pipe, other = stable_diffusion(), stable_diffusion()
    sizes = sizes_of(pipe.unet)
    adapter = {name: LowRank(one.down * 0.1, one.up * 0.1, one.scale)
               for name, one in some_adapter(sizes, even=True).items()}  # fmt: skip

    def drawn(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        output: Tensor = pipe(
            PROMPTS[:2], height=8, width=8, num_inference_steps=3, generator=seeded(), output_type="pt"
        ).images
        return output

    base = drawn(pipe)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=1.5, target_modules=list(sizes)), pipe.unet)
    for name, one in adapter.items():
        layer: Any = pipe.unet.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = one.down, one.up
    expected = drawn(pipe)
    assert (expected - base).abs().max() > 1e-2
    write(adapter, "sd15", sizes, "kohya", tmp_path / "a.safetensors")
    other.load_lora_weights(tmp_path, weight_name="a.safetensors")
    torch.testing.assert_close(drawn(other), expected, atol=1e-4, rtol=0)


# our own reading


@pytest.mark.parametrize("form", export.FORMATS)
def test_load_adapter_reads_every_format(form: str, tmp_path: pathlib.Path) -> None:
    model = Flux(flux_pipeline(WORDS, **SMALL), "tiny")
    base = ours(model)
    model.adapt(LoraSpec("all-linear", rank=2, alpha=3.0))
    shake(model)
    model.scale_adapter(0.7)
    expected, adapter = ours(model), model.adapter()
    assert (expected - base).abs().max() > 1e-3
    odd = "single_transformer_blocks.1.proj_out"  # a rank and a scale of its own
    adapter[odd] = LowRank(
        torch.cat((adapter[odd].down,) * 2), torch.cat((adapter[odd].up,) * 2, 1), adapter[odd].scale / 2
    )
    write(adapter, "flux", sizes_of(model.network), form, tmp_path / "a.safetensors")
    again = Flux(flux_pipeline(WORDS, **SMALL), "tiny")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(ours(again), expected, atol=1e-5, rtol=0)
    same(again.adapter(), adapter)
    with again.reference():
        assert torch.equal(ours(again), base)
    again.save(tmp_path / "saved")  # what was read in one format goes out in ours
    same(
        adapter_in(tmp_path / "saved" / "pytorch_lora_weights.safetensors", "flux", sizes_of(again.network), ""),
        adapter,
    )


def test_a_model_without_an_adapter_has_none() -> None:
    with pytest.raises(InputError, match="carries no adapter"):
        Flux(flux_pipeline(WORDS, **SMALL), "tiny").adapter()


# the command


@pytest.fixture
def run(flux_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A run's folder with an adapter of two layers a block."""
    model = load(flux_folder)
    model.adapt(LoraSpec("qk_dual", rank=2, alpha=5.0))
    shake(model)  # type: ignore[arg-type]
    model.save(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.toml").write_text(f"verb = 'erase'\nmodel = '{flux_folder}'\n")
    return tmp_path / "run"


def test_export_reads_a_run_and_writes_every_format(
    run: pathlib.Path, flux_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = run / "adapter" / "pytorch_lora_weights.safetensors"
    sizes = sizes_of(load(flux_folder).network)
    expected = adapter_in(ours, "flux", sizes, "")
    out = tmp_path / "new" / "a.safetensors"
    for form in export.FORMATS:
        for source in (run, run / "adapter", ours):
            assert main(["export", str(source), "--format", form, "--out", str(out)]) == 0
            assert f"8 layers of family flux as {form}: {out}" in capsys.readouterr().out
            same(adapter_in(out, "flux", sizes, ""), expected)
    again = tmp_path / "again.safetensors"  # from one foreign format to another, where nothing names the model
    assert main(["export", str(out), "--format", "kohya", "--out", str(again), "--model", str(flux_folder)]) == 0
    same(adapter_in(again, "flux", sizes, ""), expected)
    assert set(load_file(again)) == {f"lora_unet_double_blocks_{i}_{stream}_attn_qkv{end}" for i in (0, 1)
                                     for stream in ("img", "txt") for end in ENDS}  # fmt: skip
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.load_lora_weights(again)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}


def test_export_of_a_run_on_a_single_file_takes_the_pipeline_of_its_config(
    run: pathlib.Path, flux_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (run / "config.toml").write_text(f"verb = 'erase'\nmodel = 'a.safetensors'\nconfig_from = '{flux_folder}'\n")
    out = tmp_path / "a.safetensors"
    assert main(["export", str(run), "--format", "comfyui", "--out", str(out)]) == 0
    assert len(load_file(out)) == 3 * 4


def refused(capsys: pytest.CaptureFixture[str], *words: object, says: str) -> None:
    assert main(["export", *map(str, words)]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("fieldsmith: ") and sentence.count("\n") == 1, sentence
    assert says in sentence, sentence


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    run: pathlib.Path, flux_folder: pathlib.Path, unet_folder: pathlib.Path, tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = ("--out", tmp_path / "new" / "a.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, says="no adapter given; name a run's folder")
    refused(capsys, run, "--format", "kohya", says="no out file given; add --out FILE.safetensors")
    refused(capsys, run, "--out", tmp_path / "a.bin", says="is no name of a safetensors file")
    refused(capsys, run, *out, "--format", "a1111", says="invalid choice 'a1111'")
    refused(capsys, empty, *out, says="holds no LoRA")
    refused(capsys, tmp_path / "nowhere", *out, says="nowhere' does not exist; give a LoRA's")
    refused(capsys, run, *out, "--model", "zoo:nothing", says="is not in the zoo")
    refused(capsys, run, *out, "--model", unet_folder, says="family unet has no adapter files")
    shifted = empty / "a.safetensors"
    save_file({f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight": torch.zeros(shape)
               for half, shape in (("A", (2, 64)), ("B", (64, 2)))}, shifted)  # fmt: skip
    refused(capsys, shifted, *out, says="says which model it was trained on; add --model M")
    refused(
        capsys, shifted, *out, "--model", flux_folder, says="its layer 128 x 128; use the model that it was trained on"
    )
    save_file({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(2, 4)}, shifted)
    refused(capsys, shifted, *out, "--model", flux_folder, says="made for family sd15 or sdxl, not for flux")
    save_file({"lora_unet_txt_in.lora_down.weight": torch.zeros(2, 64)}, shifted)
    refused(capsys, shifted, *out, "--model", flux_folder, says="has one of its two weights")
    shifted.write_bytes(b"no tensors")
    refused(capsys, shifted, *out, "--model", flux_folder, says="could not be read as a LoRA")
    assert not (tmp_path / "new").exists()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    assert main(["export", str(run), *map(str, out)]) == 3
    assert not list((tmp_path / "new").iterdir())


def test_a_half_pipeline_is_refused(flux_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model_index.json").write_text((flux_folder / "model_index.json").read_text())
    with pytest.raises(InputError, match=r"the transformer of .* could not be read, is it whole"):
        denoiser_of(tmp_path)


def test_layers_without_a_name_and_families_without_a_format_are_refused() -> None:
    sizes = {**sizes_of(flux()), "new_layer": (4, 4)}
    one = {"new_layer": LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    with pytest.raises(InputError, match="layer 'new_layer' has no name in the kohya format of family flux"):
        exported(one, "flux", sizes, "kohya")
    with pytest.raises(InputError, match="no comfyui format of LoRA is established for family dit; use --format"):
        exported(one, "dit", sizes, "comfyui")
    with pytest.raises(InputError, match="did you mean 'kohya'"):
        exported(one, "flux", sizes, "koyha")


def test_equal_saves_are_equal_bytes(tmp_path: pathlib.Path) -> None:
    sizes = sizes_of(flux())
    adapter = some_adapter(sizes, "to_q")
    saves = set()
    for turned in (False, True) * 8:  # safetensors throws a coin for the order of metadata
        layers = dict(reversed(adapter.items())) if turned else adapter
        write(layers, "flux", sizes, "diffusers", tmp_path / "a.safetensors")
        saves.add((tmp_path / "a.safetensors").read_bytes())
    assert len(saves) == 1
    same(adapter_in(tmp_path / "a.safetensors", "flux", sizes, ""), adapter)


@pytest.mark.parametrize("form", export.FORMATS)
def test_files_have_the_permissions_of_an_ordinary_one(form: str, tmp_path: pathlib.Path) -> None:
    sizes = sizes_of(flux())
    write(some_adapter(sizes, "to_q"), "flux", sizes, form, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "plain"]


def test_the_file_of_diffusers_format_has_its_metadata(tmp_path: pathlib.Path) -> None:
    sizes = sizes_of(flux())
    write(some_adapter(sizes), "flux", sizes, "diffusers", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        output = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert {"transformer.r", "transformer.lora_alpha", "transformer.rank_pattern"} <= set(output)
