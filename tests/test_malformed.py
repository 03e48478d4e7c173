"""What is fed to it: some of the malformed inputs of `python -m benchmarks.malformed`, and the names of all of them."""

from __future__ import annotations

import collections
import pathlib

import pytest

from benchmarks.malformed import combined, corpus
from benchmarks.malformed.case import Case, ask
from benchmarks.malformed.pipelines import Bases

CASES = {case.name: case for case in corpus.cases()}
# one of each kind of fault that once fell through
SOME = (
    "model/erase/transformer/diffusion_pytorch_model.safetensors one NaN",
    "model/erase/text_encoder/model.safetensors all under other names",
    "model/erase/transformer/config.json num_layers = 2",
    "model/erase/transformer/config.json num_attention_heads = 1000000",
    "model/erase/text_encoder/config.json num_hidden_layers = 2",
    "model/erase/model_index.json tokenizer = ['own_module', 'Evil']",
    "model/sharpen/classes.json nested without end",
    "adapter/sample/one NaN",
    "adapter/load_adapter/a half missing",
    "adapter/load_adapter/two ranks",
    "data/sharpen/an image a header of 60,000 x 60,000",
    "configs/erase/5 GB",
    "configs/erase/tables nested without end",
    "huge/erase/resolution",
    "huge/erase/batch",
    "huge/align/rollouts",
    "huge/erase/rank",
    "settings/edit/--threads '1000000000000000000000000000000'",
)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def test_there_are_many_and_no_two_are_alike():
    assert len(CASES) == len(list(corpus.cases())) >= 500
    commands = collections.Counter(name.split("/")[1] for name in CASES)
    assert {"erase", "align", "edit", "distill", "sharpen", "sample", "export", "demo", "plan"} <= commands.keys()


@pytest.mark.parametrize("name", SOME)
def test_it_is_refused_in_one_sentence_that_names_it(name, bases):
    assert ask(CASES[name], bases).fault == ""


@pytest.mark.parametrize("name", combined.PLACES)
def test_any_combination_of_settings_runs_two_steps_or_is_refused_in_a_sentence(name):
    assert sum(combined.attempts(name, 3).values()) >= 3


def test_what_falls_through_a_combination_is_found(monkeypatch):
    def broken(*given: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(combined.verb, "train", broken)
    with pytest.raises(AssertionError, match=r"erase \{'lr': 0.5\}: ZeroDivisionError: division by zero"):
        combined.attempt("erase", {"lr": 0.5})
    assert combined.attempt("erase", {"lr": 0.0}) == "lr=0.0 must be above 0"
    assert combined.attempt("erase", {"window": (3, 4)}).startswith("window")


def test_what_is_no_refusal_is_found(bases):
    def raises(place: pathlib.Path, bases: Bases) -> object:
        return lambda: (place / "left").write_text("x")

    assert ask(Case("a", lambda place, bases: ["--version"], ""), bases).fault == "ends with 0"
    assert ask(Case("b", lambda place, bases: ["erasse"], "another"), bases).fault.startswith(
        "is refused in a sentence"
    )
    assert ask(Case("c", raises, ""), bases).fault == "ends with 0"
