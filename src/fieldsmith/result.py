"""What a run gives back: the trained model, its numbers with intervals, pictures before and after, and files of it."""

from __future__ import annotations

import contextlib
import html
import io
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from PIL import Image

from fieldsmith import processes
from fieldsmith.errors import InputError, check_word
from fieldsmith.models import load, load_adapter
from fieldsmith.models.core import Model
from fieldsmith.models.export import check_format, sizes_of, write
from fieldsmith.push import About, check_repo, push
from fieldsmith.read import read_json, read_toml
from fieldsmith.report.grid import picture
from fieldsmith.report.page import Pair, png_uri
from fieldsmith.run import plain, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["diffusers", "kohya", "comfyui", "merged"]
FORMATS = ("diffusers", "kohya", "comfyui", "merged")
SIDES = ("before", "after")
SHOWN = 8  # rows of `show`


@dataclass(frozen=True)
class Result:
    """A finished run: what verbs return, and what `fieldsmith.open_run` reads back."""

    verb: str
    config: Any  # the verb's config, or the settings of config.toml where a run was opened
    metrics: dict[str, Any] = field(repr=False)  # as metrics.json has them: before, after, side effects, cost
    pairs: tuple[Pair, ...] = field(repr=False)  # images (n, 3, h, w) in [0, 1] before and after, at equal seeds
    out: pathlib.Path | None = None  # the run directory, where one was written
    trained: Model | None = field(default=None, repr=False)
    again: Callable[..., Result] | None = field(default=None, repr=False)  # measures an opened run, `measure`

    @staticmethod
    def open(folder: str | pathlib.Path) -> Result:
        """The result of a finished run directory. Raises InputError where the folder is no finished run."""
        folder = pathlib.Path(folder)
        for name in ("config.toml", "metrics.json"):
            if not (folder / name).is_file():
                raise InputError(f"'{folder}' is no finished run: it has no {name}; repeat its command to finish it")
        settings = read_toml(folder / "config.toml")
        if not isinstance(settings.get("verb"), str) or "versions" not in settings:
            raise InputError(f"'{folder / 'config.toml'}' is no whole record of a run; repeat its command elsewhere")
        metrics = read_json(folder / "metrics.json", "record of numbers")
        if not isinstance(metrics, dict) or not metrics:
            raise InputError(f"'{folder / 'metrics.json'}' holds no numbers by name; delete it and repeat the command")
        return Result(settings.pop("verb"), settings, metrics, tuple(_load_samples(folder / "samples")), folder)

    @property
    def model(self) -> Model:
        """The trained model; of an opened run it is loaded when it is first asked for."""
        if self.trained is None:
            object.__setattr__(self, "trained", self._load())
        assert self.trained is not None
        return self.trained

    def _load(self) -> Model:
        assert self.out is not None
        folder = self._shipped(self.out)
        if folder.name != "adapter":
            return load(folder)
        settings = self.config
        model = load(
            settings["model"], settings.get("resolution"), None, settings.get("adapter") or (),
            settings.get("config_from") or "",
        )  # fmt: skip
        load_adapter(model, folder)
        return model

    def _shipped(self, out: pathlib.Path) -> pathlib.Path:
        """The folder of the run's weights: adapter, model or guide. Raises InputError where there is none."""
        shipped = self.metrics.get("adapter") or "model"
        if not (out / shipped).is_dir():
            raise InputError(f"run '{out}' shipped no weights ({shipped})")
        return out / shipped

    def measure(self, **settings: Any) -> Result:
        """Measure this run again, or what a judge that failed left out: `fs.open_run(out).measure(judge="nudenet")`.

        Nothing is trained; `settings` are those of the verb that say how it is measured (measuring.MEASURES). Raises
        InputError at others, and where the run was written nowhere.
        """
        if self.again is None:
            raise InputError("only a run that is opened can be measured again; use fieldsmith.open_run(OUT).measure()")
        return self.again(**settings)

    def save(self, path: str | pathlib.Path, format: Format = "diffusers") -> pathlib.Path:
        """Write what others load: an adapter as one .safetensors file (diffusers', kohya's or ComfyUI's keys) or as a
        folder that diffusers loads, or the whole pipeline, with the adapter merged into its weights ('merged').

        Raises InputError at an unknown format, and where the family or the run has no adapter to write.
        """
        path = pathlib.Path(path)
        check_word(format, FORMATS, "Result.save's formats")
        model = self.model
        if format == "merged" or (format == "diffusers" and path.suffix != ".safetensors"):
            if path.suffix == ".safetensors":
                raise InputError(f"a merged pipeline is a folder; name '{path.with_suffix('')}' instead of '{path}'")
            model.save(path, merged=format == "merged")
            return path
        if not model.spec:
            raise InputError("this run trained full weights, which no adapter file holds; save(format='merged')")
        if path.suffix != ".safetensors":
            raise InputError(f"'{path}' is no name of a safetensors file; call it {path}.safetensors")
        check_format(model.family, format)
        write(model.adapter(), model.family, sizes_of(model.network), format, path)
        return path

    def push_to_hub(self, repo: str, private: bool = False) -> str:
        """Upload what `save` writes by default, with a model card, to 'owner/name' on the hub; its address.

        Raises InputError where the name is none, without a token (`hf auth login`), where the token may not write there
        and where the run shipped no weights; RunError where the network fails.
        """
        check_repo(repo)
        with contextlib.ExitStack() as stack:
            if self.out:
                folder = self._shipped(self.out)
            else:
                model = self.model
                folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / (
                    "adapter" if model.spec else "model"
                )
                self.save(folder)
            effects = self.metrics.get("rest", {})
            rows = [
                (row["name"], *(_short(row[one]) for one in ("before", "after", "change")), row["verdict"])
                for row in (*effects.get("rows", ()), *effects.get("distances", ()))
            ]
            pictures = [(pair.label, _png(pair.before), _png(pair.after)) for pair in self.pairs[:SHOWN]]
            numbers = [(name, *sides) for name, sides in self.table()]
            return push(
                repo, folder, About(self.verb, plain(self.config), folder.name, numbers, rows, pictures), private
            )

    def show(self) -> Figure:
        """Before and after at equal seeds, a row a prompt; a matplotlib figure."""
        from matplotlib.figure import Figure  # here: most runs are never shown, and start sooner without it

        rows = self.pairs[:SHOWN]
        if not rows:
            raise InputError("this run drew no pictures; run it with evaluate above 0")
        columns = max(len(pair.before) for pair in rows)
        figure = Figure(figsize=(2.2 * columns + 0.6, 1.3 * len(rows) + 0.5), layout="constrained")
        axes = figure.subplots(len(rows), 2, squeeze=False)
        for (left, right), pair in zip(axes, rows, strict=True):
            for place, side, images in ((left, "before", pair.before), (right, "after", pair.after)):
                place.imshow(_strip(images), interpolation="nearest")
                place.set_axis_off()
                place.set_title(f"{pair.label}: {side}" if pair.label else side, fontsize=8)
        return figure

    def _repr_html_(self) -> str:
        """Pictures before and after, and the table of numbers, for a notebook."""
        rows = [
            f"<tr><td>{html.escape(pair.label)}</td>"
            + "".join(f'<td><img alt="{side}" src="{png_uri(_strip(images))}"></td>' for side, images in sides)
            + "</tr>"
            for pair in self.pairs[:SHOWN]
            for sides in [(("before", pair.before), ("after", pair.after))]
        ]
        pictures = f"<table><tr><th></th><th>before</th><th>after</th></tr>{''.join(rows)}</table>" if rows else ""
        cells = "".join(
            f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in values) + "</tr>"
            for name, values in self.table()
        )
        head = f"<h4>fieldsmith {html.escape(self.verb)}</h4>"
        return f"{head}{pictures}<table><tr><th>measure</th><th>before</th><th>after</th></tr>{cells}</table>"

    def table(self) -> list[tuple[str, tuple[str, str]]]:
        """Each measure with its value and interval before and after."""
        before, after = self.metrics.get("before", {}), self.metrics.get("after", {})
        return [(name, (_short(before.get(name)), _short(value))) for name, value in after.items() if _short(value)]


def _short(value: Any) -> str:
    """'0.4 [0.3, 0.5]' of a number as metrics.json has it, of a list all its numbers; '' of anything else."""
    if isinstance(value, list):
        parts = [_short(part) for part in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, bool) or not isinstance(value, (int, float, dict)):
        return ""
    if isinstance(value, dict):
        if "value" not in value:
            return ""
        ends = f" [{value['low']:.3g}, {value['high']:.3g}]" if value.get("low") is not None else ""
        return f"{value['value']:.3g}{ends}"
    return f"{value:.3g}"


def _strip(images: torch.Tensor | Sequence[torch.Tensor]) -> Image.Image:
    """Images side by side, two pixels apart, on white."""
    pictures = [picture(image) for image in images]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (len(pictures) * (width + 2) - 2, height), "white")
    for place, one in enumerate(pictures):
        sheet.paste(one, (place * (width + 2), 0))
    return sheet


def write_strip(images: torch.Tensor | Sequence[torch.Tensor], path: pathlib.Path) -> None:
    """Write images side by side as one PNG, beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(_png(images))
    beside.replace(path)


def _png(images: torch.Tensor | Sequence[torch.Tensor]) -> bytes:
    """Images side by side, as a PNG file holds them."""
    buffer = io.BytesIO()
    _strip(images).save(buffer, format="PNG")
    return buffer.getvalue()


def read_strip(path: pathlib.Path, n: int) -> torch.Tensor:
    """The n images of a strip, (n, 3, h, w) in [0, 1]."""
    sheet = torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    width = (sheet.shape[2] + 2) // n - 2
    return torch.stack([sheet[:, :, k * (width + 2) :][:, :, :width] for k in range(n)])


def save_samples(pairs: Sequence[Pair], folder: pathlib.Path) -> None:
    """Write pairs as strips of PNG, with what they show in samples.json."""
    if not processes.is_main():
        return
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for path in folder.glob("step-*.png"):  # drawn while it trained
        shutil.copy2(path, beside)
    listed = []
    for place, pair in enumerate(pairs):
        names = {side: f"{place:03d}-{side}.png" for side in ("before", "after")}
        for side, images in (("before", pair.before), ("after", pair.after)):
            write_strip(images, beside / names[side])
        listed.append({"label": pair.label, "images": len(pair.before), **names})
    write_atomically(beside / "samples.json", json.dumps(plain(listed), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _load_samples(folder: pathlib.Path) -> Iterator[Pair]:
    file = folder / "samples.json"
    if not file.is_file():
        return
    rows = read_json(file, "list of samples")
    whole = isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("label"), str)
        and isinstance(row.get("images"), int)
        and row["images"] > 0
        # a name and no path: what is shown comes from this folder alone
        and all(isinstance(row.get(side), str) and row[side] == pathlib.Path(row[side]).name for side in SIDES)
        for row in rows
    )
    if not whole:
        raise InputError(f"'{file}' is no list of pictures before and after; delete it, or repeat the run elsewhere")
    for row in rows:
        sides = []
        for side in SIDES:
            try:
                sides.append(read_strip(folder / row[side], row["images"]))
            except Exception as error:  # Pillow raises errors of every kind on damaged files
                raise InputError(
                    f"picture '{folder / row[side]}' cannot be read; delete the folder samples/, or repeat the run"
                ) from error
        yield Pair(row["label"], sides[0], sides[1])


def going_on(model: Model | Result | str | pathlib.Path | None) -> Model | str | None:
    """What a verb begins with: a Result stands for its run directory. Raises InputError where it has none."""
    if isinstance(model, Result):
        if model.out is None:
            raise InputError("this result was not written, so nothing can go on from it; give its run an out folder")
        model = model.out
    return str(model) if isinstance(model, pathlib.Path) else model
