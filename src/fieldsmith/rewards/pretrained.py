"""Judges that others trained, over transformers' own parts: CLIP score, PickScore, HPSv2, ImageReward, aesthetics.

In: a folder (or, for the CLIP family, a hub id). Out: differentiable rewards: images are resized, cropped and
normalised in torch, never through PIL, as close to each model's own processor as 8-bit rounding allows. Classifiers of
images, which name what they see, go through their own processor.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from fieldsmith.errors import InputError
from fieldsmith.rewards.reward import Reward

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGEREWARD_MEAN, IMAGEREWARD_STD = 0.16717362830052426, 1.0333394966054072
IMAGEREWARD_WORDS = 35  # tokens of a prompt
WEIGHTS = (".safetensors", ".pth", ".pt")
# ImageReward's release names BLIP's parts as BLIP's authors did
BLIP_NAMES = (
    (r"^blip\.", ""), (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])", r"vision_model.encoder.layers.\1.layer_norm\2"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj", r"vision_model.encoder.layers.\1.self_attn.projection"),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
)  # fmt: skip


def reward(name: str, argument: str) -> Reward:
    """clip, pickscore, hpsv2, imagereward or aesthetic from 'FOLDER' or, the last, 'FOLDER?head=FILE'.

    Raises InputError where the folder, the hub id or the weights in it are not what that reward needs.
    """
    source, _, head = argument.partition("?head=")
    if head and name != "aesthetic":
        raise InputError(
            f"reward '{name}' has no head to choose, so '?head={head}' means nothing; write {name}:{source}"
        )
    if name == "imagereward":
        return imagereward(source)
    if name == "aesthetic":
        return aesthetic(source, head or None)
    return clip_score(source, name, scaled=name == "pickscore")


@dataclass(frozen=True)
class Clip:
    """A CLIPModel with its tokenizer and what its images are prepared with."""

    model: Any
    tokenizer: Any
    side: int
    mean: Sequence[float]
    std: Sequence[float]

    def image_features(self, images: Tensor) -> Tensor:
        """Projected and normalised, (n, d)."""
        model = self.model.to(images.device)
        vision = model.vision_model(pixel_values=preprocess(images, self.side, self.mean, self.std))
        return normalize(model.visual_projection(vision.pooler_output), dim=-1)

    def text_features(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Projected and normalised, (n, d); prompts too long for the model are cut."""
        model = self.model.to(device)
        tokens = _tokens(self.tokenizer, prompts, model.config.text_config.max_position_embeddings, device)
        return normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)


def load_clip(what: str, source: str) -> Clip:
    """A CLIPModel from a folder or hub id, for what messages call "reward 'clip'".

    Raises InputError where it is none or not whole."""
    model = _whole(what, source, CLIPModel)
    tokenizer = _load(what, source, AutoTokenizer.from_pretrained)
    try:
        settings = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        settings = {}  # conversions of open_clip weights often come without
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    return Clip(model, tokenizer, model.config.vision_config.image_size, mean, std)


@dataclass(frozen=True)
class Classifier:
    """A transformers classifier of images with its own processor, and the names of its classes in order."""

    model: Any
    processor: Any
    names: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The probability of each class, (n, classes), of images (n, 3, h, w) in [0, 1]."""
        pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        ready = self.processor(images=list(pixels), return_tensors="pt")["pixel_values"].to(images.device)
        logits: Tensor = self.model.to(images.device)(pixel_values=ready).logits
        return logits.float().softmax(1)


def load_classifier(what: str, source: str) -> Classifier:
    """An image-classification model of transformers from a folder or hub id. Raises as `load_clip`."""
    model = _whole(what, source, AutoModelForImageClassification)
    processor = _load(what, source, AutoImageProcessor.from_pretrained)
    labels = model.config.id2label
    return Classifier(model, processor, tuple(str(labels[place]) for place in range(len(labels))))


def clip_score(source: str, name: str = "clip", scaled: bool = False) -> Reward:
    """cos(image, prompt), times exp(logit_scale) if scaled.

    CLIP score (Hessel et al., 2021) and HPSv2 (Wu et al., 2023) are the cosine, each under its own weights; PickScore
    (Kirstain et al., 2023, equation 1) is scaled.
    """
    clip = load_clip(f"reward '{name}'", source)

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (clip.image_features(images) * clip.text_features(prompts, images.device)).sum(1)
        return cosine * clip.model.logit_scale.exp() if scaled else cosine

    return Reward(f"{name}:{source}", True, judge, (clip.model,))


def aesthetic(source: str, head: str | None = None) -> Reward:
    """LAION's aesthetic predictor (improved-aesthetic-predictor), about 1 to 10: five linear layers on CLIP ViT-L/14.

    `head` is the file of the layers (sac+logos+ava1-l14-linearMSE.pth); by default the one in the folder whose name has
    'linearMSE' or 'aesthetic' in it.
    """
    clip = load_clip("reward 'aesthetic'", source)
    file = pathlib.Path(head) if head else _only_file(source, ("linearMSE", "aesthetic"), "aesthetic:FOLDER?head=FILE")
    layers = linear_layers(_weights(file), str(file))
    width = clip.model.config.projection_dim
    if layers[0].in_features != width:
        raise InputError(
            f"'{file}' reads {layers[0].in_features} numbers and the CLIP in '{source}' gives {width}; use ViT-L/14"
        )

    def judge(images: Tensor, _: Sequence[str]) -> Tensor:
        return layers.to(images.device)(clip.image_features(images))[:, 0]

    return Reward(f"aesthetic:{source}", True, judge, (clip.model, layers))


def imagereward(source: str) -> Reward:
    """ImageReward (Xu et al., 2023): BLIP's text encoder looks at the image, an MLP reads its first token.

    The folder holds config.json and the tokenizer of BLIP large (those of Salesforce/blip-itm-large-coco) and the
    release's weights, ImageReward.pt, or the same as safetensors.
    """
    state = _weights(_only_file(source, ("ImageReward",), "imagereward:FOLDER with ImageReward.pt in it"))
    layers = linear_layers({key: state.pop(key) for key in list(state) if key.startswith("mlp.")}, source)
    for pattern, name in BLIP_NAMES:
        state = {re.sub(pattern, name, key): weight for key, weight in state.items()}
    config: Any = _load("reward 'imagereward'", source, BlipConfig.from_pretrained)
    tokenizer = _load("reward 'imagereward'", source, AutoTokenizer.from_pretrained)
    places = state.get("vision_model.embeddings.position_embedding", torch.empty(1, 1, 0)).shape[1] - 1
    config.vision_config.image_size = side = math.isqrt(places) * config.vision_config.patch_size
    try:
        model: Any = BlipForImageTextRetrieval(config)
        missing = model.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"ImageReward's weights do not fit config.json in '{source}' ({str(error)[:200]})") from error
    missing = [key for key in missing if key.startswith(("vision_model", "text_encoder"))]
    if missing:
        raise InputError(
            f"ImageReward's weights in '{source}' are not whole: {missing[0]} is missing; download them again"
        )
    model.eval().requires_grad_(False)

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        model.to(images.device)
        tokens = _tokens(tokenizer, prompts, IMAGEREWARD_WORDS, images.device)
        vision = model.vision_model(pixel_values=preprocess(images, side, CLIP_MEAN, CLIP_STD)).last_hidden_state
        mask = torch.ones(vision.shape[:2], dtype=torch.long, device=vision.device)
        text = model.text_encoder(**tokens, encoder_hidden_states=vision, encoder_attention_mask=mask)
        score = layers.to(images.device)(text.last_hidden_state[:, 0])[:, 0]
        return (score - IMAGEREWARD_MEAN) / IMAGEREWARD_STD

    return Reward(f"imagereward:{source}", True, judge, (model, layers))


def preprocess(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (n, 3, h, w) in [0, 1] as CLIP takes them, (n, 3, side, side): bicubic resize of the shorter side, centre
    crop, normalise. Differs from the PIL route only in that it does not round to 8 bits in between.
    """
    images = images.float()
    height, width = images.shape[2:]
    short = min(height, width)
    size = (side * height // short, side * width // short)
    for part in ((height, size[1]), size):  # PIL goes by width, then by height, and clamps what overshoots each time
        if part != tuple(images.shape[2:]):
            # antialias also picks PIL's bicubic kernel (a = -0.5, not -0.75)
            images = interpolate(images, size=part, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def linear_layers(state: dict[str, Tensor], where: str) -> nn.Sequential:
    """The linear layers in order of their numbers ('layers.0.weight'): both MLPs are without activations."""
    keys = sorted((int(n.group(1)), key) for key in state if (n := re.search(r"layers\.(\d+)\.weight$", key)))
    layers: list[nn.Linear] = []
    for _, key in keys:
        layer = nn.Linear(state[key].shape[1], state[key].shape[0])
        bias = state.get(key.removesuffix("weight") + "bias", torch.empty(0))
        if bias.shape != layer.bias.shape or (layers and layers[-1].out_features != layer.in_features):
            raise InputError(f"the layers in '{where}' do not fit each other at '{key}'; download them again")
        layer.weight.data, layer.bias.data = state[key].float(), bias.float()
        layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise InputError(f"'{where}' holds no score head: expected layers.0.weight and so on, the last with one output")
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _tokens(tokenizer: Any, prompts: Sequence[str], longest: int, device: torch.device) -> dict[str, Tensor]:
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def _whole(what: str, source: str, kind: Any) -> Any:
    """A frozen model of this kind, of which no weight is missing."""
    model, loaded = _load(what, source, lambda at: kind.from_pretrained(at, output_loading_info=True))
    if loaded["missing_keys"]:
        raise InputError(
            f"'{source}' for {what} is no whole {type(model).__name__}: it lacks {sorted(loaded['missing_keys'])[0]}"
        )
    return model.eval().requires_grad_(False)


def _load(what: str, source: str, load: Callable[[str], Any]) -> Any:
    if not pathlib.Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise InputError(f"the folder '{source}' of {what} does not exist; give a folder or a hub id (org/name)")
    try:
        return load(source)
    except Exception as error:  # transformers, huggingface_hub and safetensors each have their own
        where = (
            "is not what it needs"
            if pathlib.Path(source).is_dir()
            else "is no folder here and could not be fetched from the hub"
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"'{source}' of {what} {where}; check the name, or give a whole folder ({reason})") from error


def _only_file(source: str, words: Sequence[str], usage: str) -> pathlib.Path:
    """The one weight file in the folder with one of the words in its name."""
    folder = pathlib.Path(source)
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [f for f in inside if f.suffix in WEIGHTS and any(word.lower() in f.name.lower() for word in words)]
    if len(files) != 1:
        raise InputError(
            f"'{source}' has {len(files)} weight files named like {' or '.join(words)}, not one; write {usage}"
        )
    return files[0]


def _weights(file: pathlib.Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))  # weights_only: no code is run
    except Exception as error:
        raise InputError(f"'{file}' could not be read as weights ({str(error).splitlines()[0][:200]})") from error
