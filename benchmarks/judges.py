"""`python -m benchmarks.judges`: how far judges that packages bring agree with what is known of images; results/judges.

OCR on words that are written here, in sizes and on grounds of several kinds; NudeNet on images that show nobody naked;
the zoo's classifiers, as a user's function, on a model's images that an exact judge reads too. Minutes on one core.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matplotlib
import numpy
import sklearn.datasets
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.claims import claim
from experiments.study import render
from fieldsmith.measure import detect
from fieldsmith.measure.drawing import sampler
from fieldsmith.measure.intervals import Interval
from fieldsmith.models import load
from fieldsmith.rewards import learned
from fieldsmith.run import plain, write_atomically
from fieldsmith.worlds.emoji import EmojiWorld
from fieldsmith.worlds.shapes import ShapesWorld, caption
from fieldsmith.worlds.shapes_groups import trained

OUT = pathlib.Path("results/judges")
COMMAND = "python -m benchmarks.judges"
SIDE = 256  # pixels of an image with words
VOCABULARY = (
    "OPEN", "closed", "Bakery", "EXIT", "no entry", "Hotel", "STOP", "for sale", "Museum", "taxi", "DANGER", "welcome",
    "Library", "one way", "police", "Theatre",
)  # fmt: skip
MODEL = "zoo:shapes-flux-small"  # right in about 61% of its images, so that there is something to tell apart


@dataclass(frozen=True)
class Row:
    """A judge beside the truth, on images of one kind."""

    judge: str
    images: str
    agrees: Interval
    hits: Interval | None  # share that it sees where it is
    false_alarms: Interval | None  # and where it is not


def row(judge: str, images: str, said: Tensor, truth: Tensor) -> Row:
    return Row(judge, images, *detect.agreement(said, truth).values())


# written words


def written(words: str, size: int, ink: str, ground: Tensor, tilt: float = 0.0) -> Tensor:
    """The words in the middle of a ground (3, SIDE, SIDE) in [0, 1]."""
    pixels = (ground * 255).round().byte().permute(1, 2, 0).numpy()
    font = ImageFont.truetype(pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
    layer = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(layer).text((SIDE // 2, SIDE // 2), words, fill=255, font=font, anchor="mm")
    image = Image.fromarray(pixels)
    image.paste(ink, mask=layer.rotate(tilt, Image.Resampling.BICUBIC))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255


def flat(level: float) -> Tensor:
    return torch.full((3, SIDE, SIDE), level)


def grounds(n: int) -> dict[str, Callable[[str, int], Tensor]]:
    """Kinds of images with words: (words, number of the image) -> an image."""
    emoji = EmojiWorld(48).sample(n, 5).images
    large = torch.nn.functional.interpolate(emoji, (SIDE, SIDE), mode="bilinear")

    def noisy(words: str, at: int) -> Tensor:
        noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(at))
        return (written(words, 32, "black", flat(0.8)) + 0.2 * noise).clamp(0, 1)

    return {
        "black on white, letters of 32 pixels": lambda words, at: written(words, 32, "black", flat(1.0)),
        "of 12 pixels": lambda words, at: written(words, 12, "black", flat(1.0)),
        "grey on grey (10% contrast)": lambda words, at: written(words, 32, "#737373", flat(0.55)),
        "under noise of 0.2": noisy,
        "tilted by 20 degrees": lambda words, at: written(words, 32, "black", flat(1.0), 20),
        "yellow over an emoji scene": lambda words, at: written(words, 32, "yellow", large[at]),
    }


def reading(n: int) -> Iterator[Row]:
    """Each image has one of the words; the judge is asked for it in one half and for another one in the other."""
    judge = detect.load("ocr")
    for kind, draw in grounds(n).items():
        said, truth = [], []
        for at in range(n):
            words, other = VOCABULARY[at % len(VOCABULARY)], VOCABULARY[(at + 5) % len(VOCABULARY)]
            true = at % 2 == 0
            score = judge.score(draw(words, at)[None], [words if true else other])[0, 0]
            said.append(bool(score >= judge.threshold))
            truth.append(true)
        yield row("ocr: the word asked for", kind, torch.tensor(said), torch.tensor(truth))
    emoji = torch.nn.functional.interpolate(EmojiWorld(48).sample(n, 7).images, (SIDE, SIDE), mode="bilinear")
    said_any = judge.score(emoji, ["text"])[:, 0] >= judge.threshold
    yield row("ocr: any text", "emoji scenes, where nothing is written", said_any, torch.zeros(n, dtype=torch.bool))


# nudity, of which no image can be made here


def clothed(n: int) -> dict[str, Tensor]:
    """Images (n, 3, side, side) on which nobody is naked."""
    photographs = [*sklearn.datasets.load_sample_images().images, _portrait()]
    generator = torch.Generator().manual_seed(11)
    crops = []
    for at in range(n):
        photograph = torch.from_numpy(photographs[at % len(photographs)].copy()).permute(2, 0, 1) / 255
        side = int(min(photograph.shape[1:]) * (0.5 + 0.5 * torch.rand((), generator=generator)))
        top, left = (int(torch.randint(x - side + 1, (), generator=generator)) for x in photograph.shape[1:])
        crop = photograph[None, :, top : top + side, left : left + side]
        crops.append(torch.nn.functional.interpolate(crop, (320, 320), mode="bilinear", antialias=True))
    return {
        "crops of three photographs (a temple, a flower, a portrait in uniform)": torch.cat(crops),
        "the emoji world": EmojiWorld(48).sample(n, 3).images,
        "the shapes world": ShapesWorld(32).sample(n, 3).images,
        "noise": torch.rand(n, 3, 64, 64, generator=generator),
    }


def _portrait() -> numpy.ndarray:
    with Image.open(pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        return numpy.array(image.convert("RGB"))


def nudity(n: int) -> Iterator[Row]:
    judge = detect.load("nudenet")
    for kind, images in clothed(n).items():
        said = judge.score(images, ["nudity"])[:, 0] >= judge.threshold
        yield row("nudenet: nudity", kind, said, torch.zeros(n, dtype=torch.bool))


# a function of the user's own, beside an exact judge


def functions(n: int) -> Iterator[Row]:
    """The zoo's two classifiers on a model's own images, asked for what each prompt asked for."""
    asked = [concept for concept in trained() for _ in range(n // len(trained()) or 1)]
    images = sampler(load(MODEL))([caption(concept) for concept in asked], 0)
    exact = ShapesWorld(images.shape[-1]).judge(images)
    truth = torch.tensor([bool(exact.shows(concept)[at]) for at, concept in enumerate(asked)])
    for name, heldout in (("classifier", False), ("classifier-heldout", True)):
        reward = learned.classifier(heldout)

        def shows(images: Tensor, concepts: list[str], reward: learned.Reward = reward) -> Tensor:
            return reward(images, concepts).exp()  # the geometric mean of two probabilities

        judge = detect.load(shows)
        prompts = [detect.Prompt(caption(concept), caption(concept)) for concept in asked]
        said = detect.Pictures(judge, ()).judge(images).answers(prompts)
        yield row(f"a function: the zoo's {name}", f"what {MODEL} draws, asked for each prompt", said, truth)


def main(n: int = 48, drawn: int = 230) -> None:
    torch.set_num_threads(1)
    found = [*reading(n), *nudity(2 * n), *functions(drawn)]
    clean, photographs, classifier = found[0], next(one for one in found if "photographs" in one.images), found[-2]
    assert clean.hits and photographs.false_alarms
    claims = [
        _share("judges.ocr_word_read", "OCR sees the word that is written, black on white, letters of 32 pixels",
               clean.hits, clean.hits.value >= 0.95),
        _share("judges.nudenet_false_alarms", "NudeNet, from 0.6 on, sees nudity in crops of photographs without any",
               photographs.false_alarms, photographs.false_alarms.value <= 0.05),
        _share("judges.function_agrees", f"the zoo's classifier agrees with the exact judge on images of {MODEL}",
               classifier.agrees, classifier.agrees.value >= 0.9),
    ]  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT / "summary.json", json.dumps({"claims": claims}, indent=1) + "\n")
    write_atomically(OUT / "rows.json", json.dumps([plain(dataclasses.asdict(one)) for one in found], indent=1) + "\n")
    table = [
        (
            one.judge,
            one.images,
            one.agrees.n,
            *(p.short() if p else "-" for p in (one.agrees, one.hits, one.false_alarms)),
        )
        for one in found
    ]
    write_atomically(OUT / "README.md", render("judges.md.jinja", command=COMMAND, claims=claims, rows=table))


def _share(name: str, statement: str, found: Interval, good: bool) -> dict[str, object]:
    return {**claim(name, statement, found.value, "share", good, COMMAND), "low": found.low, "high": found.high}


if __name__ == "__main__":
    main()
