"""Full-size networks with random weights, as benchmarks/gpu.py times them, and toy ones with the same lines.

Transformers are built from their public configurations where they will work; prompts are random embeddings of the
encoders' shapes, as a run has them once its text encoders wait on the CPU, and the autoencoder is a small one on
latents of the real size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.tiny import dit_pipeline, flux_pipeline
from experiments.tiny_text import sd3_pipeline
from fieldsmith.models.core import Condition, Model
from fieldsmith.models.dit import DiT
from fieldsmith.models.flux import Flux
from fieldsmith.models.sd3 import SD3

WORDS = ("a", "red", "blue", "square", "circle")
CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """How large everything is: the whole of what `--tiny` changes."""

    side: int  # of images, in pixels
    text: int  # tokens of T5
    networks: dict[str, dict[str, Any]]  # config fields by model
    student: float  # how many times smaller a distilled network is
    rows: dict[str, int]  # sizes of the timed runs
    dtype: torch.dtype  # of frozen weights


FULL = Size(
    512, 512,
    {
        "FLUX.1": {"guidance_embeds": True},  # diffusers' defaults are FLUX.1: 19 + 38 blocks, 24 heads of 128
        "SD3.5-medium": {
            "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "num_attention_heads": 24,
            "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "DiT-XL/2": {
            "sample_size": 32, "in_channels": 4, "out_channels": 8, "num_layers": 28, "num_attention_heads": 16,
            "attention_head_dim": 72, "num_embeds_ada_norm": CLASSES, "patch_size": 2,
        },
    },
    5.0,
    {"erase updates": 23, "erase chunk": 2, "erase steps": 28, "groups": 2, "rollouts": 4, "chunk": 4, "pairs": 32,
     "steps": 10, "drawn": 28},
    torch.bfloat16,
)  # fmt: skip
TINY = Size(
    32, 8,
    {
        "FLUX.1": FULL.networks["FLUX.1"] | {
            "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
        },
        "SD3.5-medium": FULL.networks["SD3.5-medium"] | {
            "sample_size": 8, "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 32,
            "caption_projection_dim": 64, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
        },
        "DiT-XL/2": FULL.networks["DiT-XL/2"] | {
            "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        },
    },
    2.0,
    {"erase updates": 2, "erase chunk": 4, "erase steps": 12, "groups": 1, "rollouts": 2, "chunk": 4, "pairs": 4,
     "steps": 2, "drawn": 2},
    torch.float32,
)  # fmt: skip


def counting(kind: type[Any], text: int | None) -> type[Any]:
    """The family, which counts rows of its network's forwards by whether a backward follows; with `text` tokens of
    random embeddings for words."""

    class Counting(kind):  # type: ignore[misc]
        def forward(self, x_t: Tensor, t: Tensor, *condition: Any) -> Any:
            output = super().forward(x_t, t, *condition)
            first = output[0] if isinstance(output, tuple) else output
            asked = self.__dict__.setdefault("asked", {False: 0, True: 0})
            asked[first.requires_grad] += len(x_t)
            return output

        def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
            if text is None:
                return super().encode(prompts, grad)
            shape, rows = self.network.config, []
            for prompt in prompts:
                generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
                rows.append((torch.randn(text, shape.joint_attention_dim, generator=generator),
                             torch.randn(shape.pooled_projection_dim, generator=generator)))  # fmt: skip
            embeds, pooled = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
            return Condition({"embeds": embeds, "pooled": pooled})

    return Counting


def built(name: str, size: Size, device: str) -> Any:
    """The model, its transformer drawn where it will work."""
    makers: dict[str, tuple[type[Any], Callable[[], Any], type[Model]]] = {
        "FLUX.1": (FluxTransformer2DModel, lambda: flux_pipeline(WORDS), Flux),
        "SD3.5-medium": (SD3Transformer2DModel, lambda: sd3_pipeline(WORDS), SD3),
        "DiT-XL/2": (DiTTransformer2DModel, dit_pipeline, DiT),
    }
    network_of, pipeline_of, kind = makers[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            network = network_of(**size.networks[name])
    finally:
        torch.set_default_dtype(before)
    small = pipeline_of()
    vae = small.vae if name == "DiT-XL/2" else flux_pipeline(WORDS, vae_channels=(8, 8, 8, 8), latent_channels=16).vae
    parts = {**small.components, "transformer": network.eval(), "vae": vae.to(device, size.dtype)}
    if name == "DiT-XL/2":
        return counting(kind, None)(type(small)(**parts), name)
    return counting(kind, size.text)(type(small)(**parts), name, size.side)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one state: its forward, and its forward with the backward that follows."""

    forward: float
    trained: float

    def of(self, asked: dict[bool, int]) -> float:
        """Of rows by whether a backward followed."""
        return asked[False] * self.forward + asked[True] * self.trained


def operations(model: Any) -> Operations:
    """Of a model as it stands, with whatever trains attached."""
    generator = torch.Generator().manual_seed(0)
    x, condition = model.noise(1, generator), model.encode(["red" if model.family != "dit" else "1"])
    counts = []
    for grad in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad), model.uncounted():
            value = model.predict(x, torch.full((1,), 0.5, device=x.device), condition).value
            if value.requires_grad:
                value.float().sum().backward()
        counts.append(float(counter.get_total_flops()))
    for p in model.network.parameters():
        p.grad = None
    return Operations(*counts)
