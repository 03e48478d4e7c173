"""The loop: exact resume after every kind of end, schedules, clipping, averages, and failures that spoil nothing."""

from __future__ import annotations

import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fieldsmith import checkpoints, disk, training
from fieldsmith.errors import InputError, NotFiniteError, RewardError
from fieldsmith.run import Run
from fieldsmith.training import Fit, Log, Optimisation, fit

PLAN = Optimisation(steps=20, lr=0.05, clip=1.0, ema=0.9, cosine=True, warmup=4, checkpoint_every=5, seed=3)


def fresh() -> dict[str, Tensor]:
    return {
        "a.weight": torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_(True),
        "b": torch.tensor([0.5, -0.5]).requires_grad_(True),
    }


def noisy(parameters: dict[str, Tensor], before: Callable[[int], None] = lambda step: None) -> training.Losses:
    """Random least squares in two chunks, with dropout; `before(step)` may break the step off halfway."""

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        x = torch.randn(4, 3, generator=generator)
        yield (torch.nn.functional.dropout(x, 0.5) @ parameters["a.weight"].T - 1).square().mean()
        before(step)
        yield (parameters["b"] - torch.randn(2, generator=generator)).square().sum()
        log["drawn"] = float(x[0, 0])

    return losses


def quadratic(parameters: dict[str, Tensor]) -> training.Losses:
    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield sum((p.square().sum() for p in parameters.values()), torch.zeros(()))

    return losses


def begun(folder: pathlib.Path) -> Run:
    run = Run(folder, "test", {"setting": 1})
    run.begin()
    return run


def trained(folder: pathlib.Path, plan: Optimisation = PLAN, before: Callable[[int], None] = lambda step: None) -> Fit:
    parameters = fresh()
    return fit(parameters, noisy(parameters, before), plan, begun(folder))


def left_behind(folder: pathlib.Path) -> dict[str, object]:
    """All that a run wrote about its training, tensors as exact lists."""
    *_, last = sorted((folder / "checkpoints").iterdir())
    tensors = {
        f"{file.name}/{k}": v.tolist() for file in last.glob("*.safetensors") for k, v in load_file(file).items()
    }
    return {"name": last.name, "metrics": (folder / "metrics.jsonl").read_text(), **tensors}


def raise_at(step_of_error: int, error: BaseException) -> Callable[[int], None]:
    def before(step: int) -> None:
        if step == step_of_error:
            raise error

    return before


# resume


@pytest.fixture
def uninterrupted(tmp_path: pathlib.Path) -> dict[str, object]:
    assert trained(tmp_path / "whole").steps == 20
    return left_behind(tmp_path / "whole")


def test_an_interrupted_run_resumes_to_the_last_bit(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", before=raise_at(13, KeyboardInterrupt()))
    assert left_behind(tmp_path / "cut")["name"] == "step-00000013"
    trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_a_killed_run_resumes_to_the_last_bit(tmp_path, uninterrupted):
    script = f"""
import os, pathlib, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from test_training import trained
trained(pathlib.Path({str(tmp_path / "killed")!r}), before=lambda step: os._exit(9) if step == 13 else None)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 9
    assert left_behind(tmp_path / "killed")["name"] == "step-00000010"
    trained(tmp_path / "killed")
    assert left_behind(tmp_path / "killed") == uninterrupted


def test_an_interrupt_in_the_middle_of_an_update_is_not_saved(tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        step = torch.optim.AdamW.step
        calls = []

        def half_done(self, *args):
            calls.append(step(self, *args))
            if len(calls) == 14:
                raise KeyboardInterrupt

        patch.setattr(torch.optim.AdamW, "step", half_done)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut")["name"] == "step-00000010"
    trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", before=raise_at(13, KeyboardInterrupt()))
    half = tmp_path / "cut" / "checkpoints" / ".step-00000015.1"
    half.mkdir()
    (half / checkpoints.FILE).write_bytes(b"cut")
    trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_a_finished_run_does_no_further_step(tmp_path, uninterrupted):
    def never(step: int) -> None:
        raise AssertionError(step)

    assert trained(tmp_path / "whole", before=never).steps == 20
    assert left_behind(tmp_path / "whole") == uninterrupted


def test_a_stop_rule_ends_the_run_and_is_remembered(tmp_path):
    for _ in range(2):  # the second time it resumes
        parameters = fresh()
        stop = lambda done, log: "enough" if done == 7 else None  # noqa: E731
        result = fit(parameters, noisy(parameters), PLAN, begun(tmp_path / "run"), stop)
        assert (result.steps, result.stopped) == (7, "enough")


def test_dropout_follows_the_seed_and_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    trained(tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    trained(tmp_path / "two")
    assert left_behind(tmp_path / "one") == left_behind(tmp_path / "two")


def test_another_seed_draws_other_numbers(tmp_path):
    trained(tmp_path / "one")
    trained(tmp_path / "two", replace(PLAN, seed=4))
    assert left_behind(tmp_path / "one") != left_behind(tmp_path / "two")


# how parameters move


def test_without_frills_it_is_torchs_adamw():
    ours, theirs = fresh(), fresh()
    fit(ours, quadratic(ours), Optimisation(steps=6, lr=0.1, weight_decay=0.2))
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.2)
    for _ in range(6):
        optimizer.zero_grad()
        sum(p.square().sum() for p in theirs.values()).backward()
        optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_chunks_add_up_to_one_loss():
    whole, chunked = fresh(), fresh()
    plan = Optimisation(steps=5, lr=0.1, clip=0.5)

    def in_chunks(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        for p in chunked.values():
            for number in p.flatten():
                yield number**2

    fit(whole, quadratic(whole), plan)
    fit(chunked, in_chunks, plan)
    torch.testing.assert_close(whole, chunked)


def gradients_of(clip: float | None) -> tuple[Tensor, float]:
    """The gradient left after one step of a loss of slope (30, 40), and the norm that was logged."""
    p = torch.zeros(2, requires_grad=True)
    logs = []

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield (p * torch.tensor([30.0, 40.0])).sum()

    fit({"p": p}, losses, Optimisation(1, 1e-3, clip=clip), stop=lambda done, log: logs.append(log))
    return p.grad, logs[0]["gradient_norm"]


def test_clipping_scales_the_gradient_to_its_largest_norm_and_logs_the_true_one():
    gradient, logged = gradients_of(clip=1.0)
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)
    assert logged == pytest.approx(50.0)


def test_without_clipping_the_gradient_is_untouched():
    torch.testing.assert_close(gradients_of(clip=None)[0], torch.tensor([30.0, 40.0]))


def learning_rates(plan: Optimisation, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), step(self, *a))[1]
    )
    parameters = fresh()
    fit(parameters, quadratic(parameters), plan)
    return seen


def test_warm_up_is_linear(monkeypatch):
    seen = learning_rates(Optimisation(steps=6, lr=0.4, warmup=4), monkeypatch)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_falls_from_the_rate_towards_zero(monkeypatch):
    seen = learning_rates(Optimisation(steps=8, lr=0.4, cosine=True), monkeypatch)
    assert seen == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])


def test_the_average_of_a_constant_is_the_constant():
    p = torch.tensor([1.0, -2.0], requires_grad=True)

    def flat(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield (0 * p).sum()

    fit({"p": p}, flat, Optimisation(steps=10, lr=0.1, weight_decay=0.0, ema=0.99))
    assert p.tolist() == [1.0, -2.0]


def test_the_average_is_kept_and_has_a_short_memory_at_first():
    parameters, states = fresh(), []
    plan = Optimisation(steps=5, lr=0.1, ema=0.999)
    fit(parameters, quadratic(parameters), plan, stop=lambda done, log: states.append(parameters["b"].detach().clone()))
    average = fresh()["b"].detach()
    for k, state in enumerate(states):
        decay = min(0.999, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * state
    torch.testing.assert_close(parameters["b"].detach(), average)


# failures


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_moves(tmp_path, bad):
    parameters = fresh()
    seen: list[Tensor] = []

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        seen.append(parameters["b"].detach().clone())
        yield parameters["b"].sum() * (bad if step == 12 else 1.0)

    with pytest.raises(NotFiniteError) as caught:
        fit(parameters, losses, PLAN, begun(tmp_path / "run"), asked=lambda: ", at t=0.5 under 'cat'")
    assert str(caught.value).removeprefix("the loss became ").removeprefix("-") == (
        f"{bad}, at t=0.5 under 'cat', at step 12; the weights have diverged: begin in a new folder with a lower lr "
        f"than {PLAN.lr:g}; the last good checkpoint is '{tmp_path}/run/checkpoints/step-00000010'"
    )
    assert torch.equal(parameters["b"], seen[-1])
    assert left_behind(tmp_path / "run")["name"] == "step-00000010"  # at 12 the same loss would come again


def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_moves():
    p = torch.zeros(2, requires_grad=True)

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield p.sqrt().sum()  # 0, with slope infinity

    with pytest.raises(
        NotFiniteError, match=r"gradient of 'p' became inf, at step 0; no update was made yet.*float32$"
    ):
        fit({"p": p}, losses, Optimisation(1, 0.1))
    assert p.tolist() == [0.0, 0.0]


def test_weights_that_an_update_made_infinite_are_in_no_checkpoint(tmp_path):
    p = torch.ones(2, requires_grad=True)

    def losses(step: int, generator: torch.Generator, log: Log) -> Iterator[Tensor]:
        yield p.sum()  # a gradient of 1, and a step larger than float32 goes

    with pytest.raises(NotFiniteError, match=r"the weight 'p' holds -inf, at step 1; .*; there is no checkpoint yet$"):
        fit({"p": p}, losses, Optimisation(1, 1e39, weight_decay=0.0), begun(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_reward_that_fails_is_told_with_its_step_and_the_checkpoint_that_the_same_command_goes_on_from(tmp_path):
    sentence = (
        r"^step 13: judge gone; the last good checkpoint is '.*/step-00000013', and the same command goes on from it$"
    )
    with pytest.raises(RewardError, match=sentence):
        trained(tmp_path / "cut", before=raise_at(13, RewardError("judge gone")))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("os error 28")])
def test_a_full_disk_leaves_the_older_checkpoint_and_no_half_of_a_new_one(tmp_path, monkeypatch, uninterrupted, error):
    save = checkpoints.save_file

    def full(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
        if "00000010" in str(path):
            raise error
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="28"):
            trained(tmp_path / "full")
    assert left_behind(tmp_path / "full")["name"] == "step-00000005"  # and nothing beside it
    trained(tmp_path / "full")
    assert left_behind(tmp_path / "full") == uninterrupted


# damage


def of_two(folder: pathlib.Path) -> list[pathlib.Path]:
    """A run that was interrupted at step 13, with its two checkpoints."""
    with pytest.raises(KeyboardInterrupt):
        trained(folder, before=raise_at(13, KeyboardInterrupt()))
    older, newer = sorted((folder / "checkpoints").iterdir())
    assert (older.name, newer.name) == ("step-00000010", "step-00000013")
    return [older, newer]


def flip(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "a flipped bit": lambda folder: flip(folder / checkpoints.FILE, -2),
    "cut short": lambda folder: os.truncate(folder / checkpoints.FILE, 700),
    "empty": lambda folder: os.truncate(folder / checkpoints.FILE, 0),
    "gone": lambda folder: (folder / checkpoints.FILE).unlink(),
    "another file in its place": lambda folder: (folder / checkpoints.FILE).write_text("words"),
    "a flipped bit of the state": lambda folder: flip(folder / checkpoints.STATE, 9),
    "no state": lambda folder: (folder / checkpoints.STATE).unlink(),
    "half a state": lambda folder: os.truncate(folder / checkpoints.STATE, 20),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, uninterrupted, capsys, damage):
    _, newer = of_two(tmp_path / "cut")
    damage(newer)
    capsys.readouterr()
    seen: list[int] = []
    trained(tmp_path / "cut", before=seen.append)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newer}/" in line and line.endswith("going on from 'step-00000010'")
    assert seen[0] == 10 and left_behind(tmp_path / "cut") == uninterrupted
    assert all(checkpoints.damage_of(folder) is None for folder in (tmp_path / "cut" / "checkpoints").iterdir())


def test_where_all_are_damaged_the_files_are_named_and_nothing_is_changed(tmp_path):
    for folder in of_two(tmp_path / "cut"):
        flip(folder / checkpoints.FILE, -2)
    before = (tmp_path / "cut" / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"step-00000013/model.*is damaged; .*step-00000010/model.*; restore one"):
        trained(tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 2
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == before


def test_a_checkpoint_without_checksums_is_taken(tmp_path, uninterrupted):
    """Those of fieldsmith 0.2.0."""
    _, newer = of_two(tmp_path / "cut")
    (newer / checkpoints.STATE).write_text('{"done": 13, "stopped": null}')
    trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_a_log_that_lacks_steps_before_the_checkpoint_is_refused(tmp_path):
    of_two(tmp_path / "cut")
    log = tmp_path / "cut" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:8]))
    with pytest.raises(InputError, match="ends at step 7, but the checkpoint is of 13 steps"):
        trained(tmp_path / "cut")


def test_everything_is_synced_before_it_takes_its_name_and_so_is_the_folder(tmp_path, monkeypatch):
    done: list[tuple[str, str]] = []
    real_sync, real_replace = disk.sync, os.replace
    monkeypatch.setattr(disk, "sync", lambda path: (done.append(("sync", path.name)), real_sync(path))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("name", b.name)), real_replace(a, b))[1])
    parameters = fresh()
    fit(parameters, noisy(parameters), replace(PLAN, steps=1), begun(tmp_path / "run"))
    done = done[-8:]
    named = done.index(("name", "step-00000001"))
    assert {("sync", checkpoints.FILE), ("sync", checkpoints.STATE), ("sync", "metrics.jsonl")} <= set(done[:named])
    assert done[named + 1] == ("sync", "checkpoints")


# signals


def signalled(folder: pathlib.Path, block: int, signals: list[int], slow: float = 0.3) -> tuple[int, float, str]:
    """Exit code, seconds from the first signal to the end, and the newest checkpoint of a run whose steps take a
    while; signals come in the middle of steps."""
    told, hears = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        os.close(told)
        try:
            trained(
                folder,
                replace(PLAN, block=block),
                lambda step: (os.write(hears, b"x"), time.sleep(slow * (step > 5)))[1],
            )
            code = 0
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    os.close(hears)
    for _ in range(7):
        os.read(told, 1)
    began = time.monotonic()
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - began
    return code, seconds, max(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, uninterrupted, number):
    assert signalled(tmp_path / "cut", 1, [number], 0.1)[::2] == (130, "step-00000007")
    trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_steps_that_share_a_collection_are_finished_together(tmp_path, uninterrupted):
    """A checkpoint between them could not be gone on from."""
    assert signalled(tmp_path / "cut", 5, [signal.SIGINT], 0.1)[::2] == (130, "step-00000010")
    trained(tmp_path / "cut", replace(PLAN, block=5))
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_good(tmp_path, uninterrupted):
    code, seconds, last = signalled(tmp_path / "cut", 1, [signal.SIGINT, signal.SIGINT], 1.0)
    assert (code, last) == (130, "step-00000005") and seconds < 0.8
    trained(tmp_path / "cut")
    assert left_behind(tmp_path / "cut") == uninterrupted


def test_a_run_that_writes_nothing_hears_signals_as_python_does():
    parameters, handlers = fresh(), []
    fit(
        parameters,
        noisy(parameters, lambda step: handlers.append(signal.getsignal(signal.SIGINT))),
        replace(PLAN, steps=1),
    )
    assert handlers == [signal.getsignal(signal.SIGINT)]
