"""The report page is one honest file: escaped, self-contained, the same bytes for the same content."""

import html.parser
import re

import pytest
import torch
from PIL import Image

from fieldsmith.report.grid import save_grid
from fieldsmith.report.page import Caption, Card, Page, Pair, Panel, is_numeric


def images(n: int, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def full_page() -> Page:
    """Every kind of section once."""
    page = Page("Erased <b>triangle</b>", "seed 0 & more")
    page.verdict("Gone in 98 % of images.", good=True)
    page.numbers([("presence", "0.02", "before <0.98>")])
    page.text("What was done", ["One.", "Two <script>alert(1)</script>."])
    page.table("The rest", ["quantity", "after"], [["accuracy", 0.97123], ["drift", None]], highlight=[1])
    page.images("Grid", ["base", "ours"], [("red circle", images(2))], captions=[[Caption("circle", True), "ring"]])
    captions = [Caption("triangle", True), Caption("ring", False), Caption("", True)]
    page.before_after("Before and after", [Pair("a triangle", images(3), images(3), captions, captions[:2])])
    page.curves("Loss", {"pull": ([0, 1, 2], [1.0, 0.5, float("nan")]), "push": ([0, 1, 2], [0, 1, 2])}, y_label="loss")
    page.curves("Panels", [Panel("A & B", {"x": ([0, 1], [1, 2])}), Panel("C", {"y": ([0], [1])}, "t", "drift")])
    pair = Pair("a <cat>", images(9), images(9))
    page.cards(
        "Others", [Card("Gone & kept", "a/report.html", "It broke.", page.answer, pair, [("left", "0%", "")], "do it")]
    )
    page.command("Repeat", ["fieldsmith erase --config a.toml", 'load("x")'])
    return page


class Reader(html.parser.HTMLParser):
    """Collects tags and checks that those with an end are closed in order."""

    VOID = {"meta", "img", "br", "link", "path", "use", "rect"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_loads_nothing_and_needs_no_script():
    text = full_page().html()
    assert "http://" not in text and "https://" not in text and "<script" not in text and "@import" not in text
    reader = Reader(text)
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag != "link"
        for name in ("src", "href"):
            where = attributes.get(name) or "#"
            assert where.startswith(("#", "data:image/png")) or (tag == "a" and ":" not in where)  # a page beside it
        if tag == "img":
            assert attributes["alt"]


def test_ids_are_unique_and_every_reference_has_its_target():
    text = full_page().html()
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert {a or b for a, b in references} <= set(ids)


def test_text_is_escaped():
    text = full_page().html()
    assert "Erased &lt;b&gt;triangle&lt;/b&gt;" in text and "<b>triangle" not in text
    assert "before &lt;0.98&gt;" in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(("good", "word"), [(True, "✓ Good"), (False, "✗ Not good"), (None, "≈ Mixed")])
def test_verdict_says_it_in_a_word(good, word):
    page = Page("t")
    page.verdict("It is so.", good)
    assert word in page.html() and "It is so." in page.html()
    page.verdict("Again.", good, word="Own word")
    assert "Own word" in page.html()


def test_same_content_gives_the_same_bytes(tmp_path):
    full_page().write(tmp_path / "a.html")
    full_page().write(tmp_path / "deep" / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "deep" / "b.html").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_before_after_shows_images_captions_marks_and_counts():
    page = Page("t")
    pair = ("a triangle", images(2), images(2), [Caption("triangle", True), Caption("ring", False)], ["what", ""])
    page.before_after("Pairs", [pair])
    text = page.html()
    assert text.count("<img ") == 4
    assert text.count('class="right"') == 1 and text.count('class="wrong"') == 1 and "1 of 2 ✓" in text
    assert 'alt="a triangle, before, 2: ring"' in text and "<figcaption>what</figcaption>" in text


def test_images_are_stored_at_their_own_size_but_not_huge():
    page = Page("t")
    page.images("g", [], [("small", images(1)), ("large", [torch.full((3, 700, 1400), 0.5)])])
    assert 'width="8" height="8"' in page.html() and 'width="512" height="256"' in page.html()


def test_a_card_leads_to_its_page_with_the_verdict_and_some_pictures():
    text = full_page().html()
    (card,) = re.findall(r"<article.*?</article>", text, re.DOTALL)
    assert '<a href="a/report.html">Gone &amp; kept</a>' in card and "Gone in 98 % of images." in card
    assert card.count("<img") == 2 * 6 and "<code>do it</code>" in card and 'class="value">0%' in card


def test_table_alignment_highlight_and_wrong_rows():
    page = Page("t")
    page.table("T", ["name", "value"], [["a", 0.123456], ["b", None]], highlight=[0])
    text = page.html()
    assert '<tr class="highlight"><td>a</td><td class="right">0.1235</td></tr>' in text and '"right">—<' in text
    with pytest.raises(ValueError, match="2 headers, but a row of 1"):
        page.table("T", ["name", "value"], [["a"]])
    assert is_numeric(["0.97 [0.95, 0.99]", "−3 %", "1e-4", "nan", "0.98 → 0.02", "1 ± 2", "—", "2x"])
    assert not is_numeric(["1", "one"]) and not is_numeric(["", "—"]) and not is_numeric([])


def test_empty_sections_are_fine():
    page = Page("t")
    page.numbers([])
    page.text("Text", [])
    page.table("Table", ["a"], [])
    page.images("Images", ["a"], [])
    page.before_after("Pairs", [])
    page.curves("Curves", {})
    page.command("Command", [])
    assert page.html().count("Nothing to show here.") == 7
    assert Reader(Page("only a title").html()).open == []


def test_contents_only_where_they_help():
    page = Page("t")
    for _ in range(4):
        page.text("Same heading", "words")
    assert "<nav" not in page.html()
    page.text("Fifth", "words")
    assert "<nav" in page.html() and 'href="#same-heading-4"' in page.html()


def test_grid_png_has_the_right_size_and_pixels(tmp_path):
    sheet = images(5)
    sheet[0, 0, 0, 0] = float("nan")
    save_grid(sheet, tmp_path / "grid.png", columns=3, scale=4, gap=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (3 * 34 + 2, 2 * 34 + 2)
        assert picture.getpixel((2, 2))[0] == 0
        expected = tuple((sheet[4, :, 7, 7] * 255).round().int().tolist())
        assert picture.getpixel((2 + 34 + 31, 2 + 34 + 31)) == expected == picture.getpixel((2 + 34 + 28, 2 + 34 + 28))
        assert picture.getpixel((picture.width - 3, picture.height - 3)) == (255, 255, 255)
    with pytest.raises(ValueError, match="n >= 1"):
        save_grid(images(1)[:0], tmp_path / "none.png")
    with pytest.raises(ValueError, match="columns=0"):
        save_grid(images(1), tmp_path / "none.png", columns=0)
