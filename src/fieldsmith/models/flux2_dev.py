"""FLUX.2 dev: the klein file with another text encoder, Mistral Small, over diffusers' Flux2Pipeline.

The network was distilled with the guidance scale, which it takes itself. Prompts are read under the pipeline's own
system message, within the 512 tokens. Where torchvision is missing, transformers has no PixtralProcessor; the tokenizer
inside it then stands in its place, which gives the same tokens, and the pipeline is saved again with it.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_torchvision_available

from fieldsmith.models.flux2_klein import Flux2Klein


class Flux2Dev(Flux2Klein):
    family = "flux2-dev"

    @classmethod
    def components(cls, source: str, **options: Any) -> dict[str, Any]:
        """No processor, where transformers lacks what it needs for pictures; `of_folder` puts its tokenizer there."""
        return {} if is_torchvision_available() else {"tokenizer": None}

    @classmethod
    def of_folder(cls, pipeline: Any, name: str, resolution: int | None, folder: pathlib.Path | None) -> Flux2Dev:
        if pipeline.tokenizer is None:
            kept = AutoTokenizer.from_pretrained(folder or name, subfolder="tokenizer", local_files_only=bool(folder))
            pipeline.register_modules(tokenizer=kept)
        return cls(pipeline, name, resolution)

    @property
    def embedded_guidance(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    def _scale(self, t: Tensor, guidance: float) -> Tensor:
        return torch.full_like(t, guidance)

    def _readers(self) -> dict[str, tuple[Any, int]]:
        tokenizer = self._tokenizer()  # of system message and marks, the last of which stands behind the prompt
        around = tokenizer.apply_chat_template(format_input([""], self.pipeline.system_message), return_dict=True)
        return {"tokenizer": (tokenizer, self.text_length - len(around.input_ids[0]))}
