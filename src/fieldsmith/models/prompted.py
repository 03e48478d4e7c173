"""What the families that draw from words share: the null prompt, guidance by two branches, word checks.

A family (flux.py, sd3.py, ...) adds encode, `_forward`, decode and its time grid over its pipeline's own parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.models.core import Condition, Model, stack
from fieldsmith.paths import Prediction, guide


class Prompted(Model):
    """A model of words. `negative` is what guidance goes away from: the empty prompt unless told otherwise."""

    text_length: int  # tokens that a prompt may have
    # (tokenizer, place of its first token in the part "embeds"), where single words can be told there
    text_parts: tuple[tuple[Any, int], ...] = ()
    _negative = ""
    _null: Condition | None = None

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
        """What the network says at x_t (batch, ...) and t (batch,) or (); guidance None or 1 is off."""
        t = t.to(x_t).expand(len(x_t))
        condition = condition.repeat(len(x_t))
        scale = 1.0 if guidance is None else guidance
        if self.embedded_guidance or scale == 1.0:
            return Prediction(self.kind, self.forward(x_t, t, condition, scale), x_t, t, self.path)
        both = stack([condition, self._without_words(condition)])
        conditional, unconditional = self.forward(torch.cat((x_t, x_t)), torch.cat((t, t)), both, 1.0).chunk(2)
        return Prediction(self.kind, self._guided(conditional, unconditional, scale), x_t, t, self.path)

    def _without_words(self, condition: Condition) -> Condition:
        """The condition with the negative prompt in place of its own; what else it holds, such as sources, stays."""
        return Condition({**condition.parts, **self.null.repeat(len(condition)).parts})

    def _guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return guide(conditional, unconditional, scale)

    def _check_words(self, tokenizer: Any, prompts: Sequence[str]) -> None:
        """Raises InputError at a word outside a closed vocabulary, or at a prompt too long for one."""
        if len(tokenizer) > 1000:  # sub-word vocabularies take every text
            return
        words = tuple(word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens)
        spare = tuple(tokenizer.all_special_tokens)
        for prompt in prompts:
            for word in prompt.split():
                if word not in spare:
                    check_word(word, words, self.name)
            if len(tokenizer(prompt).input_ids) > self.text_length:
                raise InputError(
                    f"prompt '{prompt}' is longer than {self.text_length - 1} words, the limit of {self.name}"
                )


def flow_times(scheduler: Any, steps: int, mu: float) -> Tensor:
    """The times at which diffusers' flow scheduler itself steps, whatever shift, stretch or spacing it is set to.

    (steps + 1,), from 1 down to 0; `mu` is the dynamic shift, which static ones pass over. The scheduler stays as it
    was. Raises InputError at a single step where the times are stretched, which needs two.
    """
    if steps < 2 and scheduler.config.get("shift_terminal"):
        raise InputError(f"steps={steps}: this pipeline stretches its times to a last one above 0; use 2 steps or more")
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    times: Tensor = fresh.sigmas
    return times
