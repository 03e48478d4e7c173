"""A finished run measured again, or for the first time where a judge failed: with other judges, without training.

In: a run directory with its newest checkpoint. Out: the same with metrics.json and page anew; weights stay as they are.
"""

from __future__ import annotations

import pathlib
from typing import Any

from rich.console import Console

from fieldsmith import checkpoints, owner, processes, verb
from fieldsmith.errors import InputError
from fieldsmith.result import Result
from fieldsmith.run import Run
from fieldsmith.training import Fit
from fieldsmith.verb import Verb

# the settings of each verb that only say how its run is measured
MEASURES = {
    "align": ("held_out_rewards", "evaluate"),
    "distill": ("evaluate",),
    "edit": ("judge", "evaluate", "evaluate_turns", "evaluate_steps", "still"),
    "erase": (
        "judge",
        "neighbours",
        "synonyms",
        "evaluate",
        "attacks",
        "attack_steps",
        "attack_images",
        "attack_prompts",
    ),
    "sharpen": ("judge", "samples"),
}


def check(name: str, changes: dict[str, Any]) -> None:
    """Raises InputError at a setting that would have trained something else."""
    for field in changes:
        if field not in MEASURES[name]:
            can = ", ".join(MEASURES[name])
            raise InputError(f"{field} is a setting of training; of a run of {name} measuring can change {can}")


def measure(of: Verb, began: Any, config: Any, inputs: Any, folder: pathlib.Path) -> Result:
    """The run's weights measured as `config` says, which differs from the config that it `began` with in that alone.

    Raises InputError where the run is not finished or its checkpoints are gone, and as preparing it does.
    """
    old = Result.open(folder).metrics
    console = Console(stderr=True)
    with processes.together():
        run = Run(folder, of.name, began)
    run.compare(verb.weights_of(of, config))
    if processes.is_main():
        owner.take(folder)
    try:
        job = verb.job_of(of, verb.load_model(of, config, inputs), config, inputs)
        with job.model.uncounted():
            if job.parameters:
                done = checkpoints.restore(run, job.parameters, bool(job.optimisation.ema))
                if done != old["steps"]:
                    raise InputError(f"'{folder}' has no checkpoint of its last step, {old['steps']}; measure needs it")
            job.begin()
        if note := job.note():
            console.print(note)
        stopped = Fit(old["steps"], old["seconds"], old["stopped"])
        told = {"seconds", "steps", "stopped", "adapter", *job.cost(stopped, old["nfe"]), *job.facts()}
        metrics = {name: value for name, value in old.items() if name in told}
        changed = {name: value for name, value in vars(config).items() if value != getattr(began, name)}
        return verb.measured(of, config, job, metrics | ({"measured with": changed} if changed else {}), run, console)
    finally:
        run.end()
