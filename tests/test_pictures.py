"""One image as users have it: turned upright, made opaque, scaled to 8 bits, cut to a square; and many, read lazily."""

from __future__ import annotations

import gc
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fieldsmith import pictures
from fieldsmith.errors import InputError
from fieldsmith.pictures import Encoded, Frame, Images, encoded, look, read

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def colours(tensor: torch.Tensor) -> list[list[tuple[int, ...]]]:
    """(channels, height, width) bytes as rows of colours."""
    return [[tuple(pixel) for pixel in row] for row in tensor.permute(1, 2, 0).tolist()]


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, whose pixels would take far more than its file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = zlib.compressobj(1)
    rows = b"".join(packed.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# upright, opaque, 8 bits


@pytest.mark.parametrize(("orientation", "first"), [(1, (0, 0)), (3, (3, 3)), (6, (0, 3)), (8, (3, 0)), (2, (0, 3))])
def test_a_photograph_is_turned_as_its_exif_says(tmp_path, orientation, first):
    image = Image.new("RGB", (4, 4), (255, 255, 255))
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    seen = read(tmp_path / "turned.png", Frame(4, 1))[0]
    assert [tuple(place) for place in (seen == 0).nonzero().tolist()] == [first]


def with_key() -> Image.Image:
    """RGB whose red is transparent."""
    image = Image.new("RGB", (2, 2), RED)
    image.putpixel((0, 0), BLUE)
    image.info["transparency"] = RED
    return image


def with_palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 0)
    image.info["transparency"] = 1
    return image


def with_alpha() -> Image.Image:
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    image.putpixel((0, 0), (*BLUE, 255))
    return image


@pytest.mark.parametrize("made", [with_key, with_palette, with_alpha])
@pytest.mark.parametrize(("background", "behind"), [("white", (255, 255, 255)), ("#008000", GREEN)])
def test_what_is_transparent_shows_the_background(tmp_path, made, background, behind):
    image = made()
    image.save(tmp_path / "a.png", transparency=image.info.get("transparency"))
    seen = read(tmp_path / "a.png", Frame(2, background=background))
    assert colours(seen) == [[BLUE, behind], [behind, behind]]


def test_half_transparent_grey_is_mixed_with_the_background():
    image = Image.new("LA", (2, 2), (0, 128))
    assert read(image, Frame(2, 1)).unique().tolist() == [127]
    assert read(image, Frame(2, 1, background="black")).unique().tolist() == [0]


DEEP = np.array([[0, 255], [32_768, 65_535]])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (DEEP.astype(np.uint16), [0, 1, 128, 255]),
        (DEEP.astype(np.int32), [0, 1, 128, 255]),
        ((DEEP / 65_535).astype(np.float32), [0, 1, 128, 255]),
        (DEEP.astype(np.float32), [0, 1, 128, 255]),
        (np.array([[0, 51], [102, 255]], np.float32), [0, 51, 102, 255]),
        (np.array([[-1, 0], [0, 1]], np.float32), [0, 128, 128, 255]),
        (np.array([[0, 1], [1, 0]], bool), [0, 255, 255, 0]),
        (np.array([[5e6, 5e6], [5e6, 5e6]], np.float32), [0, 0, 0, 0]),
    ],
    ids=[
        "16 bits",
        "32 bits",
        "floats to 1",
        "floats to 65535",
        "floats to 255",
        "floats from -1",
        "bits",
        "one level",
    ],
)
def test_deep_images_are_scaled_and_not_cut_off(tmp_path, numbers, expected):
    assert read(numbers, Frame(2, 1)).flatten().tolist() == expected
    if numbers.dtype in (np.uint16, np.float32):
        file = tmp_path / ("deep.png" if numbers.dtype == np.uint16 else "deep.tif")
        Image.fromarray(numbers).save(file)
        assert read(file, Frame(2, 1)).flatten().tolist() == expected
        assert read(file, Frame(2)).shape == (3, 2, 2)


def test_a_float_that_is_no_number_is_refused():
    with pytest.raises(InputError, match=r"an image cannot be read \(it holds NaN or infinity\); remove it"):
        read(np.array([[0, np.nan], [0, 0]], np.float32), Frame(2))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_inks_become_colours(tmp_path, suffix):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.save(tmp_path / f"ink.{suffix}")
    red, green, blue = read(tmp_path / f"ink.{suffix}", Frame(16)).float().mean((1, 2)).tolist()
    assert red > 200 and green < 60 and blue < 60


# square


def stripes() -> Image.Image:
    """Three squares side by side: red, green, blue."""
    image = Image.new("RGB", (12, 4), RED)
    image.paste(GREEN, (4, 0, 8, 4))
    image.paste(BLUE, (8, 0, 12, 4))
    return image


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        ("crop", [GREEN, GREEN, GREEN]),
        ("squash", [RED, GREEN, BLUE]),
        ("pad", [(0, 0, 0), None, (0, 0, 0)]),
    ],
)
def test_an_image_is_cut_squashed_or_padded(fit, expected, turned):
    image = stripes().rotate(-90, expand=True) if turned else stripes()
    seen = read(image, Frame(3, fit=fit, background="black"))
    rows = colours(seen.mT if turned else seen)
    if fit == "pad":  # bars lie beside the long side
        assert [row[0] for row in rows] == [(0, 0, 0), RED, (0, 0, 0)] and rows[1] == [RED, GREEN, BLUE]
    else:
        assert rows == [expected] * 3


def test_what_has_the_size_already_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), pixels, expected,
                  {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}):  # fmt: skip
        for fit in ("crop", "squash", "pad"):
            assert torch.equal(read(image, Frame(6, fit=fit)), expected)
    exact = torch.rand(3, 6, 6)
    assert torch.equal(read(exact, Frame(6)), exact) and torch.equal(read(exact.numpy(), Frame(6)), exact)


def test_a_large_photograph_is_decoded_smaller_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:640, :1000] / 40
    waves = np.stack((np.sin(x), np.cos(y), np.sin(x + y)), -1) * 100 + 128
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    whole = Image.open(tmp_path / "a.jpg")
    whole.load()
    quick, slow = read(tmp_path / "a.jpg", Frame(32)).float(), read(whole, Frame(32)).float()
    assert float((quick - slow).abs().mean()) < 2 and whole.size == (1000, 640)


# refused


@pytest.mark.parametrize("side", [20_000, 10_000])  # beyond and within what Pillow itself refuses
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    file = tmp_path / "large.png"
    file.write_bytes(png(side, side))
    assert file.stat().st_size < 1_000_000
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reads in (look, lambda path: read(path, Frame(8))):
            with pytest.raises(InputError, match=r"large.png' (has 10,000 x 10,000|is too large).*at most 89,478,485"):
                reads(file)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 1), (1, 50)])
def test_an_image_of_one_pixel_a_side_is_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "dot.png")
    with pytest.raises(InputError, match=rf"dot.png' has {size[0]} x {size[1]} pixels; remove it, or give one of at"):
        look(tmp_path / "dot.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9])
def test_a_file_that_was_cut_short_is_refused_by_name(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(InputError, match=rf"^image '.*cut.{suffix}' cannot be read \([^\n]*\); remove it or save it"):
        read(file, Frame(8))


def test_other_shapes_and_settings_are_refused():
    with pytest.raises(InputError, match=r"shape \(3, 4, 4\) from 0 to 1; give tensors \(3, 8, 8\) in \[0, 1\]"):
        read(torch.eye(4).expand(3, 4, 4), Frame(8))
    with pytest.raises(InputError, match="from -1 to 1"):
        read(torch.eye(4).expand(3, 4, 4) * 2 - 1, Frame(4))
    with pytest.raises(InputError, match="'whitish' is no colour; give a name such as black"):
        Frame(8, background="whitish")
    with pytest.raises(InputError, match="size=0: images need at least 1 pixel"):
        Frame(0)
    with pytest.raises(InputError, match=r"image 'gone.png' cannot be read \(No such file or directory\)"):
        read("gone.png", Frame(8))


def test_animated_files_are_told_from_others_and_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert look(tmp_path / f"a.{suffix}")
        assert colours(read(tmp_path / f"a.{suffix}", Frame(8)))[0][0] == pytest.approx(RED, abs=3)
    frames[0].save(tmp_path / "still.gif")
    assert not look(tmp_path / "still.gif") and not look(frames[0])
    frames[0].save(tmp_path / "pair.mpo", save_all=True, append_images=frames[1:])  # two views, not an animation
    assert not look(tmp_path / "pair.mpo")


def test_a_file_that_was_looked_at_is_closed(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        look(tmp_path / "a.png")
        read(tmp_path / "a.png", Frame(8))
        gc.collect()
    assert not said


# many


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> tuple[Images, list[int]]:
    """20 images whose level is their number, and the numbers of those that were asked for."""
    asked: list[int] = []

    def get(i: int) -> np.ndarray:
        asked.append(i)
        return np.full((4, 4), i, np.uint8)

    return Images(get, 20, Frame(4, 1)), asked


def test_rows_are_read_when_they_are_asked_for_and_once(many):
    images, asked = many
    assert len(images) == 20 and images.shape == (20, 1, 4, 4) and not asked
    assert (images[torch.tensor([3, 3, 7])] * 255)[:, 0, 0, 0].tolist() == [3, 3, 7]
    assert sorted(set(asked)) == [3, 7]
    part = images.part(torch.arange(20) % 2 == 1)
    assert len(part) == 10 and (part[:3] * 255)[:, 0, 0, 0].round().tolist() == [1, 3, 5]
    assert asked.count(3) == asked.count(7) == 1  # a part shares what was read
    assert images[20:].shape == (0, 1, 4, 4)
    assert [len(some) for some in images.split(8)] == [8, 8, 4]


def test_memory_is_bounded_whatever_their_number(many, monkeypatch):
    images, asked = many
    monkeypatch.setattr(pictures, "KEPT", 5 * 16)
    everything = images[:]
    assert len(images._kept) == 5 and torch.equal(images[:], everything)
    assert len(asked) == 20 + 15


def test_encoding_waits_too_and_is_the_same(many):
    images, asked = many
    function = lambda some: some.repeat(1, 3, 1, 1) - 0.5  # noqa: E731
    lazily = encoded(images, function)
    assert isinstance(lazily, Encoded) and lazily.shape == (20, 3, 4, 4) and lazily.ndim == 4 and set(asked) == {0}
    rows = torch.tensor([19, 2, 2])
    assert torch.equal(lazily[rows], encoded(images[:], function)[rows]) and set(asked) == set(range(20))
    assert torch.equal(lazily[:2], function(images[:2]))
