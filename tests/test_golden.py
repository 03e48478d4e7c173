"""What the project computes is what tests/golden has frozen: the quick parts; `python -m tests.golden` has them all."""

from __future__ import annotations

import pytest

from tests.golden import parts


@pytest.mark.parametrize("verb", parts.VERBS)
def test_flags_and_their_defaults_stay(verb: str) -> None:
    assert not parts.check("flags", (verb,))


def test_presets_give_the_same_settings() -> None:
    assert not parts.check("presets")


def test_every_loop_comes_to_the_same_losses_and_weights() -> None:
    assert not parts.check("several")


def test_a_run_ships_the_same_weights_and_numbers() -> None:
    """Both parts look at the same runs, which are made once in a process: two tests may be two processes'."""
    assert not [difference for part in ("train", "keys") for difference in parts.check(part, parts.QUICK)]


def test_committed_runs_give_the_committed_summary() -> None:
    assert not parts.check("results", ("erase",))


def test_differences_are_seen() -> None:
    one = {"a": [1.0, 2.0], "b": {"c": "x"}}
    assert not parts.differences(one, {"a": [1.0, 2.00001], "b": {"c": "x"}}, 1e-4)
    assert parts.differences(one, {"a": [1.0, 2.001], "b": {"c": "x"}}, 1e-4) == [" / a / 1: 2.001, not 2.0"]
    assert parts.differences(one, {"a": [1.0], "b": {}}) == [" / a: 1 entries, not 2", " / b / c: gone"]
    run = {"processor": "p", "weights": "0", "losses": [1.0], "metrics": {"n": 1}}
    assert not parts.compare_train({"r": run}, {"r": {**run, "processor": "q", "weights": "1"}})
    assert parts.compare_train({"r": run}, {"r": {**run, "weights": "1", "losses": [1.1]}}) == [
        "r: the weights differ", "r / loss / 0: 1.1, not 1.0",
    ]  # fmt: skip


def test_defaults_are_read_off_help_as_it_is_wrapped() -> None:
    text = """usage: x [-h]
    --preset NAME in the notes is no flag (default: here).
    ╭─ options ───────────────────────────────╮
    │ -h, --help         show this (default)  │
    │ --lr FLOAT         A rate (default: off │
    │                    the zoo, 2). (default: │
    │                    0.001)               │
    │ --full, --no-full                       │
    │                    All. (default: False) │
    │ --out PATH         Where. (required)    │
    ╰─────────────────────────────────────────╯"""
    lines = "\n".join(line.strip() for line in text.splitlines())
    assert parts.flags_of_help(lines) == {"--lr": "0.001", "--full": "False", "--out": "required"}
