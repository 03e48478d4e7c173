"""Qwen-Image-Edit: Qwen-Image that sees source images, twice, over diffusers' QwenImageEditPipeline and EditPlus.

The text encoder reads an instruction together with its image, so `encode` keeps the words as they are, and
`with_images` reads both. The other view is more tokens after the state's own. The pipelines first resize a source to
an area of 1024 x 1024; here it is seen at its own size, so that both agree for sources of that area.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available

from fieldsmith.errors import InputError
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.models.qwen_image import QwenImage, masked
from fieldsmith.models.sources import Editor, Size, joined
from fieldsmith.paths import Prediction

Pictures = list[PIL.Image.Image]


class QwenImageEdit(QwenImage, Editor):
    family = "qwen-image-edit"

    @classmethod
    def components(cls, source: str, **options: Any) -> dict[str, Any]:
        """The processor, where transformers lacks what its part for films needs."""
        if is_torchvision_available():
            return {}
        images = Qwen2VLImageProcessorPil.from_pretrained(source, subfolder="processor", **options)
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="processor", **options)
        return {"processor": still_processor(images, tokenizer)}

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """The words of each prompt, one row a prompt: "words" (n, bytes) in UTF-8; `with_images` reads them."""
        self.check_prompts(prompts)
        rows = [torch.tensor([list(prompt.encode())], dtype=torch.uint8).to(self.device) for prompt in prompts]
        return stack([Condition({"words": row}, (prompt,)) for row, prompt in zip(rows, prompts, strict=True)])

    def _readers(self) -> dict[str, tuple[Any, int]]:
        return {}  # pictures are cut together with words, from the end, which is far

    def dummy_condition(self) -> Condition:
        return Model.dummy_condition(self)  # words are read together with images

    @property
    def several_sources(self) -> bool:  # type: ignore[override]
        return isinstance(self.pipeline, QwenImageEditPlusPipeline)

    def _places(self, sizes: list[Size]) -> dict[str, Tensor]:
        """Gives "source_size" (1, sources, 2), heights and widths in tokens."""
        return {"source_size": torch.tensor([sizes]).to(self.device)}

    def _with_sources(
        self, condition: Condition, latents: list[Tensor], sizes: list[Size], images: list[Tensor] | None
    ) -> Condition:
        """Adds what the text encoder reads in words and images (at 8-bit levels) together: "embeds" and "mask", and the
        same for the negative prompt, "null_embeds" and "null_mask". No gradient goes through what is read."""
        images = images or [self.decode(part) for part in latents]
        rows = max(len(condition), *map(len, images))
        pictures = [[_picture(image[row if len(image) > 1 else 0]) for image in images] for row in range(rows)]
        words = [_words(row) for row in condition.repeat(rows).parts["words"]]
        with torch.no_grad():
            read = self._read([*words, *[self.negative] * rows], pictures * 2)
        null = {f"null_{name}": part[rows:] for name, part in read.parts.items()}
        seen = joined(condition, read[:rows], Condition(null))
        return super()._with_sources(seen, latents, sizes, images)

    def _read(self, prompts: list[str], pictures: list[Pictures]) -> Condition:
        """Each prompt with its pictures, as the text encoder embeds them."""
        pipe: Any = self.pipeline
        if not self.several_sources:
            return masked(*pipe.encode_prompt(prompts, image=[row[0] for row in pictures], device=self.device))
        rows = []  # one at a time, as EditPlus's template has it
        for prompt, row in zip(prompts, pictures, strict=True):
            small = []
            for picture in row:
                shape = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, picture.width / picture.height)
                small.append(pipe.image_processor.resize(picture, shape[1], shape[0]))
            rows.append(masked(*pipe.encode_prompt([prompt], image=small, device=self.device)))
        return stack(rows)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        """The network's prediction at x_t (batch, ...) and t (batch,) or (); guidance None or 1 is off."""
        if "embeds" not in condition.parts:
            raise InputError(
                f"{self.name} reads its instructions together with images and draws nothing from words alone; "
                "use the verb edit, or give it source images with `with_images`"
            )
        return super().predict(x_t, t, condition, guidance)

    def _without_words(self, condition: Condition) -> Condition:
        parts = condition.parts
        words = (self.negative,) * len(condition)
        return Condition({**parts, "embeds": parts["null_embeds"], "mask": parts["null_mask"]}, words)


def still_processor(images: Qwen2VLImageProcessorPil, tokenizer: Any) -> Qwen2VLProcessor:
    """A Qwen2VLProcessor for pictures alone: transformers gives it a part for films, which needs torchvision.

    In that part's place are the settings for pictures, so that it can be saved.
    """
    processor: Any = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    processor.image_processor, processor.tokenizer, processor.chat_template = images, tokenizer, None
    processor.video_processor = copy.deepcopy(images)
    processor.video_processor.video_processor_type = "Qwen2VLVideoProcessor"
    for kind in ("image", "video"):
        mark = f"<|{kind}_pad|>"
        setattr(processor, f"{kind}_token", mark)
        setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(mark))
    made: Qwen2VLProcessor = processor
    return made


def _words(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode()


def _picture(image: Tensor) -> PIL.Image.Image:
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy()))
