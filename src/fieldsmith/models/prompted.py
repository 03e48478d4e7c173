"""What the families of prompts share: encoding, classifier-free guidance, named layer subsets.

A family file (flux.py, sd3.py, ...) adds `_encode`, `_forward`, `dummy_condition` and `grid` over the parts of its
diffusers pipeline, and `_decode`, `_encode_images` and `noise` where its states are not latents as the autoencoder
gives them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError, check_word
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.models.prompts import cut_words, quiet
from fieldsmith.paths import Prediction, guide

# of networks with dual-stream blocks, in which image and text tokens attend to each other under weights of their own
DUAL_STREAM_SUBSETS = {
    "qk_dual": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|add_q_proj|add_k_proj)",
    "add_qk": r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj)",
    "attention": r".*\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    "attention-kv": r".*\.attn2?\.(to_k|to_v)",
    "all-linear": r".*",
}


class Prompted(Model):
    """A model of prompts. `negative` is what guidance leads away from: the empty prompt unless set."""

    TOKENIZER: ClassVar[str] = "tokenizer"  # the pipeline's tokenizer that reads the whole prompt
    TEMPLATE: ClassVar[int] = 0  # tokens that the pipeline puts before a prompt within the length that is read
    resolution: int  # pixels a side of an image
    text_length: int  # tokens that a prompt may have
    # (tokenizer, index of its first token in the part "embeds"), for methods that address single words
    text_parts: tuple[tuple[Any, int], ...] = ()
    _negative = ""
    _null: Condition | None = None

    def __init__(
        self, pipeline: Any, name: str, resolution: int | None, native: int, multiple: int, largest: int | None = None
    ):
        """`native`: the resolution where none is asked for; `multiple`: what it must be a multiple of, in pixels."""
        super().__init__(pipeline, getattr(pipeline, self.PART), name)
        self._told: set[str] = set()  # prompts whose length was looked at
        self.resolution, self.multiple = resolution or native, multiple
        if self.resolution % multiple or (largest and self.resolution > largest):
            limit = f" up to {largest}" if largest else ""
            raise InputError(f"resolution {self.resolution} is not a multiple of {multiple}{limit} for {name}")

    def _encode(self, prompts: list[str]) -> Condition:
        raise NotImplementedError

    def encode(self, prompts: Sequence[str], grad: bool = False) -> Condition:
        """One row a prompt. Raises InputError at a word outside a closed vocabulary."""
        self.check_prompts(prompts)
        with torch.set_grad_enabled(grad), quiet():
            return Condition(self._encode(list(prompts)).parts, tuple(prompts))

    @property
    def negative(self) -> str:
        return self._negative

    @negative.setter
    def negative(self, prompt: str) -> None:
        self._negative, self._null = prompt, None

    @property
    def null(self) -> Condition:
        """The negative prompt, encoded once."""
        if self._null is None:
            self._null = self.encode([self.negative])
        return self._null

    @property
    def embedded_guidance(self) -> bool:
        """Whether the network takes the guidance scale itself, in one forward."""
        return False

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | None = None) -> Prediction:
        """The network's prediction at x_t (batch, ...) and t (batch,) or (); guidance None or 1 is off."""
        t = t.to(x_t).expand(len(x_t))
        condition = condition.repeat(len(x_t))
        scale = 1.0 if guidance is None else guidance
        if self.embedded_guidance or scale == 1.0:
            return Prediction(self.kind, self.forward(x_t, t, condition, scale), x_t, t, self.path)
        both = stack([condition, self._without_words(condition)])
        conditional, unconditional = self.forward(torch.cat((x_t, x_t)), torch.cat((t, t)), both, 1.0).chunk(2)
        return Prediction(self.kind, self._guided(conditional, unconditional, scale), x_t, t, self.path)

    def _without_words(self, condition: Condition) -> Condition:
        """The condition with the negative prompt in place of its own; its other parts, such as sources, stay."""
        null = self.null.repeat(len(condition))
        return Condition({**condition.parts, **null.parts}, null.words)

    def _guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return guide(conditional, unconditional, scale)

    def _tokenizer(self) -> Any:
        """The tokenizer that reads the whole prompt, also where a processor of pictures has it inside."""
        tokenizer = getattr(self.pipeline, self.TOKENIZER)
        return getattr(tokenizer, "tokenizer", tokenizer)

    def _readers(self) -> dict[str, tuple[Any, int]]:
        """The pipeline's tokenizers by name, each with how many tokens of a prompt its encoder reads."""
        found = {}
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is not None:
                length = min(tokenizer.model_max_length, self.text_length)
                found[name] = tokenizer, length - self.TEMPLATE - tokenizer.num_special_tokens_to_add()
        return found

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises InputError at a word outside a closed vocabulary, or at a prompt too long for one; elsewhere one line
        says which prompts are cut, once for each."""
        tokenizer = self._tokenizer()
        if len(tokenizer) > 1000:  # sub-word vocabularies take every text
            new = set(prompts) - self._told
            self._told |= new
            with quiet():
                cut = cut_words(self._readers(), [prompt for prompt in prompts if prompt in new])
            if cut and processes.is_main():
                print(f"{self.name}: {cut}", file=sys.stderr)
            return
        words = tuple(word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens)
        spare = tuple(tokenizer.all_special_tokens)
        for prompt in dict.fromkeys(prompts):
            for word in prompt.split():
                if word not in spare:
                    check_word(word, words, self.name)
            if len(tokenizer(prompt).input_ids) > self.text_length:
                raise InputError(
                    f"prompt '{prompt}' is longer than {self.text_length - 1} words, the limit of {self.name}"
                )
