"""Features of images by a vision transformer, for distances that outside readers know: CLIP, DINOv2 and their like.

In: a folder or hub id that transformers loads. Out: a callable (n, 3, h, w) in [0, 1] -> (n, d) with a `name`. The
worlds have classifiers of their own; Inception has no transformers model, so FID itself is for who brings its network.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fieldsmith.errors import InputError


@dataclass(frozen=True)
class VisionFeatures:
    """Pooled features of `network` at its own resolution and normalisation."""

    network: Any
    name: str
    size: int
    mean: Tensor
    deviation: Tensor

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = []
        for part in images.split(64):
            part = part.expand(-1, 3, -1, -1)
            part = interpolate(part, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            output = self.network(pixel_values=(part - self.mean) / self.deviation)
            pooled = getattr(output, "pooler_output", None)
            features.append(output.last_hidden_state[:, 0] if pooled is None else pooled)
        return torch.cat(features)


def load_features(name: str) -> VisionFeatures:
    """Raises InputError where the weights are not at hand or are no vision model."""
    # slow to import, and only for runs with an extractor of their own
    from transformers import AutoConfig, AutoModel, CLIPVisionModel

    local = pathlib.Path(name).is_dir()
    try:
        config: Any = AutoConfig.from_pretrained(name, local_files_only=local)
        kind = CLIPVisionModel if str(config.model_type).startswith("clip") else AutoModel
        network: Any = kind.from_pretrained(name, local_files_only=local, use_safetensors=True).eval()
        size = int(network.config.image_size)
        processor = _processor(name, local)
    except Exception as error:  # transformers and the hub each have their own
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"extractor '{name}' could not be loaded ({line}); name a folder or hub id of a CLIP or DINOv2 model"
        ) from error
    network.requires_grad_(False)
    mean, deviation = (torch.tensor(processor[key]).reshape(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    return VisionFeatures(network, f"{name}, {network.config.hidden_size} features", size, mean, deviation)


def _processor(name: str, local: bool) -> dict[str, Any]:
    """How the model wants its pixels; ImageNet's mean and deviation where it names none."""
    from transformers import ImageProcessingMixin  # as above

    known: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    try:
        output = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=local)[0]
    except OSError:
        output = {}
    return known | {key: output[key] for key in known if key in output}
