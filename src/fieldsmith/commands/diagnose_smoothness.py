"""`fieldsmith diagnose --smoothness`: how sharp a DDPM's score is along its paths, and whether that finds bad samples.

In: a DiagnoseConfig. Out: a run directory with metrics.json and report.html.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from fieldsmith.commands import arguments
from fieldsmith.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from fieldsmith.commands.diagnose import DiagnoseConfig
    from fieldsmith.models.core import Model
    from fieldsmith.run import Run
    from fieldsmith.worlds.judged import JudgedWorld

LOOKS = 10  # times at which the profile looks
WINDOWS = ((0.0, 0.5), (0.5, 1.0))  # halves of the way from noise to data, where detectors watch
HOW = (
    "Jn = -sigma d eps/dx is the score's Jacobian without units. Cov[x_0 | x_t] = sigma^2 / alpha^2 (I + Jn): an "
    "exact score has no eigenvalue below -1, where x_0 is known, and large ones where two explanations compete; a "
    "network too smooth to have them there drifts between the two, and its samples lie where the data has none.",
    "The consistency gap compares, on noised data, the error of eps with the error that Jn implies; 0 is exact. It is "
    "a mean over data, nearly blind to rare ridges.",
    "A detector watches paths: the variance of predicted x_0, or the largest I + Jn. AUROC is the chance that it puts "
    "a hallucinated sample above a valid one: 0.5 knows nothing.",
)


def run(config: DiagnoseConfig) -> Run:
    """The whole instrument; the finished run directory. Raises InputError before anything is written."""
    import torch
    from rich.console import Console

    from fieldsmith.diagnose.smoothness import profile
    from fieldsmith.methods.sharpen.sampling import field_of
    from fieldsmith.models import load
    from fieldsmith.paths import VariancePreserving

    console = Console(stderr=True)
    directory = arguments.directory_of(config, "diagnose")
    if directory.finished:
        console.print(f"this run is complete: {directory.folder / 'report.html'}")
        return directory
    if config.steps < 4 or config.samples < 2:
        raise InputError(
            f"steps={config.steps}, samples={config.samples}: halves of paths are compared; use at least 4 and 2"
        )
    began = time.monotonic()
    model = load(str(config.model), config.resolution)
    if not isinstance(model.path, VariancePreserving):
        raise InputError(f"{config.model} is on rectified flow; --smoothness reads DDPM schedules")
    model.encode([""])  # a model without an unconditional branch is refused in its own words
    world = _world(model, config)
    try:
        grid = model.grid(config.steps)
    except ValueError as error:
        raise InputError(f"steps={config.steps}: {error}") from error
    generator = torch.Generator().manual_seed(config.seed)
    field = field_of(model)
    with console.status("measuring"), model.count_nfe() as nfe:
        states = None if world is None else model.encode_images(world.sample(config.samples, 7 + config.seed))
        found = profile(
            field, model.noise(config.samples, generator), grid, generator, clip=model.clip, iterations=6,
            every=max(1, config.steps // LOOKS), data=states,
        )  # fmt: skip
        detectors = {} if world is None else _detectors(model, world, config, grid)
    directory.begin()
    metrics: dict[str, Any] = {
        "method": "diagnose", "instrument": "smoothness", "seconds": time.monotonic() - began,
        "forward_equivalents": nfe.total, "profile": found.to_json(), **detectors,
    }  # fmt: skip
    metrics["words"] = _words(metrics)
    _page(config, metrics, directory).write(directory.folder / "report.html")
    directory.finish(metrics)
    console.print(metrics["words"])
    console.print(f"page: {directory.folder / 'report.html'}")
    return directory


def _world(model: Model, config: DiagnoseConfig) -> JudgedWorld | None:
    """The world that the settings or the card name; None where nothing does."""
    from fieldsmith.methods.sharpen.step import world_for
    from fieldsmith.worlds.catalogue import WORLDS, load
    from fieldsmith.worlds.model_cards import card_of

    source = config.data or card_of(str(config.model)).get("data")
    if config.data is None and source not in WORLDS:
        return None
    return world_for(model, lambda channels, size: load(str(source), size, config.judge, channels))


def _detectors(model: Model, world: JudgedWorld, config: DiagnoseConfig, grid: Tensor) -> dict[str, Any]:
    """How well what a path does tells whether its end is valid, on 4 x `samples` paths."""
    import torch

    from fieldsmith.diagnose.smoothness import SharpestJacobian, TrajectoryVariance, window
    from fieldsmith.methods.sharpen.sampling import field_of
    from fieldsmith.metrics.hallucination import auroc, tpr_at
    from fieldsmith.metrics.intervals import share
    from fieldsmith.samplers import ancestral

    steps, generator = len(grid) - 1, torch.Generator().manual_seed(1_000 + config.seed)
    field, n, flags = field_of(model), 4 * config.samples, []
    scores: dict[str, list[Tensor]] = {}
    for part in torch.arange(n).split(config.chunk):
        watches: dict[str, Any] = {}
        for first, last in WINDOWS:
            words = f"steps {window(steps, first, last)[0] + 1} to {window(steps, first, last)[-1] + 1} of {steps}"
            watches[f"trajectory variance, {words}"] = TrajectoryVariance(steps, first, last)
            watches[f"sharpest Jacobian, {words}"] = SharpestJacobian(
                field, steps, first, last, generator, norm="frobenius"
            )

        def all_of_them(said: Any, t_next: Any, watches: dict[str, Any] = watches) -> None:
            for watch in watches.values():
                watch(said, t_next)

        with torch.no_grad():
            states = ancestral(
                field, model.noise(len(part), generator), grid, generator, "small", model.clip, all_of_them
            )
        flags.append(~world.judge(model.decode(states)).valid)
        for name, watch in watches.items():
            scores.setdefault(name, []).append(watch.scores)
    bad = torch.cat(flags)
    found: dict[str, Any] = {"hallucinated": dataclasses.asdict(share(bad)), "world": world.name}
    if bool(bad.any()) and not bool(bad.all()):
        found["detectors"] = {
            name: {"auroc": auroc(torch.cat(parts), bad), "tpr at 5%": tpr_at(torch.cat(parts), bad)}
            for name, parts in scores.items()
        }
    return found


def _words(metrics: dict[str, Any]) -> str:
    """One sentence."""
    moments = metrics["profile"]["moments"]
    sharpest = max(moments, key=lambda m: m["norms"][-1])
    said = f"The sharpest place of a path has |Jn| = {sharpest['norms'][-1]:.3g}, at t = {sharpest['t']:.2f}"
    if "detectors" in metrics:
        name, best = max(metrics["detectors"].items(), key=lambda item: item[1]["auroc"])
        rate = metrics["hallucinated"]["value"]
        told = f"best told by {name} (AUROC {best['auroc']:.2f})"
        return f"{said}; {100 * rate:.0f}% of the samples are hallucinated, {told}."
    return said + "."


def _page(config: DiagnoseConfig, metrics: dict[str, Any], directory: Run) -> Any:
    from fieldsmith.report.page import Page, Panel

    page = Page(f"Sharpness of {config.model}", f"{config.samples} paths of {config.steps} steps, seed {config.seed}")
    page.verdict(metrics["words"], None, "Measured")
    moments = metrics["profile"]["moments"]
    at = [m["t"] for m in moments]
    names = ("median", "90%", "99%", "largest")
    series = {name: (at, [m["norms"][i] for m in moments]) for i, name in enumerate(names)}
    panels = [
        Panel("|Jn| along paths", series, "t"),
        Panel("share with an eigenvalue below -1", {"paths": (at, [m["unphysical"] for m in moments])}, "t"),
    ]
    if moments[0]["gap"] is not None:
        sides = {side: (at, [m[side] for m in moments]) for side in ("implied", "error")}
        panels.append(Panel("consistency, on noised data", sides, "t"))
    page.curves("Along the way from noise (1) to data (0)", panels)
    if "detectors" in metrics:
        rows = [(name, f"{d['auroc']:.3f}", f"{100 * d['tpr at 5%']:.0f}%") for name, d in metrics["detectors"].items()]
        headers = ("what watches the path", "AUROC", "found at 5% false alarms")
        note = f"On {metrics['hallucinated']['n']} samples."
        page.table("Does it find hallucinated samples?", headers, rows, note=note)
    page.text("How to read it", HOW)
    page.command("Repeat it", f"fieldsmith diagnose --config {directory.folder}/config.toml --out ANOTHER-FOLDER")
    return page
