"""The building blocks of report.html: a page that collects sections and writes one file that opens offline.

Images are PNG data URIs at their own size (enlarged by CSS, pixel by pixel), curves are inline SVG; nothing is loaded
from outside, no script is needed, and the same content gives the same bytes. The look is in page.html.jinja.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from fieldsmith.report.grid import picture
from fieldsmith.run import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any common colour blindness; their yellow, too faint on white, is out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")  # the second sign beside colour, for print
PICTURES = 6  # of each side, on a card
LARGEST = 512  # pixels; larger images are stored smaller, so that a page of FLUX images still opens
NUMBER = re.compile(r"[\d\s.,:%±+\-−–\[\]()×x/eE→<>≤≥~]*\d[\d\s.,:%±+\-−–\[\]()×x/eE→<>≤≥~]*|[+-]?(nan|inf)")
BLANK = ("", "—", "–", "-", "n/a")

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> xs, ys


class Caption(NamedTuple):
    """What stands under an image, for instance the judge's reading, with a mark for right (True) or wrong (False)."""

    text: str
    right: bool | None = None


class Pair(NamedTuple):
    """Images (n, 3, h, w) of one prompt before and after a run, at equal seeds in equal places."""

    label: str
    before: Tensor
    after: Tensor
    before_captions: Sequence[Caption | str] = ()
    after_captions: Sequence[Caption | str] = ()


class Panel(NamedTuple):
    """One set of axes with its curves."""

    title: str
    series: Series
    x_label: str = "step"
    y_label: str = ""


class Drawn(NamedTuple):
    """A panel whose figure is drawn where a page is written: a run without a folder never shows it."""

    panel: Panel
    wide: bool
    prefix: str  # of the ids in its SVG

    @property
    def svg(self) -> Markup:
        return svg_of(draw(self.panel, self.wide), self.prefix)


class Card(NamedTuple):
    """Another page in a gallery: what it is about, what came out, and the command that made it."""

    title: str
    link: str  # relative
    complaint: str  # what is to be mended, in a user's words
    verdict: Mapping[str, str]  # tone, word, sentence, as `Page.answer`
    pair: Pair  # whose first images are shown
    numbers: list[tuple[str, str, str]]  # label, value, note
    command: str


@dataclass(frozen=True)
class Section:
    """A kind that the template knows, its heading (may be empty), and what the template shows."""

    kind: str
    heading: str
    body: Any
    note: str = ""


@dataclass
class Page:
    """A report under construction: call the methods in reading order, then write."""

    title: str
    subtitle: str = ""
    sections: list[Section] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)  # every pair that `before_after` was given, in order

    def verdict(self, sentence: str, good: bool | None, word: str = "") -> None:
        """A banner that answers the reader's first question; good=None is the middle (amber)."""
        tone, default = {True: ("good", "Good"), False: ("bad", "Not good"), None: ("mixed", "Mixed")}[good]
        self.sections.append(Section("verdict", "", {"tone": tone, "word": word or default, "sentence": sentence}))

    def numbers(self, cards: Iterable[tuple[str, str, str]], heading: str = "") -> None:
        """Big numbers, each (label, value, note)."""
        self.sections.append(Section("numbers", heading, list(cards)))

    def text(self, heading: str, paragraphs: str | Iterable[str]) -> None:
        """Prose, one string a paragraph."""
        self.sections.append(Section("text", heading, lines_of(paragraphs)))

    def cards(self, heading: str, cards: Iterable[Card]) -> None:
        """A gallery of other pages beside this one."""
        bodies = []
        for one in cards:
            pair = one.pair._replace(before=one.pair.before[:PICTURES], after=one.pair.after[:PICTURES])
            bodies.append({"card": one, "grid": grid_of(pair.label, _sides(pair, ("before", "after")))})
        self.sections.append(Section("cards", heading, bodies))

    def table(
        self,
        heading: str,
        headers: Sequence[str],
        rows: Iterable[Sequence[Any]],
        note: str = "",
        highlight: Collection[int] = (),
    ) -> None:
        """A table; columns of numbers go to the right, the rows at the indices in `highlight` are set off."""
        cells = [[cell_text(cell) for cell in row] for row in rows]
        for row in cells:
            if len(row) != len(headers):
                raise ValueError(f"table '{heading}': {len(headers)} headers, but a row of {len(row)} cells: {row}")
        right = [is_numeric([row[i] for row in cells]) for i in range(len(headers))]
        body = {"headers": headers, "rows": cells, "right": right, "highlight": set(highlight)}
        self.sections.append(Section("table", heading, body, note))

    def images(
        self,
        heading: str,
        columns: Sequence[str],
        rows: Iterable[tuple[str, Sequence[Tensor] | Tensor]],
        captions: Sequence[Sequence[Caption | str]] = (),
        note: str = "",
    ) -> None:
        """A grid of images (3, h, w) in [0, 1]; each row a label and its images, `captions` one list a row."""
        rows = list(rows)
        lines = [
            line_of(label, label, images, captions[i] if i < len(captions) else (), columns)
            for i, (label, images) in enumerate(rows)
        ]
        self.sections.append(Section("images", heading, [grid_of("", lines, columns)] if lines else [], note))

    def before_after(
        self, heading: str, rows: Iterable[Pair], note: str = "", sides: tuple[str, str] = ("before", "after")
    ) -> None:
        """Each prompt's images before over those after; a tuple in Pair's order will do for a Pair."""
        grids = []
        for pair in (Pair(*row) for row in rows):
            self.pairs.append(pair)
            grids.append(grid_of(pair.label, _sides(pair, sides)))
        self.sections.append(Section("images", heading, grids, note))

    def curves(
        self, heading: str, series: Series | Sequence[Panel], x_label: str = "step", y_label: str = "", note: str = ""
    ) -> None:
        """Lines over a common x; or several panels side by side, each with its own labels."""
        panels = [Panel("", series, x_label, y_label)] if isinstance(series, Mapping) else list(series)
        panels = [panel for panel in panels if panel.series]
        figures = []
        for i, panel in enumerate(panels):
            what = f"{panel.y_label or panel.title or heading} against {panel.x_label}"
            drawn = Drawn(panel, wide=len(panels) == 1, prefix=f"s{len(self.sections)}-{i}-")
            figures.append({"drawn": drawn, "title": panel.title, "alt": f"{what}: {', '.join(panel.series)}"})
        self.sections.append(Section("figures", heading, figures, note))

    def command(self, heading: str, lines: str | Iterable[str], note: str = "") -> None:
        """A block of code: how to repeat the run, how to load what it made."""
        self.sections.append(Section("command", heading, "\n".join(lines_of(lines)), note))

    @property
    def answer(self) -> dict[str, str] | None:
        """The first verdict: its tone (good, bad, mixed), word and sentence."""
        return next((section.body for section in self.sections if section.kind == "verdict"), None)

    def html(self) -> str:
        """The whole page."""
        source = importlib.resources.files("fieldsmith.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        anchors = anchors_of(section.heading for section in self.sections)
        return environment.from_string(source).render(
            page=self, anchored=list(zip(anchors, self.sections, strict=True))
        )

    def write(self, path: str | pathlib.Path) -> None:
        """Write the page; a reader never sees half of it."""
        write_atomically(pathlib.Path(path), self.html())


def _sides(pair: Pair, sides: tuple[str, str]) -> list[dict[str, Any]]:
    """A pair's two lines of a grid."""
    return [
        line_of(sides[0], f"{pair.label}, {sides[0]}", pair.before, pair.before_captions),
        line_of(sides[1], f"{pair.label}, {sides[1]}", pair.after, pair.after_captions),
    ]


def lines_of(text: str | Iterable[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def anchors_of(headings: Iterable[str]) -> list[str]:
    """One id a heading, readable and unique; '' where there is no heading."""
    anchors: list[str] = []
    for heading in headings:
        stem = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        anchor, n = stem, 1
        while anchor in anchors:
            n += 1
            anchor = f"{stem}-{n}"
        anchors.append(anchor if heading else "")
    return anchors


def cell_text(cell: Any) -> str:
    """A cell as text: floats at four figures, None as a dash."""
    if cell is None:
        return "—"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def is_numeric(column: Sequence[str]) -> bool:
    """Whether every cell that holds anything is a number, also with an interval, a percent sign or an error bar."""
    filled = [cell.strip() for cell in column if cell.strip() not in BLANK]
    return bool(filled) and all(NUMBER.fullmatch(cell) for cell in filled)


def line_of(
    name: str,
    alt: str,
    images: Sequence[Tensor] | Tensor,
    captions: Sequence[Caption | str],
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """One line of a grid as the template shows it; where captions carry marks, `score` counts the right ones."""
    cells = []
    notes = [Caption(caption) if isinstance(caption, str) else Caption(*caption) for caption in captions]
    for i, image in enumerate(images):
        shown = picture(image)
        shown.thumbnail((LARGEST, LARGEST))
        caption = notes[i] if i < len(notes) else Caption("")
        parts = [alt, columns[i] if i < len(columns) else str(i + 1), caption.text]
        words = ": ".join(part for part in (", ".join(filter(None, parts[:2])), parts[2]) if part)
        cells.append({"uri": png_uri(shown), "alt": words, "caption": caption, "size": shown.size})
    marks = [caption.right for caption in notes if caption.right is not None]
    return {"name": name, "cells": cells, "score": f"{sum(marks)} of {len(marks)} ✓" if marks else ""}


def grid_of(label: str, lines: list[dict[str, Any]], columns: Sequence[str] = ()) -> dict[str, Any]:
    """Lines under one label; small images are shown about 96 pixels wide, by a whole factor: even pixels."""
    sizes = [cell["size"] for line in lines for cell in line["cells"]]
    native = max((width for width, _ in sizes), default=1)
    return {
        "label": label,
        "lines": lines,
        "columns": columns,
        "count": max([len(columns), *(len(line["cells"]) for line in lines)]),
        "width": native * max(1, round(96 / native)) if native < 256 else 256,
        "crisp": native <= 128,
    }


def png_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw(panel: Panel, wide: bool) -> Figure:
    """One panel as a figure: light axes, no frame, colour and dash by the series' place."""
    import matplotlib  # here, for a command that draws no curve starts sooner without it
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": "#999999", "axes.labelcolor": "#444444"}):
        figure = Figure(figsize=(6.0, 3.1) if wide else (4.6, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (xs, ys)) in enumerate(panel.series.items()):
            axes.plot(
                xs,
                ys,
                label=name,
                color=PALETTE[i % len(PALETTE)],
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.8,
                marker="o" if len(xs) <= 12 else "",
                markersize=4,
            )
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.tick_params(color="#999999", labelcolor="#444444")
        if len(panel.series) > 1 or panel.y_label not in panel.series:
            figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=2.4)
    return figure


def svg_of(figure: Figure, prefix: str) -> Markup:
    """The figure as SVG for the middle of a page: no date, no outside name, ids that no other figure has."""
    import matplotlib  # as in `draw`

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fieldsmith", "svg.fonttype": "path"}):
        metadata = {"Date": None, "Creator": None}
        # tight: the layout is computed at another resolution, and cut the first digit off wide labels
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata, bbox_inches="tight", pad_inches=0.06)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg).replace("xlink:href", "href")
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" stroke-linejoin="round" ', 1))
