"""What each diagnosis is measured with, from the names that the user gives: models, data, worlds, rewards, judges.

In: the settings of `fieldsmith diagnose KIND`, where a name may be an object already. Out: `model` and what the
kind's `diagnosis` asks for by name. Raises InputError where a name is unknown, or two do not fit each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

import torch
from torch import Tensor

from fieldsmith.errors import InputError, check_word
from fieldsmith.measure import detect
from fieldsmith.measure.exposure import HELD_OUT
from fieldsmith.methods.align.audit import Truths
from fieldsmith.methods.sharpen.step import world_for
from fieldsmith.models import load, pipeline_folder
from fieldsmith.models.core import Model
from fieldsmith.models.editing import check_editor
from fieldsmith.models.exact import Exact
from fieldsmith.paths import RectifiedFlow
from fieldsmith.read import read_prompts
from fieldsmith.rewards import Reward
from fieldsmith.rewards import load as load_reward
from fieldsmith.rewards.edits import MODES, edit_judge
from fieldsmith.samplers import flow_grid
from fieldsmith.worlds import asked, catalogue, classes, scenes_judge
from fieldsmith.worlds.mixtures import triangle
from fieldsmith.worlds.model_cards import card_of, world_of
from fieldsmith.worlds.scenes import NOTHING, OPERATIONS, ScenesWorld
from fieldsmith.worlds.scenes_graded import graded

NAMED = ", ".join(classes.NAMED)
EXACT = ("world:triangle",)  # closed forms: the three Gaussians of the paper's toy under its linear reward
PROMPTS = 24  # at most, of a world's own, at which a reward is looked at
SCENES = 24  # pixels of the scenes that a judge of edits is asked about
SIZES = {"shapes": 32, "emoji": 48}  # of pictures that a judge of images is asked about


def model_of(config: Any, resolution: int | None = None) -> Model:
    """The model that a diagnosis is given, or the one that it names with its adapters."""
    given = config.model
    if isinstance(given, Model):
        if config.adapter:
            raise InputError(
                "adapter= goes with the name of a model; use load(name, adapter=...) for one that is loaded"
            )
        return given
    return load(str(given), resolution or config.resolution, adapter=config.adapter, config_from=config.config_from)


def _name(given: Any) -> str:
    return given.name if isinstance(given, Model) else str(given)


# guidance


def guidance(config: Any) -> dict[str, Any]:
    given = config.teacher
    student = model_of(config)
    teacher = given if isinstance(given, Model) else load(str(given), config.resolution)
    prompts = read_prompts(config.prompts)
    return {"model": student, "teacher": teacher, "prompts": prompts, "data": _classes(config, teacher)}


def _classes(config: Any, teacher: Model) -> Any:
    """The held-out data of a model of classes, None for one that reads text."""
    known: tuple[str, ...] = getattr(teacher, "classes", ())
    if not known:
        if config.data is not None:
            raise InputError(f"data '{config.data}' has classes, but {teacher.name} reads text; leave out --data")
        return None
    if config.data is None:
        raise InputError(f"no data given, and {teacher.name} has classes; add --data {NAMED} or a folder")
    data: Any = config.data
    if not isinstance(data, classes.Classes):
        channels, height, width = image_shape(teacher)
        if height != width:
            raise InputError(
                f"{teacher.name} draws {height} x {width} images, and data come square; give square models"
            )
        data = classes.load(data, height, channels, config.seed, config.fit, config.background)
    return data.in_order(known)


@torch.no_grad()
def image_shape(model: Model) -> tuple[int, int, int]:
    """Channels, height and width of a model's images."""
    _, channels, height, width = model.decode(model.noise(1, torch.Generator().manual_seed(0))).shape
    return channels, height, width


# smoothness


def smoothness(config: Any) -> dict[str, Any]:
    model = model_of(config)
    return {"model": model, "world": _judged_world(model, config)}


def _judged_world(model: Model, config: Any) -> Any:
    """The world that `data` or the model's card names, at the model's size; None where nothing does."""
    data = config.data
    if data is None:
        data = card_of(model.name).get("data")
        if data not in catalogue.WORLDS:
            return None
    if not isinstance(data, str):
        return world_for(model, data)
    return world_for(
        model,
        lambda channels, size, words: catalogue.load(
            data, size, config.judge, channels, config.fit, config.background, judged=True
        ),
    )


# exposure


def exposure(config: Any) -> dict[str, Any]:
    world = _scenes(config)
    seed = HELD_OUT + config.seed
    sessions = world.sessions(config.samples, config.turns, seed, config.dependency)
    model = model_of(config, world.size)
    check_editor(model)
    return {
        "model": model, "sessions": sessions, "judge": scenes_judge.judge, "sampling_seed": seed,
        "likeness": partial(scenes_judge.likeness, world), "operations": OPERATIONS, "nothing": NOTHING,
        "channel": scenes_judge.Channel(config.contrast, config.blur, config.noise),
    }  # fmt: skip


def _scenes(config: Any) -> ScenesWorld:
    """The world of sessions that the model's card names."""
    name = _name(config.model)
    pipeline_folder(name)  # a name that is no model at all is refused in its own words
    card = card_of(name)
    if card.get("world") != "scenes" or not isinstance(card.get("size"), int):
        raise InputError(
            f"'{name}' names no world whose planned images are known; `diagnose exposure` needs an editor with a "
            'card.json like {"world": "scenes", "size": 24}, such as zoo:scenes-kontext'
        )
    world = ScenesWorld(card["size"])
    if config.resolution not in (None, world.size):
        raise InputError(f"resolution={config.resolution}: {name} edits scenes of {world.size} pixels; leave it out")
    return world


# concepts


def concepts_of(config: Any) -> dict[str, Any]:
    name = _name(config.model)
    pipeline_folder(name)
    world = world_of(name)
    if world is None:
        raise InputError(
            f"no judge knows the images of '{name}': it has no card.json that names a world; use a zoo model"
        )
    concepts = world.erased(config.targets)
    targets = {  # each with the prompts that ask for it
        one: [*map(world.world.caption, world.groups(one, concepts)["target"]), *world.paraphrases(one)]
        for one in concepts
    }
    model = model_of(config)
    return {
        "model": model, "world": world.world, "concepts": world.concepts(), "groups": world.kinds(), "targets": targets
    }  # fmt: skip


# reward


def reward(config: Any) -> dict[str, Any]:
    name = _name(config.model)
    world = world_of(name)
    prompts = read_prompts(config.prompts)
    if not prompts and world:
        known = world.training_captions()
        prompts = known[:: -(-len(known) // PROMPTS)]
    if not prompts:
        raise InputError(f"'{name}' names no world with prompts of its own; add --prompts 'a prompt' 'another'")
    if config.beside is None and world is None:
        raise InputError(f"no judge knows the images of '{name}'; add --beside with a reward that you trust")
    beside = load_reward("right" if config.beside is None else config.beside, world)
    chased = load_reward(config.reward, world)
    if chased.name == beside.name:
        raise InputError(f"reward '{chased.name}' stands beside itself; add --beside with another that you trust")
    model = model_of(config)
    return {"model": model, "reward": chased, "beside": beside, "prompts": prompts}


# audit


def audit(config: Any) -> dict[str, Any]:
    name = _name(config.model)
    prompts = read_prompts(config.prompts)
    if name.startswith("world:"):
        check_word(name, EXACT, "audit's exact worlds")
        check_word(str(config.reward), ("linear",), f"the rewards of {name}")
        return _triangle(config)
    model = model_of(config)
    world = world_of(name)
    if not prompts and world:
        prompts = tuple(world.world.caption(concept) for concept in world.concepts())
    return {"model": model, "reward": load_reward(config.reward, world), "prompts": prompts}


def _triangle(config: Any) -> dict[str, Any]:
    """Three Gaussians under a linear reward, and what is known of them: grad E r and alpha grad V."""
    mixture, path, b = triangle(), RectifiedFlow(), torch.tensor([-0.5, 0.0], dtype=torch.float64)

    def pulled(x: Tensor, t: Tensor, alpha: float) -> Tensor:
        """alpha grad V of r / alpha, as a difference of scores."""
        tilted = mixture.tilted(b, strength=1 / alpha).mixture
        x64, t64 = x.double(), t.double()
        return (alpha * (tilted.score(x64, t64, path) - mixture.score(x64, t64, path))).to(x)

    return {
        "model": Exact(mixture, path, flow_grid(config.steps)),
        "reward": Reward("linear", True, lambda images, _: images @ b.to(images) + 3),
        "prompts": ("a point",),
        "exact": Truths(lambda x, t: pulled(x, t, 1e5), lambda x, t: pulled(x, t, config.temperature)),
    }


# judge


def judge(config: Any) -> dict[str, Any]:
    of_edits = str(config.judge).startswith(("remote:", "http:", "https:")) and config.world is None
    if not of_edits:
        name = config.world or "shapes"
        return {"model": None, "detector": detect.load(config.judge), "world": asked.load(name, SIZES[name])}
    judges = judges_of(str(config.judge))
    edits = graded(ScenesWorld(SCENES), config.samples, config.seed)
    return {
        "model": None, "judges": judges, "edits": edits, "name": next(iter(judges.values())).server.name,
        "address": partial(address_of, str(config.judge)),
    }  # fmt: skip


def judges_of(address: str) -> dict[str, Any]:
    """A judge in each mode that the address names (none: all), with at least two replies.

    Raises InputError at another kind of judge, bad options, and where the server does not answer.
    """
    kind, _, rest = address.partition(":")
    if kind != "remote":
        raise InputError(f"judge '{address}' is unknown; use remote:http://HOST:PORT/v1?model=MODEL")
    base, _, query = rest.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    modes = tuple(dict.fromkeys(value for name, value in options if name == "mode")) or MODES
    given = {"n": "4", "temperature": "0.7"} | {name: value for name, value in options if name != "mode"}
    if given["n"] == "1":
        raise InputError("n=1 reply has no variance to measure; give n=2 or more, 4 is a good start")
    judges = {}
    for mode in modes:
        # checks are for the checklist, which is one of several modes here
        left_out = () if mode == "checklist" or len(modes) == 1 else ("checks",)
        mine = {name: value for name, value in given.items() if name not in left_out}
        judges[mode] = edit_judge(f"{base}?{urlencode({**mine, 'mode': mode})}")
    return judges


def address_of(given: str, mode: str, n: int) -> str:
    """The judge in one mode with n replies, as `fieldsmith edit` takes it."""
    base, _, query = given.partition("?")
    options = {"temperature": "0.7"} | dict(parse_qsl(query, keep_blank_values=True))
    if mode != "checklist":
        options.pop("checks", None)
    return f"{base}?{urlencode({**options, 'mode': mode, 'n': n})}"


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "guidance": guidance, "smoothness": smoothness, "exposure": exposure, "concepts": concepts_of, "reward": reward,
    "audit": audit, "judge": judge,
}  # fmt: skip
