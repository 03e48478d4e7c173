"""What several processes and one process both run: each verb's loop on tiny models; the losses and weights it came to.

Processes are forked from one that has imported all of this: torch and diffusers alone take ten seconds a process.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch import multiprocessing

from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith import cli, processes, verb
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.models import load
from fieldsmith.models.core import Model
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.unet import UNet
from fieldsmith.preferences import Preferences
from fieldsmith.rewards import Reward
from fieldsmith.rewards.sessions import Exact
from fieldsmith.run import Run
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel
from tests import trained

CONFIGS = pathlib.Path(__file__).parent.parent / "docs" / "accelerate"
WORDS = ("a", "red", "blue", "square", "circle")
SMALL = {"layers": 1, "single_layers": 1, "heads": 1}


def flux() -> Model:
    pipeline = flux_pipeline(WORDS, **SMALL)  # type: ignore[arg-type]
    if not processes.sharded():
        return Flux(pipeline, "tiny")
    folder = pathlib.Path(os.environ["RUNS"]) / "flux"
    if processes.is_main() and not folder.exists():
        pipeline.save_pretrained(folder)
    processes.wait()
    return load(folder)  # a part in every process


def erase(run: Run, **settings: Any) -> tuple[Model, int]:
    model = flux()
    config = EraseConfig(**{
        "targets": ("red circle",), "anchors": ("blue square",), "steps": 3, "window": (0, 2), "batch": 3, "budget": 18,
        "rank": 2, "chunk": 4, "rollout_guidance": 2.0, "dropout": 0.0, **settings,
    })  # fmt: skip
    with model.count_nfe() as nfe:
        trained.erase(model, config, run)
    return model, nfe.total


def align(run: Run, **settings: Any) -> tuple[Model, int]:
    """Groups of three rollouts, which two processes cannot share evenly."""
    model = flux()
    config = AlignConfig(**{
        "prompts": ("red circle", "blue square", "a"), "prompts_per_epoch": 3, "rollouts": 3, "steps": 3, "epochs": 2,
        "updates": 1, "rank": 2, "chunk": 4, **settings,
    })  # fmt: skip
    inputs = Inputs(Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3))))
    if config.pairs:
        images = model.decode(model.noise(6, torch.Generator().manual_seed(0)))
        inputs = Inputs(pairs=Preferences(config.prompts, images[:3], images[3:]))
    with model.count_nfe() as nfe:
        verb.train(ALIGN, model, config, inputs, run)
    return model, nfe.total


def edit(run: Run, **settings: Any) -> tuple[Model, int]:
    """Three groups, which two processes cannot share evenly."""
    model = FluxKontext(kontext_pipeline(VOCABULARY, size=24, vae_channels=(8, 8, 8), latent_channels=4, text_length=10,
                                         **SMALL), "tiny")  # type: ignore[arg-type]  # fmt: skip
    config = EditConfig(epochs=2, groups=3, rollouts=2, turns=2, steps=2, updates=1, rank=2, chunk=2, max_mean=1.0,
                        identity=0.1, min_spread=0.0, **settings)  # fmt: skip
    world, asked = ScenesWorld(24), []

    def judge(sessions: Any, *shown: Any) -> Any:
        asked.append(len(sessions))
        return Exact(config.against)(sessions, *shown)

    inputs = EditInputs(lambda n, seed, turns: world.sessions(n, turns, seed, 0.5), judge, Channel(noise=0.01))
    with model.count_nfe() as nfe:
        trained.edit(model, config, inputs, run)
    # a judge is asked of each image once, by the process that has it
    assert set(asked) == {len(processes.owned(3)) * 2} and len(asked) == 2 * 2
    return model, nfe.total


def distill(run: Run, **settings: Any) -> tuple[Model, int]:
    teacher, student = (
        UNet(unet_pipeline(class_rows=3, widths=widths), "tiny", classes=("cat", "dog"))
        for widths in ((16, 32), (8, 16))
    )
    states = torch.randn(16, *teacher.noise(1, torch.Generator().manual_seed(0)).shape[1:],
                         generator=torch.Generator().manual_seed(3))  # fmt: skip
    source = Source(states, torch.arange(16) % 2, ("cat", "dog"))
    config = DistillConfig(steps=2, batch=6, bank=0, curriculum="uniform", ema=0.0, **settings)
    with student.count_nfe() as nfe:
        trained.distill(teacher, student, source, config, run)
    return student, nfe.total


def sharpen(run: Run, **settings: Any) -> tuple[Model, int]:
    model = UNet(unet_pipeline(learned_variance=True), "tiny")
    states = torch.randn(16, *model.noise(1, torch.Generator().manual_seed(0)).shape[1:],
                         generator=torch.Generator().manual_seed(3))  # fmt: skip
    config = SharpenConfig(steps=2, batch=5, ema=0.0, **settings)
    with model.count_nfe() as nfe:
        trained.sharpen(model, states.clamp(-1, 1), config, run)
    return model, nfe.total


VERBS: dict[str, Callable[[Run], tuple[Model, int]]] = {
    "erase": erase,
    "erase, retain": lambda run: erase(run, retain=0.1),
    "align, zeroth order": lambda run: align(run, estimator="reverse-noise", kl=0.1),
    "align, branches": lambda run: align(run, rollout="branches", branches=(2, 0, 0), group_by="root", anchor=0.1),
    "align, nft": lambda run: align(run, estimator="nft", rollout="ode", advantage="global-std", old="ramp"),
    "align, awm": lambda run: align(run, estimator="awm", rollout="ode"),
    "align, balance": lambda run: align(run, estimator="balance", auxiliary="flow"),
    "align, terminal": lambda run: align(run, estimator="terminal", rollout="ode"),
    "align, first order": lambda run: align(run, estimator="tweedie"),
    "align, adjoint": lambda run: align(run, estimator="adjoint"),
    "align, pathwise": lambda run: align(run, estimator="pathwise", truncate=1),
    "align, dpo": lambda run: align(run, estimator="dpo", reward="", rollout="ode", pairs="given:3", renoise=2),
    "edit": edit,
    "edit, grpo": lambda run: edit(run, objective="grpo", steady=0.1),
    "distill": distill,
    "distill, features": lambda run: distill(run, objective="fitnets"),
    "sharpen": lambda run: sharpen(run, method="variance-penalty"),
    "sharpen, jacobian": lambda run: sharpen(run, method="jacobian-match"),
}
# what FSDP is tried on, which wants groups that its processes can share evenly
EVEN = {"prompts_per_epoch": 2}
SHARDED: dict[str, Callable[[Run], tuple[Model, int]]] = {
    "erase, lora": lambda run: erase(run, batch=4, budget=24),
    "align, lora": lambda run: align(run, estimator="nft", rollout="ode", **EVEN),
    "align, full": lambda run: align(run, estimator="reverse-noise", kl=0.1, full=True, subset="all", lr=1e-3, **EVEN),
}


# launches


def surroundings(config: str, count: int, *more: str) -> dict[str, str]:
    """The environment that `accelerate launch` gives its processes at one of the documentation's configs."""
    words = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(count), *more, "script.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    if not (args.multi_gpu or args.use_fsdp):
        return prepare_simple_launcher_cmd_env(args)[1]
    return {**prepare_multi_gpu_env(args), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(args.main_process_port)}  # fmt: skip


def launch(function: Callable[..., None], *given: Any, config: str = "", count: int = 1, **more: str) -> None:
    """`function(*given)` in so many processes, as accelerate would start them at a config; raises what any raised."""
    told = surroundings(config, count, "--main_process_port", "0") if config else {}
    multiprocessing.set_forkserver_preload(["tests.several"])
    multiprocessing.start_processes(
        _start, ({**told, **more}, bool(config), function, *given), count, start_method="forkserver"
    )


def _start(rank: int, told: dict[str, str], launched: bool, function: Callable[..., None], *given: Any) -> None:
    os.environ.update(told, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {}))
    torch.set_num_threads(1)
    function(*given)


def command(folder: pathlib.Path, words: Sequence[str]) -> None:
    """`fieldsmith WORDS` in a folder; what a process said goes to `err.RANK`, its exit code to `code.RANK`."""
    os.chdir(folder)
    with open(f"err.{processes.rank()}", "w") as err:
        os.dup2(err.fileno(), sys.__stderr__.fileno())
    sys.stderr = sys.__stderr__
    pathlib.Path(f"code.{processes.rank()}").write_text(str(cli.main(words)))


def dying(folder: pathlib.Path, words: Sequence[str]) -> None:
    """`command`, of which process 1 is killed once there is a checkpoint in `out`."""

    def watch() -> None:
        while not list((folder / "out" / "checkpoints").glob("step-*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    if processes.rank() == 1:
        threading.Thread(target=watch, daemon=True).start()
    command(folder, words)


def stream(out: pathlib.Path, small: pathlib.Path, large: pathlib.Path) -> None:
    """By how many bytes a process's memory grew at most while it loaded the large model, and that model's bytes."""
    processes.begin()
    load(small)  # so that all is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load(large)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    total = sum(p.numel() * p.element_size() for p in model.network.parameters())
    given = processes.exchange([peak, total])
    if processes.is_main():
        out.write_text(json.dumps(given))


def learn(out: pathlib.Path, some: Sequence[str], cut: bool = False, double: bool = False) -> None:
    """Runs by name; `cut` after their first step, in `double` precision."""
    logging.disable()
    if double:
        torch.set_default_dtype(torch.float64)
    processes.begin()
    found: dict[str, Any] = {"processes": processes.count(), "sharded": processes.sharded()}
    if cut:  # as if it were interrupted after the first step
        whole = verb.fit
        verb.fit = lambda parameters, losses, optimisation, *rest: whole(
            parameters, losses, dataclasses.replace(optimisation, steps=1), *rest
        )
    for name in some:
        run = Run(pathlib.Path(os.environ["RUNS"]) / name.replace(", ", "-"), name, {"name": name})
        model, nfe = {**VERBS, **SHARDED}[name](run)
        nfe = sum(processes.exchange(nfe))
        state = model.adapter_state() if model.spec is not None else dict(model.network.named_parameters())
        found[name] = {
            "history": run.history(),
            "weights": {key: float(processes.full(value.detach()).double().norm()) for key, value in state.items()},
            "forwards": nfe,
        }
    if processes.is_main():
        out.write_text(json.dumps(found))
    processes.wait()


if __name__ == "__main__":  # tests/golden: where it writes, and where its runs are
    os.environ["RUNS"] = sys.argv[2]
    learn(pathlib.Path(sys.argv[1]), [*VERBS])
