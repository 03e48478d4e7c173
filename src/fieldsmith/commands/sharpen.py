"""`fieldsmith sharpen`: train a model so that fewer samples lie off its data's support; count them before and after.

In: the words after the verb. Out: a run directory with model/ (or guide/), metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments, memory
from fieldsmith.commands.distill import check_sampled
from fieldsmith.commands.memory import Memory
from fieldsmith.errors import InputError
from fieldsmith.methods.sharpen.config import METHODS, NEEDS_HEAD, PRESETS, SharpenConfig, check, preset

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.measure.distances import Features
    from fieldsmith.models.core import Model
    from fieldsmith.run import Run
    from fieldsmith.samplers import Field
    from fieldsmith.worlds.judged import JudgedWorld

NOTES = f"""--preset NAME picks a recipe (default: the method's own, else guide): {", ".join(PRESETS)}.
--scale laptop|paper picks how long it trains (default: laptop for zoo models, else paper).
--config FILE.toml (such as a run's config.toml) sets fields again, and flags come last."""
POOL = 20_000  # images drawn from a world for training
OF_METHOD = {"variance-penalty": "vsm", "variance-learning": "improved-ddpm", "covariance": "ocm"}


def sharpen(words: Sequence[str]) -> None:
    run(*settings(list(words)))


def configure(words: list[str]) -> SharpenConfig:
    """The settings without those of its memory."""
    return settings(words)[0]


def settings(words: list[str]) -> tuple[SharpenConfig, Memory]:
    """Preset, then file, then flags."""
    name, path = arguments.take(words, "--preset"), arguments.take(words, "--config")
    method = arguments.peek(words, "--method")
    if name is None and method in METHODS and not path:
        name = OF_METHOD.get(method, method)
    size = arguments.take(words, "--scale")
    file = arguments.from_file(path, SharpenConfig, "sharpen", Memory) if path else {}
    fits = memory.taken(file)
    model = str(arguments.peek(words, "--model") or file.get("model", SharpenConfig.model))
    size = size or ("laptop" if path or model.startswith("zoo:") else "paper")
    if size not in ("laptop", "paper"):
        raise InputError(f"scale '{size}' is unknown; use laptop or paper")
    base = dataclasses.replace(preset(name or "guide", size), **file)
    return arguments.parse_with(base, fits, words, "sharpen", NOTES)


def run(config: SharpenConfig, fits: Memory = memory.DEFAULT) -> Run:
    """The whole verb; the finished run directory. Raises InputError before anything is written."""
    check(config)
    check_memory(config, fits)
    import torch
    from rich.console import Console

    from fieldsmith.commands.sharpen_page import page_of
    from fieldsmith.methods.sharpen import loop
    from fieldsmith.methods.sharpen.sampling import draw

    console = Console(stderr=True)
    directory = arguments.directory_of(config, "sharpen", fits)
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    if config.threads:
        torch.set_num_threads(config.threads)
    model = memory.loaded(fits, config.model)
    loop.check_path(model)
    check_sampled(model, config.sampler_steps)
    world = world_for(model, config)
    if config.method in NEEDS_HEAD and config.add_head and not getattr(model, "learns_variance", False):
        from fieldsmith.models.variance_head import with_variance_head

        model = with_variance_head(model)
    features = extractor_of(config)
    states = model.encode_images(world.sample(POOL, config.seed))
    loop.check_model(model, states, config)
    seed = config.seed + 1  # of the images that are judged
    before = model.decode(draw(model, config.samples, config.sampler_steps, seed))
    judged_before = world.judge(before)  # a judge that fails does so before anything is trained or written
    if config.method == "guide":
        guide = guide_of(model, config)
        guide.network.float()
        memory.prepare_training(fits, guide)
        result = loop.sharpen(
            guide, states, dataclasses.replace(config, method="plain"), directory, optimizer=fits.optimizer
        )
        guide.save(directory.folder / "guide")
        field: Field | None = _steered(model, guide, config.guidance)
    else:
        memory.prepare_training(fits, model)
        result = loop.sharpen(model, states, config, directory, optimizer=fits.optimizer)
        model.save(directory.folder / "model")
        field = None
    for warning in result.warnings:
        console.print(warning)
    console.print(f"{result.steps} steps in {result.seconds:.0f} s; drawing and judging")
    after = model.decode(draw(model, config.samples, config.sampler_steps, seed, field))
    judged_after = world.judge(after)
    metrics: dict[str, Any] = {
        "method": config.method, "seconds": result.seconds, "steps": result.steps, "stopped": result.stopped,
        "forward_equivalents": result.forward_equivalents, "gradient share": result.share,
        "warnings": list(result.warnings), "world": world.name,
        "before": measured(world, before), "after": measured(world, after),
        "rest": rest(before, after, world, config, features),
    }  # fmt: skip
    page = page_of(config, metrics, (before, judged_before), (after, judged_after), directory)
    page.write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def check_memory(config: SharpenConfig, fits: Memory) -> None:
    """Raises InputError where a method cannot be made to fit in that way."""
    memory.check(fits, config.method == "guide", f"method '{config.method}'")
    if fits.checkpointing and config.method in ("jacobian-floor", "jacobian-match"):
        raise InputError(
            f"method '{config.method}' asks for the Jacobian, whose graph cannot be run again; leave out "
            "--checkpointing, or lower --batch or --probes"
        )


def guide_of(model: Model, config: SharpenConfig) -> Model:
    """A small, untrained network of the model's states."""
    from fieldsmith.models.shrink import shrink

    return shrink(model, config.guide_size, seed=config.seed)


def _steered(model: Model, guide: Model, scale: float) -> Field:
    from fieldsmith.methods.sharpen.sampling import field_of, steered

    return steered(field_of(model), field_of(guide), scale)


def world_for(model: Model, config: SharpenConfig) -> JudgedWorld:
    """The world that the settings or the model's card name. Raises InputError where its images are not the model's."""
    import torch

    from fieldsmith.worlds.judged import WORLDS, FolderWorld, load
    from fieldsmith.worlds.model_cards import card_of

    source = config.data
    if source == "auto":
        card = card_of(config.model)
        source = str(card.get("data") or "")
        if not source:
            raise InputError(
                f"'{config.model}' does not say what it was trained on; add --data columns, cards or a folder"
            )
    shape = tuple(model.decode(model.noise(1, torch.Generator().manual_seed(0))).shape[1:])
    if source not in WORLDS and config.judge is not None:
        import pathlib

        if not pathlib.Path(source).is_dir():
            raise InputError(f"data '{source}' is no folder of images; name one, or columns or cards")
        return FolderWorld(source, config.judge, size=shape[-1], channels=shape[0])
    world = load(source, None if source not in WORLDS else shape[-1], config.judge)
    if (world.channels, world.size, world.size) != shape:
        raise InputError(
            f"data '{source}' are {world.channels} x {world.size} x {world.size}; {config.model} draws "
            f"{' x '.join(map(str, shape))}, so give a model of that size"
        )
    return world


def extractor_of(config: SharpenConfig) -> Features:
    """What distances are measured on. Raises InputError where its weights are not at hand."""
    from fieldsmith.measure.distances import pixel_features
    from fieldsmith.models.features import load_features

    return load_features(config.extractor) if config.extractor else pixel_features(8)


def measured(world: JudgedWorld, images: Tensor) -> dict[str, Any]:
    """Rate of hallucination, novelty and coverage, each with how many images it rests on."""
    from fieldsmith.measure.hallucination import coverage
    from fieldsmith.measure.intervals import share

    judged = world.judge(images)
    rate = share(~judged.valid)
    contents = [c for c, good in zip(judged.contents, judged.valid.tolist(), strict=True) if good and c is not None]
    counts: dict[str, int] = {}
    for words in judged.reasons:
        for word in set(words):
            counts[word] = counts.get(word, 0) + 1
    found: dict[str, Any] = {
        "hallucinated": dataclasses.asdict(rate), "unreadable": int((~judged.readable).sum()), "images": len(images),
        "reasons": dict(sorted(counts.items(), key=lambda item: -item[1])[:8]),
    }  # fmt: skip
    if contents:
        found |= {"different": len(set(contents)), "valid": len(contents)}
        found["novel"] = sum(world.novel(content) for content in contents)
        if world.support:
            found["coverage"] = coverage(contents, world.support).relative
    return found


def rest(
    before: Tensor, after: Tensor, world: JudgedWorld, config: SharpenConfig, features: Features
) -> dict[str, Any]:
    """What else changed: distances to held-out data, precision and recall, brightness, diversity."""
    import torch

    from fieldsmith.measure.distances import extractor_name, frechet_distance, precision_recall

    real = features(world.sample(max(200, config.samples), 1_000_003 + config.seed))
    found: dict[str, Any] = {"extractor": extractor_name(features), "real": len(real)}
    for name, images in (("before", before), ("after", after)):
        made = features(images)
        reach = precision_recall(real, made)
        found[name] = {
            "distance": frechet_distance(real, made), "precision": reach.precision, "recall": reach.recall,
            "brightness": float(images.mean()), "contrast": float(images.flatten(1).std(1).mean()),
            "diversity": float(torch.pdist(made[:200]).mean()),
        }  # fmt: skip
    return found
