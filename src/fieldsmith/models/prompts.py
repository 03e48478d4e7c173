"""The prompts of a run, encoded when they are asked for and kept within bounds: in memory, then on disk.

In: a model and its prompts, however many. Out: rows of their conditions, and where long ones are cut. A prompt of SD3.5
takes 5.4 MB, so that 50,000 of them at once would take 270 GB.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.utils import logging as of_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as of_transformers

from fieldsmith.models.core import Condition, Model, picked, stack

MEMORY = 2e9  # bytes that encoded prompts may take in memory
DISK = 2e10  # and on disk
FEW = 64  # prompts that are encoded at the start
TOGETHER = 16  # prompts that are encoded at once


class Prompts:
    """Encoded prompts by their place in `words`; the least recently used leave memory for disk, and disk for good."""

    def __init__(self, model: Model, words: Sequence[str], memory: float = MEMORY, disk: float = DISK):
        """Raises InputError at a word that the model does not know; nothing is encoded yet."""
        model.check_prompts(words)
        self.model, self.words = model, tuple(words)
        self.memory, self.disk = memory, disk
        self._kept: OrderedDict[int, Condition] = OrderedDict()  # on the CPU, a row each
        self._filed: OrderedDict[int, int] = OrderedDict()  # bytes of those on disk
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # gone with this object

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: Tensor | Sequence[int]) -> Condition:
        """Prompts (n,) as n rows, on the model's device."""
        places, back = torch.unique(torch.as_tensor(rows).cpu(), return_inverse=True)
        different = self._rows(places.tolist() or [0])  # no rows have a shape, too
        condition = stack(different) if len(different) > 1 else different[0]
        parts = {name: part.to(self.model.device)[back] for name, part in condition.parts.items()}
        return Condition(parts, picked(condition.words, back))

    def _rows(self, places: list[int]) -> list[Condition]:
        found = {place: self._read(place) for place in places}
        missing = [place for place, row in found.items() if row is None]
        for start in range(0, len(missing), TOGETHER):
            some = missing[start : start + TOGETHER]
            encoded = self.model.encode([self.words[place] for place in some])
            for row, place in enumerate(some):
                parts = {name: part[row : row + 1].cpu().clone() for name, part in encoded.parts.items()}
                one = Condition(parts, (self.words[place],))
                found[place] = one
                self._keep(place, one)
        return [row for row in found.values() if row is not None]

    def _read(self, place: int) -> Condition | None:
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        if place not in self._filed:
            return None
        row = Condition(load_file(self._file(place)), (self.words[place],))
        self._keep(place, row)
        return row

    def _keep(self, place: int, row: Condition) -> None:
        self._kept[place] = row
        self._bytes += _size(row)
        while self._bytes > self.memory and len(self._kept) > 1:
            gone, old = self._kept.popitem(last=False)
            self._bytes -= _size(old)
            if gone not in self._filed and self.disk:
                save_file({name: part.contiguous() for name, part in old.parts.items()}, self._file(gone))
                self._filed[gone] = _size(old)
        while sum(self._filed.values()) > self.disk:
            self._file(self._filed.popitem(last=False)[0]).unlink()

    def _file(self, place: int) -> pathlib.Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fieldsmith-prompts-")
        return pathlib.Path(self._folder.name) / f"{place}.safetensors"


def _size(row: Condition) -> int:
    return sum(part.numel() * part.element_size() for part in row.parts.values())


def encoded_prompts(model: Model, words: Sequence[str]) -> Condition | Prompts:
    """Prompts as rows: all of a model of classes and few of others at once, many when they are asked for.

    Raises InputError at a word that the model does not know.
    """
    if len(words) <= FEW or getattr(model, "classes", None):
        return model.encode(words)
    return Prompts(model, words)


def cut_words(readers: Mapping[str, tuple[Any, int]], prompts: Sequence[str]) -> str:
    """Of prompts that are longer than an encoder reads, how many they are and after which word the first is cut.

    `readers` are tokenizers by their name, each with how many tokens of a prompt its encoder reads. '' where all of
    every prompt is read.
    """
    said = []
    for name, (tokenizer, room) in readers.items():
        cut = {}
        # hardly any token is shorter than a byte, so that short prompts need no second look
        for prompt in [prompt for prompt in dict.fromkeys(prompts) if 2 * len(prompt.encode()) > room]:
            tokens = tokenizer(prompt, add_special_tokens=False).input_ids
            if len(tokens) > room:
                cut[prompt] = tokenizer.decode(tokens[:room]).split()[-1:]
        for prompt, last in list(cut.items())[:1]:
            where = f"after '{last[0]}'" if last else "at its start"
            said.append(f"{len(cut)} by {name} after {room} tokens, such as '{_short(prompt)}' {where}")
    if not said:
        return ""
    return f"of {len(set(prompts))} prompts some are longer than an encoder reads and are cut: {'; '.join(said)}"


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else f"{prompt[:60]}..."


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own words on every batch of prompts that they cut."""
    with ExitStack() as stack:
        for library in (of_diffusers, of_transformers):
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
        yield
