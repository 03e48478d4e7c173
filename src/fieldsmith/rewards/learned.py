"""Judges that are small networks: `classifier` and `classifier-heldout` read colour and shape, with gradients.

Their weights and recipe are in the zoo (shapes-classifier). Train on one and look at the other: what rises under the
first alone is the network being fooled (reward hacking), not a better image.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fieldsmith.errors import InputError
from fieldsmith.rewards.reward import Reward
from fieldsmith.worlds.shapes import COLOURS, SHAPES, parse

FOLDER = pathlib.Path(__file__).parent.parent / "zoo" / "shapes-classifier"


def network(widths: Sequence[int], seed: int = 0) -> nn.Sequential:
    """Three strided convolutions and a mean over places: images (n, 3, 32, 32) in [0, 1] -> (n, 6 + 4) logits.

    The first six are of SHAPES, the last four of COLOURS. Smooth (GELU, group norm), so that gradients reach every
    pixel.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # module constructors draw from the global generator
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 5, stride=2, padding=2), nn.GroupNorm(4, width), nn.GELU()]
        head = nn.Linear(widths[-1], len(SHAPES) + len(COLOURS))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def log_probabilities(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """log p(shape | image) and log p(colour | image) under the network: (n, 6) and (n, 4)."""
    logits = net(images * 2 - 1)
    return logits[:, : len(SHAPES)].log_softmax(1), logits[:, len(SHAPES) :].log_softmax(1)


def classifier(heldout: bool = False) -> Reward:
    """The mean log-probability of the attributes that the prompt names: at most 0, and 0 where it names none.

    Calls raise InputError on images that are not 32 pixels a side, and at a word that the shapes world does not know.
    """
    name = "classifier-heldout" if heldout else "classifier"
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    net = network(card["networks"][name]["widths"])
    net.load_state_dict(load_file(FOLDER / f"{name}.safetensors"))
    net.eval().requires_grad_(False)

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.shape[2:] != (card["size"], card["size"]):
            raise InputError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels; reward '{name}' reads {card['size']} x "
                f"{card['size']}"
            )
        concepts = [parse(prompt) for prompt in prompts]
        weights = torch.zeros(len(concepts), len(SHAPES) + len(COLOURS))  # 1 / number of attributes named, where named
        for row, concept in zip(weights, concepts, strict=True):
            named = [SHAPES.index(concept.shape)] if concept.shape else []
            named += [len(SHAPES) + COLOURS.index(concept.colour)] if concept.colour else []
            row[named] = 1 / max(1, len(named))
        log_p = torch.cat(log_probabilities(net.to(images.device), images.float()), 1)
        return (weights.to(log_p) * log_p).sum(1)

    return Reward(name, True, judge, (net,))
