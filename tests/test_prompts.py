"""Prompts longer than an encoder reads: cut as diffusers cuts them, and said once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.tiny import flux_pipeline
from experiments.tiny_text import sd3_pipeline, sd15_pipeline
from fieldsmith.models.flux import Flux
from fieldsmith.models.prompts import Prompts
from fieldsmith.models.sd3 import SD3
from fieldsmith.models.sd15 import SD15

WORDS = tuple(f"w{i}" for i in range(1100))  # so many that the vocabulary counts as open
LONG = " ".join(WORDS[:40])


@pytest.fixture(scope="module")
def sd15() -> SD15:
    return SD15(sd15_pipeline(WORDS), "tiny")  # 8 tokens, of which 2 are marks


def test_one_line_says_how_many_prompts_are_cut_and_after_which_word(sd15, capfd):
    given = Prompts(sd15, [LONG, "w1 w2", f"{LONG} w7", LONG])
    said = capfd.readouterr().err
    assert said.strip() == (
        "tiny: of 3 prompts some are longer than an encoder reads and are cut: 2 by tokenizer after 6 tokens, such as "
        f"'{LONG[:60]}...' after 'w5'"
    )
    _ = given[torch.tensor([0, 1, 2])]
    sd15.encode([LONG])
    assert capfd.readouterr().err == ""  # neither again nor by diffusers
    sd15.encode(["w1 w2 w3 w4 w5 w6"])
    assert capfd.readouterr().err == ""


def test_the_rest_of_a_cut_prompt_changes_nothing_as_in_diffusers(sd15):
    short, long, other = (sd15.encode([words]).parts["embeds"] for words in (" ".join(WORDS[:6]), LONG, "w0 w1"))
    assert torch.equal(short, long) and not torch.equal(short, other)
    theirs = sd15.pipeline.encode_prompt([LONG], sd15.device, 1, do_classifier_free_guidance=False)[0]
    assert torch.equal(long, theirs)


@pytest.mark.parametrize(
    ("kind", "pipeline", "counts"),
    [
        (Flux, lambda: flux_pipeline(WORDS), {"tokenizer": 6, "tokenizer_2": 7}),
        (SD3, lambda: sd3_pipeline(WORDS), {"tokenizer": 6, "tokenizer_2": 6, "tokenizer_3": 7}),
        (SD3, lambda: sd3_pipeline(WORDS, t5=False), {"tokenizer": 6, "tokenizer_2": 6}),
    ],
    ids=["flux", "sd3", "sd3 without T5"],
)
def test_every_encoder_is_named_with_what_it_reads(kind: Any, pipeline: Any, counts: dict[str, int], capfd):
    model = kind(pipeline(), "tiny")
    model.encode([LONG])
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for name, room in counts.items():
        assert f"1 by {name} after {room} tokens, such as '{LONG[:60]}...' after 'w{room - 1}'" in said
