"""Cut the emoji world's pictures out of the font that they come from, once: src/fieldsmith/worlds/emoji.png.

`python -m experiments.zoo.emoji_glyphs NotoColorEmoji.ttf`; the font is Debian's fonts-noto-color-emoji 2.042.
"""

from __future__ import annotations

import pathlib
import sys

from PIL import Image, ImageDraw, ImageFont

from fieldsmith.worlds.emoji_captions import OBJECTS
from fieldsmith.worlds.emoji_glyphs import ATLAS, CELL, COLUMNS

GLYPHS = {
    "cat": "🐱", "dog": "🐶", "fox": "🦊", "panda": "🐼", "frog": "🐸", "pig": "🐷", "lion": "🦁", "chick": "🐤",
    "bear": "🐻", "koala": "🐨", "rabbit": "🐰", "monkey": "🐵", "penguin": "🐧", "mouse": "🐭",
    "apple": "🍎", "banana": "🍌", "lemon": "🍋", "orange": "🍊", "pear": "🍐", "strawberry": "🍓", "pineapple": "🍍",
    "watermelon": "🍉", "pizza": "🍕", "donut": "🍩", "cookie": "🍪", "burger": "🍔", "carrot": "🥕", "cake": "🍰",
    "mushroom": "🍄", "car": "🚗", "bus": "🚌", "rocket": "🚀", "tractor": "🚜", "truck": "🚚", "train": "🚆",
    "boat": "⛵", "bicycle": "🚲", "ball": "⚽", "star": "⭐", "heart": "❤", "sun": "🌞", "tree": "🌲", "house": "🏠",
    "umbrella": "☂", "tulip": "🌷", "moon": "🌙", "balloon": "🎈", "crown": "👑",
}  # fmt: skip
STRIKE = 109  # the one size of a bitmap colour font, in pixels


def glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Its ink alone, as large as a cell allows and in the middle of it; RGBA."""
    drawn = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(drawn).text((4, 4), character, font=font, embedded_color=True)
    ink = drawn.crop(drawn.getbbox())
    scale = CELL / max(ink.size)
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(ink, ((CELL - ink.width) // 2, (CELL - ink.height) // 2))
    return cell


def main(font_file: pathlib.Path) -> None:
    font = ImageFont.truetype(str(font_file), STRIKE)
    atlas = Image.new("RGBA", (COLUMNS * CELL, -(-len(OBJECTS) // COLUMNS) * CELL))
    for i, name in enumerate(OBJECTS):
        atlas.paste(glyph(GLYPHS[name], font), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    atlas.save(ATLAS, optimize=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
