"""What several processes and one process both run: each verb's loop on tiny models; the losses and weights it came to.

`python several.py OUT.json [fsdp]`, in each of the processes.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import trained

from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith import processes, verb
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.models.core import Model
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.unet import UNet
from fieldsmith.rewards import Reward
from fieldsmith.rewards.sessions import Exact
from fieldsmith.run import Run
from fieldsmith.worlds.scenes import VOCABULARY, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

WORDS = ("a", "red", "blue", "square", "circle")
SMALL = {"layers": 1, "single_layers": 1, "heads": 1}


def flux() -> Flux:
    return Flux(flux_pipeline(WORDS, **SMALL), "tiny")  # type: ignore[arg-type]


def erase(run: Run) -> tuple[Model, int]:
    model = flux()
    config = EraseConfig(
        targets=("red circle",), anchors=("blue square",), steps=3, window=(0, 2), batch=3, budget=18, rank=2, chunk=4,
        rollout_guidance=2.0, dropout=0.0,
    )  # fmt: skip
    with model.count_nfe() as nfe:
        trained.erase(model, config, run)
    return model, nfe.total


def align(run: Run, **settings: Any) -> tuple[Model, int]:
    """Groups of three rollouts, which two processes cannot share evenly."""
    model = flux()
    config = AlignConfig(
        prompts=("red circle", "blue square", "a"), prompts_per_epoch=3, rollouts=3, steps=3, epochs=2, updates=1,
        rank=2, chunk=4, **settings,
    )  # fmt: skip
    reward = Reward("brightness", True, lambda images, prompts: images.mean((1, 2, 3)))
    _, done = verb.train(ALIGN, model, config, Inputs(reward), run)
    return model, done.nfe


def edit(run: Run) -> tuple[Model, int]:
    model = FluxKontext(kontext_pipeline(VOCABULARY, size=24, vae_channels=(8, 8, 8), latent_channels=4, text_length=10,
                                         **SMALL), "tiny")  # type: ignore[arg-type]  # fmt: skip
    config = EditConfig(epochs=2, groups=1, rollouts=3, turns=2, steps=2, updates=1, rank=2, chunk=2, max_mean=1.0,
                        identity=0.1, min_spread=0.0)  # fmt: skip
    world, asked = ScenesWorld(24), []

    def judge(*shown: Any) -> Any:
        asked.append(processes.rank())
        return Exact(config.against)(*shown)

    inputs = EditInputs(lambda n, seed, turns: world.sessions(n, turns, seed, 0.5), judge, Channel())
    with model.count_nfe() as nfe:
        trained.edit(model, config, inputs, run)
    assert bool(asked) == processes.is_main()  # a judge is asked by one process
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
    "align, zeroth order": lambda run: align(run, estimator="reverse-noise", kl=0.1),
    "align, first order": lambda run: align(run, estimator="tweedie"),
    "align, adjoint": lambda run: align(run, estimator="adjoint"),
    "align, pathwise": lambda run: align(run, estimator="pathwise", truncate=1),
    "edit": edit,
    "distill": distill,
    "distill, features": lambda run: distill(run, objective="fitnets"),
    "sharpen": lambda run: sharpen(run, method="variance-penalty"),
    "sharpen, jacobian": lambda run: sharpen(run, method="jacobian-match"),
}
ADAPTERS = ("erase", "edit")  # what FSDP is tried on


def main(out: pathlib.Path, some: tuple[str, ...]) -> None:
    logging.disable()
    torch.set_num_threads(1)
    processes.begin()
    found: dict[str, Any] = {"processes": processes.count(), "sharded": processes.sharded()}
    shared = pathlib.Path(os.environ.get("RUNS", tempfile.mkdtemp()))
    for name in some:
        run = Run(shared / name.replace(", ", "-"), name, {"name": name})
        model, nfe = VERBS[name](run)
        spec = model.spec is not None
        state = model.adapter_state() if spec else {k: p.detach() for k, p in model.network.named_parameters()}
        found[name] = {
            "history": run.history(),
            "weights": {key: float(value.double().norm()) for key, value in state.items()},
            "forwards": nfe,
        }
    if processes.is_main():
        out.write_text(json.dumps(found))
    processes.wait()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), tuple(sys.argv[2].split(";")) if len(sys.argv) > 2 else tuple(VERBS))
