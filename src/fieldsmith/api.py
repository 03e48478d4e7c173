"""The public functions: names and settings become configs, callables and data, which go to `verb.run`.

The command line calls the same functions with a config that it has parsed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fieldsmith import measuring, preferences, rewards, verb
from fieldsmith.calls import data_name, settle, still_there, with_objects
from fieldsmith.config import GIVEN, Config, from_file
from fieldsmith.diagnoses.overview import diagnose as diagnose
from fieldsmith.errors import InputError
from fieldsmith.functions import load_function, name_of
from fieldsmith.measure import detect
from fieldsmith.methods.align.config import AlignConfig
from fieldsmith.methods.align.step import Inputs as AlignInputs
from fieldsmith.methods.align.verb import ALIGN
from fieldsmith.methods.distill.config import DistillConfig
from fieldsmith.methods.distill.step import Inputs as DistillInputs
from fieldsmith.methods.distill.verb import DISTILL
from fieldsmith.methods.edit.config import AUTO, EditConfig
from fieldsmith.methods.edit.rollouts import Inputs as EditInputs
from fieldsmith.methods.edit.rollouts import World
from fieldsmith.methods.edit.verb import EDIT
from fieldsmith.methods.erase.config import AUTO as AUTO_ERASE
from fieldsmith.methods.erase.config import EraseConfig
from fieldsmith.methods.erase.judged import Judged, judged, kept_of
from fieldsmith.methods.erase.step import Inputs as EraseInputs
from fieldsmith.methods.erase.verb import ERASE
from fieldsmith.methods.sharpen.config import SharpenConfig
from fieldsmith.methods.sharpen.step import Inputs as SharpenInputs
from fieldsmith.methods.sharpen.verb import SHARPEN
from fieldsmith.models import load as load
from fieldsmith.models.core import Model
from fieldsmith.models.features import load_features
from fieldsmith.pictures import Frame
from fieldsmith.preferences import Preferences
from fieldsmith.read import read_attacks, read_prompts, read_toml
from fieldsmith.result import Result
from fieldsmith.rewards.sessions import load as load_judge
from fieldsmith.run import base_of
from fieldsmith.sampling import sample as sample
from fieldsmith.sessions import UserSessions, frame_of
from fieldsmith.verb import Callback
from fieldsmith.worlds import catalogue, classes, own, scenes_judge
from fieldsmith.worlds.asked import Asked
from fieldsmith.worlds.classes import Classes
from fieldsmith.worlds.judged import JudgedWorld
from fieldsmith.worlds.model_cards import card_of, data_of, world_of
from fieldsmith.worlds.scenes import NOTHING, ScenesWorld
from fieldsmith.worlds.scenes_judge import Channel

ATTACKERS = 100  # prompts of a file that are drawn, at most

C = TypeVar("C", bound=Config)
RewardLike = str | Callable[..., Any]  # a name, or a function (images, prompts) -> n numbers


def align(
    model: Model | Result | str | None = None,
    reward: RewardLike | None = None,
    prompts: str | pathlib.Path | Iterable[str] | None = None,
    *,
    pairs: str | pathlib.Path | Iterable[Any] | None = None,
    held_out_rewards: RewardLike | Sequence[RewardLike] = (),
    config: AlignConfig | None = None,
    preset: str | None = None,
    scale: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Raise a reward of what prompts give: reward score matching and the policy gradients that are cases of it.

    `model` is a Model, which is trained in place, or a name to load. `reward` is a name or a function of images
    (n, 3, h, w) in [0, 1] and n prompts that returns n numbers; with an attribute `differentiable = True` its gradient
    may be used. `held_out_rewards` are only measured. `prompts` are texts, or a file with one a line; None: the
    captions that a zoo model was trained on. With preset="dpo" `pairs` take the place of both: a file with a line
    {"prompt": ..., "chosen": path, "rejected": path} a pair, such dicts, or Pick-a-Pic's rows (docs/align.md). Every
    field of AlignConfig is a keyword; `config` takes the whole, beside which rewards may still be functions and pairs
    objects. out=None writes nothing.
    Raises InputError before anything is trained or written, RewardError and RunError where training breaks.
    """
    held_out = (
        (held_out_rewards,) if callable(held_out_rewards) or isinstance(held_out_rewards, str) else held_out_rewards
    )
    own = None if pairs is None or isinstance(pairs, (str, pathlib.Path)) else preferences.load(pairs)
    named: dict[str, Any] = {
        "reward": _name(reward), "held_out_rewards": tuple(map(_name, held_out)) or None,
        "pairs": f"{GIVEN}{len(own.prompts)}" if own else pairs and str(pairs),
    }  # fmt: skip
    if prompts is not None:
        named["prompts"] = (str(prompts),) if isinstance(prompts, (str, pathlib.Path)) else tuple(prompts)
    functions = {_name(one): one for one in (reward, *held_out) if callable(one)}
    if config is not None:  # which cannot hold functions
        kept = {"reward": functions, "held_out_rewards": functions, "pairs": own}
        config = config.replace(**{name: named.pop(name) for name, objects in kept.items() if objects and named[name]})
    config, model = settle(AlignConfig, model, "model", config, preset, scale, named, settings)
    config.check()
    config, inputs = align_inputs(config, lambda name, world: rewards.load(functions.get(name, name), world), own)
    return verb.run(ALIGN, config, inputs, model, callback)


def align_inputs(
    config: AlignConfig, load: Callable[[str, Any], Any], pairs: Preferences | None = None
) -> tuple[AlignConfig, AlignInputs]:
    """The config with its prompts read, and what `align` is given beside it; `load(name, world)` gives a reward,
    `pairs` are those that were handed over."""
    world = world_of(config.model)
    prompts = read_prompts(config.prompts)
    if config.pairs:
        pairs = pairs or preferences.load(still_there(config.pairs))
        of_pairs = tuple(dict.fromkeys(pairs.prompts))
        if prompts not in ((), of_pairs):
            raise InputError("prompts come with the pairs that dpo learns from; leave out prompts")
        prompts = of_pairs
    config = config.replace(prompts=prompts or (world.training_captions() if world else ()))
    words_of = (*((config.reward,) if not pairs else ()), *config.held_out_rewards)
    named = [words for words in words_of if not words.startswith("function:")]
    if world and {name for words in named for _, name, _ in rewards.parse(words)} & {*rewards.OF_WORLD} - {"valid"}:
        for prompt in config.prompts:
            world.parse(prompt)  # what its judge cannot read is refused now, not when the first pictures are judged
    watched = [load(name, world) for name in (*config.held_out_rewards, *(("valid",) if world else ()))]
    others = tuple(name for name in (*world.other_captions(), "") if name not in config.prompts) if world else ()
    reward = None if pairs else load(config.reward, world)
    return config, AlignInputs(reward, {one.name: one for one in watched}, others, pairs)


def _name(reward: RewardLike | None) -> str | None:
    """How a config names a reward."""
    return f"function:{name_of(reward)}" if callable(reward) else reward


def erase(
    model: Model | Result | str | None = None,
    targets: Sequence[str] | str | None = None,
    anchors: Sequence[str] | str | None = None,
    *,
    method: str | Callable[..., Any] | None = None,
    judge: str | Callable[..., Any] | None = None,
    config: EraseConfig | None = None,
    preset: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Make target prompts give what anchor prompts give (GEM, arXiv 2606.00140, and six baselines).

    `model` is a Model, which is trained in place, or a name to load. `method` may be a function of your own
    (docs/extend.md). `judge` says what images of a model without a world show: a name (EraseConfig.judge), or a
    function of images (n, 3, h, w) in [0, 1] and n concepts that returns n numbers, from 0.5 on where it is shown.
    Every field of EraseConfig is a keyword; `config` takes the whole. out=None writes nothing.
    Raises InputError before anything is trained or written, RunError where training breaks.
    """
    build = method if callable(method) else None
    named = getattr(method, "__name__", None) if build else method
    given: dict[str, Any] = {"method": f"function:{named}" if build else named, "judge": _name(judge)}
    given |= {"targets": targets, "anchors": anchors}
    config = with_objects(config, given)
    config, model = settle(EraseConfig, model, "model", config, preset, None, given, settings)
    config.check()
    config, inputs = erase_inputs(config, build, judge)
    return verb.run(ERASE, config, inputs, model, callback)


def erase_inputs(
    config: EraseConfig, method: Callable[..., Any] | None = None, judge: str | Callable[..., Any] | None = None
) -> tuple[EraseConfig, EraseInputs]:
    """The config with its kept prompts named, and what `erase` is given beside it; `method` and `judge`: functions of
    the user's own, where they are no names. Raises InputError at a word that the model's world or the judge does not
    know."""
    if method is None and ":" in config.method:
        method = load_function(config.method, "method")
    judge = judge if callable(judge) else config.judge
    world = world_of(config.model)
    if world and (judge or config.neighbours != AUTO_ERASE):
        field = "judge" if judge else "neighbours"
        raise InputError(f"the world of '{config.model}' has {field} of its own, which are exact; leave out --{field}")
    pairs = []
    if world and config.templates == AUTO_ERASE:
        pairs = [pair for target, anchor in config.words for pair in world.phrasings(target, anchor)]
    if config.keep == AUTO_ERASE:
        kept = world.kept(config.targets) if world else kept_of(config)
        config = config.replace(keep=tuple(prompt for prompt in kept if prompt not in config.targets))
    for run in config.protect:
        held = tuple(prompt for prompt in dict.fromkeys(_protected(run, config)) if prompt not in config.keep)
        config = config.replace(keep=config.keep + held)
    config.check()  # a protected prompt is no target
    asked = _judged(world, config) if world else judged(detect.load(still_there(judge)), config) if judge else None
    if asked is None and (config.attacks or config.attack_prompts):
        raise InputError(
            f"attacks are counted by a judge, and nobody judges the images of '{config.model}'; name one with --judge, "
            "or leave attacks out"
        )
    attackers = read_attacks(config.attack_prompts, config.seed) if config.attack_prompts else []
    attackers = attackers[:: -(-len(attackers) // ATTACKERS)] if attackers else []
    return config, EraseInputs(asked, method, pairs, attackers)


def _protected(run: str, config: EraseConfig) -> tuple[str, ...]:
    """What a run that the model goes on from was about: its targets, in every way that it asked for them, or its
    prompts. Raises InputError where it is no part of the model, or names none."""
    left = base_of(run)
    if left is None:
        raise InputError(f"protect '{run}' is no run directory; name the folder of a finished run")
    parts = {pathlib.Path(part).resolve() for part in (config.model, *config.adapter)}
    if pathlib.Path(left.adapter[-1] if left.adapter else left.model).resolve() not in parts:
        raise InputError(f"run '{run}' is no part of the model, so there is nothing to protect; give it as --model")
    earlier = read_toml(pathlib.Path(run).expanduser() / "config.toml")
    ways = earlier.get("templates")
    phrased = [way.replace("{}", word) for word in earlier.get("targets", ()) for way in ways or () if "{}" in way]
    prompts = (*earlier.get("targets", ()), *phrased, *read_prompts(tuple(earlier.get("prompts", ()))))
    if not prompts:
        raise InputError(f"run '{run}' names no targets and no prompts to protect; name them in --keep")
    return prompts


def _judged(world: Asked, config: EraseConfig) -> Judged:
    """What the model's world says of the targets. Raises InputError at an unknown word."""
    targets = world.erased(config.targets)
    groups = {target: world.groups(target, targets) for target in targets}
    return Judged(world.world, groups, {target: world.paraphrases(target) for target in targets})


def edit(
    model: Model | Result | str | None = None,
    sessions: str | pathlib.Path | Iterable[Any] | None = None,
    judge: str | Callable[..., Any] | None = None,
    *,
    config: EditConfig | None = None,
    preset: str | None = None,
    scale: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Train an image editor on its own multi-turn sessions (MT-EditFlow, arXiv 2606.01985).

    `model` is a Model, which is trained in place, or a name to load. `sessions` is a file with a line
    {"image": ..., "instructions": [...]} a session, or such dicts or pairs (image, instructions), where an image is a
    path or PIL's; or 'auto', the world that the model's card names. `judge` is judge(before, after, instructions) ->
    (following, consistency): images (n, 3, h, w) in [0, 1], n instructions, n numbers in [0, 1] each; or a name
    (EditConfig.judge). Every field of EditConfig is a keyword; `config` takes the whole. out=None writes nothing.
    Raises InputError before anything is trained or written, RewardError where the judge fails, RunError where training
    breaks.
    """
    own = None if sessions is None or isinstance(sessions, (str, pathlib.Path)) else list(sessions)
    named = {"sessions": f"{GIVEN}{len(own)}" if own is not None else sessions and str(sessions), "judge": _name(judge)}
    if config is not None:  # which cannot hold functions and sessions
        objects = {"sessions": own is not None, "judge": callable(judge)}
        config = config.replace(**{name: named.pop(name) for name in objects if objects[name]})
    config, model = settle(EditConfig, model, "model", config, preset, scale, named, settings)
    config.check()
    size = getattr(model, "resolution", None)
    inputs = edit_inputs(config, own, judge if callable(judge) else None, size)
    return verb.run(EDIT, config, inputs, model, callback)


def edit_inputs(
    config: EditConfig,
    sessions: Iterable[Any] | None = None,
    judge: Callable[..., Any] | None = None,
    size: int | None = None,
) -> EditInputs:
    """Sessions and judge of `edit`, as given or as the config names them; `size` of sessions' images in pixels.

    Raises InputError where a file cannot be read, a server does not answer, or no world is known.
    """
    scores = load_judge(judge or config.judge, config.against)
    channel = Channel(config.contrast, config.blur, config.noise)
    if config.sessions == AUTO:
        card = card_of(config.model)
        if card.get("world") != "scenes":
            raise InputError(
                f"'{config.model}' names no world of sessions; add --sessions FILE.jsonl with a line "
                '{"image": "a.png", "instructions": ["...", "..."]} a session'
            )
        world = ScenesWorld(int(card["size"]))
        plan = World(scenes_judge.judge, partial(scenes_judge.likeness, world), NOTHING)
        return EditInputs(
            lambda n, seed, turns: world.sessions(n, turns, seed, config.dependency), scores, channel, plan
        )
    source = config.sessions if sessions is None else sessions
    frame = frame_of(size or config.resolution or 512, config.fit, config.background)
    own = UserSessions.of(source, frame, config.outside_images)
    if own.turns < config.turns:
        raise InputError(f"turns={config.turns}, but the sessions of '{config.sessions}' have {own.turns}; lower it")
    return EditInputs(own.sample, scores, channel)


def distill(
    teacher: Model | Result | str | None = None,
    data: str | pathlib.Path | Classes | Iterable[tuple[Any, str]] | None = None,
    student: float | str | pathlib.Path | Model | None = None,
    *,
    config: DistillConfig | None = None,
    preset: str | None = None,
    scale: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Train a smaller student on both branches of a guided teacher (DASH, arXiv 2606.00798, its rivals, and ours).

    `teacher` is a Model or a name to load. `data` is digits, shapes, fashion, a folder of images with classes or
    captions, a dataset of the `datasets` library, or pairs (image, class); docs/data.md. `student` is how many times
    smaller, a JSON file of config fields, or an untrained Model. Every field of DistillConfig is a keyword; `config`
    takes the whole. out=None writes nothing. The result's model is the student. Raises InputError before anything is
    trained or written, RunError where training breaks.
    """
    given: dict[str, Any] = {"data": data_name(data)}
    if isinstance(student, (str, pathlib.Path)):
        given["student"] = student
    elif not isinstance(student, Model):
        given["shrink"] = student
    config = with_objects(config, given)
    config, teacher = settle(DistillConfig, teacher, "teacher", config, preset, scale, given, settings)

    return verb.run(DISTILL, config, distill_inputs(config, data, student), teacher, callback)


def distill_inputs(config: DistillConfig, data: Any = None, student: Any = None) -> DistillInputs:
    """What `distill` is given beside its config: data and student as given, or as the config names them."""

    def sized(size: int, channels: int) -> Classes:
        if isinstance(data, Classes):
            return data
        source = data
        if data is None or isinstance(data, (str, pathlib.Path)):
            known = ", ".join(classes.NAMED)
            source = still_there(data_of(config.teacher, known) if config.data == "auto" else config.data)
        return classes.load(source, size, channels, fit=config.fit, background=config.background)

    return DistillInputs(sized, student=student if isinstance(student, Model) else None)


def sharpen(
    model: Model | Result | str | None = None,
    data: str | pathlib.Path | JudgedWorld | Iterable[Any] | None = None,
    judge: str | Callable[..., Any] | None = None,
    *,
    config: SharpenConfig | None = None,
    preset: str | None = None,
    scale: str | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> Result:
    """Train a model, or a guide beside it, so that fewer samples lie where its data have none (VSM, rivals, and ours).

    `data` is columns, cards, shapes, or images of your own, a folder, a dataset of `datasets` or a list
    (docs/data.md), with captions where the model reads words; then `judge` says which images are valid: a function of
    images (n, channels, size, size) in [0, 1] that gives n bools or pairs (bool, reason), its name, or an http address.
    Without one the field's sharpness is measured. Every field of SharpenConfig is a keyword; `config` takes the whole.
    out=None writes nothing. Raises InputError before anything is trained or written, RunError where training or judging
    breaks.
    """
    given = {"data": data_name(data), "judge": _name(judge)}
    config = with_objects(config, given)
    config, model = settle(SharpenConfig, model, "model", config, preset, scale, given, settings)

    return verb.run(SHARPEN, config, sharpen_inputs(config, data, judge), model, callback)


def sharpen_inputs(config: SharpenConfig, data: Any = None, judge: Any = None) -> SharpenInputs:
    """What `sharpen` is given beside its config: data and judge as given, or as the config names them."""

    def sized(channels: int, size: int, words: bool) -> JudgedWorld:
        verdict = judge if callable(judge) else config.judge
        if data is None or isinstance(data, (str, pathlib.Path)):
            name = data_of(config.model, ", ".join(catalogue.WORLDS)) if config.data == "auto" else config.data
            return catalogue.load(still_there(name), size, verdict, channels, config.fit, config.background, words)
        if hasattr(data, "sample"):
            world: JudgedWorld = data
            return world
        return own.of(data, verdict, Frame(size, channels, config.fit, config.background), words)

    return SharpenInputs(sized, features=load_features(config.extractor) if config.extractor else None)


# what a run is given beside its config, where only the config is known: a finished run's
RUNS: dict[str, tuple[verb.Verb, Callable[[Any], tuple[Any, Any]]]] = {
    "align": (ALIGN, lambda config: align_inputs(config, rewards.load)),
    "distill": (DISTILL, lambda config: (config, distill_inputs(config))),
    "edit": (EDIT, lambda config: (config, edit_inputs(config))),
    "erase": (ERASE, lambda config: erase_inputs(config)),
    "sharpen": (SHARPEN, lambda config: (config, sharpen_inputs(config))),
}


def open_run(folder: str | pathlib.Path) -> Result:
    """The result of a finished run directory. Raises InputError where the folder is no finished run."""
    return replace(Result.open(folder), again=partial(measure, folder))


def measure(folder: str | pathlib.Path, **settings: Any) -> Result:
    """Measure a finished run again, without training; `settings` are its verb's, of those that only measure.

    Raises InputError at a setting that trains, at an object that the run was given in Python, and where the run is not
    finished or has no checkpoint any more.
    """
    folder = pathlib.Path(folder)
    name = Result.open(folder).verb
    kind, inputs_of = RUNS[name]
    began = kind.config(**from_file(folder / "config.toml", kind.config, name) | {"out": folder})
    measuring.check(name, settings)
    config = began.replace(**settings)
    config.check()
    config, inputs = inputs_of(config)
    return measuring.measure(kind, began, config, inputs, folder)
