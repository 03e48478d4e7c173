"""What a run takes until its first step: imports, the model's loading, preparation and preflight; CPU seconds.

The run is a process of its own (`python -m benchmarks.startup`), so that its imports count. What the networks' own
calls take in there is told apart, since it grows with the model and the rest does not.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Startup:
    """Seconds; `networks` is a part of `preparing`."""

    importing: float
    loading: float
    preparing: float
    networks: float

    @property
    def own(self) -> float:
        """What is not the networks'."""
        return self.importing + self.loading + self.preparing - self.networks


def measure(rounds: int = 3) -> Startup:
    """The fastest of several starts: others were disturbed."""
    found = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-m", "benchmarks.startup"], check=True, capture_output=True, text=True)
        found.append(Startup(**json.loads(done.stdout.splitlines()[-1])))
    return min(found, key=lambda one: one.own)


def timed(owner: Any, name: str, into: list[float]) -> None:
    """Add the seconds of every outermost call of a function to a list."""
    original, depth = getattr(owner, name), 0

    def timing(*arguments: Any, **named: Any) -> Any:
        nonlocal depth
        began, depth = time.process_time(), depth + 1
        try:
            return original(*arguments, **named)
        finally:
            depth -= 1
            if not depth:
                into.append(time.process_time() - began)

    setattr(owner, name, timing)


def start() -> Startup:
    """An erase run on the zoo's model up to its first step, in this process, which has imported nothing yet."""
    began = time.process_time()
    # here, because importing is what is measured
    import torch

    from fieldsmith import verb
    from fieldsmith.methods.erase.config import EraseConfig
    from fieldsmith.methods.erase.step import Inputs
    from fieldsmith.methods.erase.verb import ERASE
    from fieldsmith.models import flux as _family  # noqa: F401  (load would import it)
    from fieldsmith.models import load

    torch.set_num_threads(1)
    imported = time.process_time()
    model = load("zoo:shapes-flux")
    loaded = time.process_time()
    networks: list[float] = []
    pipeline: Any = model.pipeline
    for part in (model.network, pipeline.text_encoder, pipeline.text_encoder_2):
        timed(part, "forward", networks)
    for name in ("encode", "decode"):
        timed(pipeline.vae, name, networks)
    timed(torch.Tensor, "backward", networks)
    config = EraseConfig.preset_of("tiny", None, {}).replace(targets=("circle",), anchors=("square",))
    ready: list[float] = []

    def callback(done: int, log: dict[str, float]) -> str:
        ready.append(time.process_time())
        ready.append(sum(networks))
        return "the first step is not timed"

    verb.train(ERASE, model, config, Inputs(), callback=callback)
    return Startup(imported - began, loaded - imported, ready[0] - loaded, ready[1])


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(start())))
