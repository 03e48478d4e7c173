"""Any combination of settings: two steps on a model of 4 pixels, or one sentence.

`python -m benchmarks.malformed.combined 200` tries so many of each verb. What is drawn follows from each field's type
and bounds, small where a number costs time, so that a new field is tried as soon as it is there.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import hypothesis
import torch
from hypothesis import strategies as st
from PIL import Image

from benchmarks.malformed.case import TWO
from experiments.tiny import flux_pipeline, kontext_pipeline, unet_pipeline
from fieldsmith import planning, verb
from fieldsmith.errors import InputError, RunError
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.distill.bank import Source
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs as DistillInputs
from fieldsmith.methods.edit.config import EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Inputs as SharpenInputs
from fieldsmith.models.flux import Flux
from fieldsmith.models.flux_kontext import FluxKontext
from fieldsmith.models.unet import UNet
from fieldsmith.planning import Judged, Scores
from fieldsmith.sessions import UserSessions, frame_of
from fieldsmith.worlds.scenes_judge import Channel

WORDS = ("a", "red", "blue", "square", "circle")
SIDE, STEPS = 4, 2
MOST = 4  # of whole numbers: loops, batches and ranks cost time
# what names files, servers and packages, compiles for a minute, or is the record's alone: benchmarks.malformed tries it
LEFT = {
    "out", "model", "teacher", "adapter", "config_from", "continue_from", "log_with", "compile", "optimizer", "data",
    "judge", "reward", "pairs", "prompts", "held_out_rewards", "sessions", "student", "extractor", "bank_folder",
    "targets", "anchors", "keep", "templates", "neighbours", "resolution", "threads", "preset", "seed", "against",
    "background", "identity_prompt", "guide_size", "shrink", "evaluate", "samples", "previews",
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "vae_channels": (8, 8), "latent_channels": 4, "layers": 1, "single_layers": 1, "heads": 1, "text_width": 32,
    "size": SIDE,
}  # fmt: skip


def _sessions(config: EditConfig) -> EditInputs:
    judged = Judged()
    image = Image.new("RGB", (SIDE, SIDE), "red")
    rows = [{"image": image, "instructions": ["red circle"] * config.turns}] * 2
    sessions = UserSessions.of(rows, frame_of(SIDE, config.fit, config.background), False)

    def judge(sessions: Any, turn: int, before: Any, after: Any, first: Any) -> Scores:
        following = judged.numbers(after)
        return Scores(following, following.flip(0))

    return EditInputs(sessions.sample, judge, Channel(config.contrast, config.blur, config.noise))


def _states() -> torch.Tensor:
    return torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def _unet(width: int = 8, learned: bool = True) -> UNet:
    pipeline = unet_pipeline(
        size=SIDE, widths=(width, width), attention=False, class_rows=3, learned_variance=learned, train_times=20
    )
    return UNet(pipeline, "tiny", classes=("cat", "dog"))


@dataclasses.dataclass(frozen=True)
class Place:
    """A verb on a model of 4 pixels: a config that runs, the model, what the run is given."""

    config: Any
    model: Callable[[], Any]
    inputs: Callable[[Any], Any]


PLACES: dict[str, Place] = {
    "align": Place(
        AlignConfig.preset_of("flow-grpo", None, {}).replace(
            prompts=("red circle", "blue square"), reward="brightness", steps=2, epochs=2, prompts_per_epoch=2,
            rollouts=2, rank=2, evaluate=0, previews=0,
        ),
        lambda: Flux(flux_pipeline(WORDS, **SHAPE), "tiny"),
        lambda config: AlignInputs(Judged().load("brightness")),
    ),
    "distill": Place(
        DistillConfig(steps=STEPS, batch=4, bank=0, warmup=0, evaluate=0, previews=0),
        lambda: _unet(16, False),
        lambda config: DistillInputs(
            source=Source(_states(), torch.arange(8) % 2, ("cat", "dog")), student=_unet(8, False)
        ),
    ),
    "edit": Place(
        EditConfig(
            epochs=2, groups=2, rollouts=2, turns=2, steps=2, rank=2, sessions="given:2", judge="function:any",
            sources="own", max_mean=1.0, min_spread=0.0, evaluate=0, identity_prompt="red", previews=0,
        ),
        lambda: FluxKontext(kontext_pipeline(WORDS, **SHAPE), "tiny"),
        _sessions,
    ),
    "erase": Place(
        EraseConfig(
            targets=("red circle",), anchors=("blue circle",), keep=(), steps=2, window=(0, 1), budget=8, batch=2,
            rank=2, evaluate=0, previews=0,
        ),
        lambda: Flux(flux_pipeline(WORDS, **SHAPE), "tiny"),
        lambda config: EraseInputs(),
    ),
    "sharpen": Place(
        SharpenConfig(method="plain", steps=STEPS, batch=4, warmup=0, samples=0, guide_size=1.5, previews=0),
        _unet,
        lambda config: SharpenInputs(states=_states()),
    ),
}  # fmt: skip


def values(annotation: Any, metadata: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values that a field of this type may have, by its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return values(annotation.__origin__, (*metadata, *annotation.__metadata__))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values(one, metadata) for one in arguments])
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if origin is tuple:
        of = arguments[0]
        size = (
            {"max_size": 2} if arguments[-1] is Ellipsis else {"min_size": len(arguments), "max_size": len(arguments)}
        )
        return st.lists(values(of), **size).map(tuple)
    if annotation is int:
        low, high, _, _ = _bounds(metadata)
        return st.integers(int(low), max(int(low), int(min(high, MOST))))
    if annotation is float:
        low, high, above, below = _bounds(metadata)
        some = st.sampled_from([0.0, 1e-6, 0.1, 0.5, 1.0, 1.5, 5.0, 1e6, -1.0])
        return some.filter(lambda x: low <= x <= high and x not in (above, below))
    return st.text(max_size=3)


def _bounds(metadata: tuple[Any, ...]) -> tuple[float, float, float | None, float | None]:
    low, high, above, below = -1.0, float("inf"), None, None
    for one in (part for given in metadata for part in (getattr(given, "metadata", None) or [given])):
        match one:
            case annotated_types.Ge(ge=x):
                low = float(x)  # type: ignore[arg-type]
            case annotated_types.Gt(gt=x):
                low = above = float(x)  # type: ignore[arg-type]
            case annotated_types.Le(le=x):
                high = float(x)  # type: ignore[arg-type]
            case annotated_types.Lt(lt=x):
                high = below = float(x)  # type: ignore[arg-type]
    return low, high, above, below


@functools.cache
def changes(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Some of a verb's settings with other values than its runnable config has."""
    fields = type(PLACES[name].config).__pydantic_fields__
    known = {field: values(one.annotation, tuple(one.metadata)) for field, one in fields.items() if field not in LEFT}
    names = st.lists(st.sampled_from(sorted(known)), max_size=5, unique=True)
    return names.flatmap(lambda some: st.fixed_dictionaries({field: known[field] for field in some}))


def attempt(name: str, changed: dict[str, Any]) -> str:
    """'ran', or the sentence by which it was refused. Raises what falls through: any other error, or two sentences."""
    place = PLACES[name]
    try:
        config = place.config.replace(**changed)
        verb.check_memory(planning.INPUTS[name][0], config)
        config.check()
        verb.train(
            planning.INPUTS[name][0], place.model(), config, place.inputs(config), None,
            lambda done, log: "enough" if done >= STEPS else None,
        )  # fmt: skip
    except (InputError, RunError) as error:
        if "\n" in str(error) or TWO.search(str(error)) or "defect of fieldsmith" in str(error):
            raise AssertionError(f"{name} {changed}: {error}") from error
        return str(error)
    except Exception as error:
        raise AssertionError(f"{name} {changed}: {type(error).__name__}: {error}") from error
    return "ran"


def attempts(name: str, n: int) -> collections.Counter[str]:
    """So many combinations of a verb's settings, the same each time; how many ran, and how many were refused."""
    counts: collections.Counter[str] = collections.Counter()
    whole = attempt(name, {})
    if whole != "ran":
        raise AssertionError(f"{name} as it is: {whole}")

    @hypothesis.settings(
        max_examples=n, deadline=None, database=None, derandomize=True, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(changes(name))
    def each(changed: dict[str, Any]) -> None:
        counts["ran" if attempt(name, changed) == "ran" else "refused"] += 1

    each()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.malformed.combined", description=__doc__)
    parser.add_argument("n", type=int, nargs="?", default=100, help="combinations of each verb")
    parser.add_argument("--only", nargs="*", choices=PLACES, default=tuple(PLACES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    fell = 0
    for name in asked.only:
        try:
            print(name, dict(attempts(name, asked.n)), flush=True)
        except AssertionError as error:
            fell += 1
            print(f"fell through: {error}", flush=True)
    return min(fell, 1)


if __name__ == "__main__":
    sys.exit(main())
