"""What the teacher says, asked once and kept on disk: shards of states with both branches, shared by arms and seeds.

Shard k follows from (teacher, data, seed, k) alone, so that any run may make it and all runs read it. Training draws
from a window of shards that slides on as rows have been used. On disk, in fp16: the conditional branch, and the gap on
its own, since the difference of two rounded branches would lose it. States and noise are drawn again from their seed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fieldsmith import processes
from fieldsmith.errors import InputError
from fieldsmith.models.branches import Branches, branches
from fieldsmith.models.core import Model
from fieldsmith.models.prompts import encoded_prompts
from fieldsmith.paths import length_of, noised, times_of, truth
from fieldsmith.pictures import Encoded
from fieldsmith.run import write_atomically
from fieldsmith.training import step_generator

SHARD = 2_048  # rows
SEEN = 64  # images of a folder by which a bank knows its data again
META = "bank.json"


@dataclass(frozen=True)
class Source:
    """Clean states (n, ...), or what gives them when rows are asked for; each one's prompt, an index into `prompts`."""

    states: Tensor | Encoded
    prompt: Tensor
    prompts: tuple[str, ...]
    name: str = ""  # of the data

    def __post_init__(self) -> None:
        if not len(self.states):
            raise InputError("there is no data to distil on; give at least one image a class")


@dataclass(frozen=True)
class Rows:
    """States with what the teacher says there; `noise` is the truth in the networks' form of prediction."""

    x_t: Tensor  # (n, ...)
    t: Tensor  # (n,)
    prompt: Tensor  # (n,)
    noise: Tensor  # (n, ...)
    conditional: Tensor  # (n, ...)
    gap: Tensor  # (n, ...)

    def __getitem__(self, rows: Tensor) -> Rows:
        return Rows(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.t)

    @property
    def teacher(self) -> Branches:
        return Branches(self.conditional, self.conditional - self.gap)


def fingerprint(model: Model) -> str:
    """A checksum of a network's weights and of the path and form that they speak in, 16 hexadecimal digits."""
    levels = model.path.alpha(torch.linspace(0, 1, 1001, dtype=torch.float64))
    return _checksum({"kind": model.kind, "levels": levels, **model.network.state_dict()})


def _checksum(parts: Mapping[str, Tensor | str]) -> str:
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        # as bytes: numpy knows no bfloat16
        raw = part.encode() if isinstance(part, str) else part.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw if isinstance(raw, bytes) else raw.numpy().tobytes())
    return digest.hexdigest()[:16]


def states_at(model: Model, source: Source, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random x_0 noised to t (n,): x_t, prompt, and the truth in the model's form; x_0 and noise are fp16 numbers."""
    rows = torch.randint(len(source.states), (len(t),), generator=generator)
    states = source.states[rows]
    x_0 = states.half().to(states)
    eps = torch.randn(x_0.shape, generator=generator).half().to(x_0)
    x_0, eps, t = x_0.to(model.device), eps.to(model.device), t.to(model.device)
    x_t = noised(model.path, x_0, eps, t)
    return x_t, source.prompt[rows], truth(model.kind, model.path, x_0, eps, t)


def sample_of(states: Tensor | Encoded) -> Tensor:
    """States by which data are told from others: all, or as many as are quickly read, and how many there are."""
    if isinstance(states, Tensor):
        return states
    rows = torch.linspace(0, len(states) - 1, min(SEEN, len(states))).long()
    return torch.cat((states[rows].flatten(), torch.tensor([float(len(states))])))


class Bank:
    """Shards of a teacher's answers in a folder, or in memory alone where that is None.

    `teacher_states` counts what this process asked of the teacher.
    """

    def __init__(self, folder: pathlib.Path | None, teacher: Model, source: Source, seed: int = 0):
        """Raises InputError where the folder holds a bank of another teacher, other data or another seed."""
        self.folder, self.teacher, self.source, self.seed = folder, teacher, source, seed
        self.conditions = encoded_prompts(teacher, source.prompts)
        self.teacher_states = 0
        self._shards: dict[int, Rows] = {}
        self._window: tuple[range, Rows] | None = None
        if folder:
            contents: dict[str, Tensor | str] = {
                "states": sample_of(source.states),
                "prompt": source.prompt,
                "prompts": "\n".join(source.prompts),
            }
            self.meta = {
                "teacher": fingerprint(teacher), "data": source.name, "contents of the data": _checksum(contents),
                "seed": seed, "rows a shard": SHARD,
            }  # fmt: skip
            self._check(folder)

    def _check(self, folder: pathlib.Path) -> None:
        file = folder / META
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                found = {}
            odd = [key for key in self.meta if found.get(key) != self.meta[key]]
            if odd:
                raise InputError(
                    f"bank '{folder}' was made with another {odd[0]} ({found.get(odd[0])}, here {self.meta[odd[0]]}); "
                    "name another --bank-folder"
                )
        elif folder.is_file():
            raise InputError(f"bank folder '{folder}' is a file; name a folder")
        elif folder.is_dir() and any(part.name[0] != "." for part in folder.iterdir()):  # others may begin it too
            raise InputError(f"bank folder '{folder}' holds other files; name one that is new or empty")

    def window(self, first: int, count: int) -> Rows:
        """Shards first .. first + count - 1 as one set of rows, sorted by time; made and read where needed."""
        wanted = range(first, first + count)
        if self._window and self._window[0] == wanted:
            return self._window[1]
        self._shards = {k: self._shards[k] if k in self._shards else self._shard(k) for k in wanted}
        parts = [self._shards[k] for k in wanted]
        rows = Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__))
        rows = rows[rows.t.argsort(stable=True)]
        self._window = (wanted, rows)
        return rows

    def _shard(self, k: int) -> Rows:
        generator = step_generator(self.seed, k, stream=11)
        path = self.teacher.path
        # one time from each of SHARD equal slices, whatever the number of indices
        place = (torch.arange(SHARD) + torch.rand(SHARD, generator=generator)) / SHARD * length_of(path)
        t = times_of(path)[place.long().clamp(max=length_of(path) - 1)].float()
        x_t, prompt, noise = states_at(self.teacher, self.source, t, generator)
        if self.folder is None:
            output = self._ask(x_t, t, prompt)
        else:
            file = self.folder / f"shard-{k:05d}.safetensors"
            if not all(processes.exchange(file.is_file())):
                output = self._ask(x_t, t, prompt)
                if processes.is_main():
                    self._write(output, file)
                processes.wait()
            try:
                output = load_file(file)
            except SafetensorError as error:
                raise InputError(f"'{file}' is no whole shard of a bank; delete it, it is made again") from error
        return Rows(x_t, t, prompt, noise, output["conditional"].float(), output["gap"].float())

    @torch.no_grad()
    def _ask(self, x_t: Tensor, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        parts = [
            branches(self.teacher, x_t[rows], t[rows].to(x_t.device), self.conditions[prompt[rows]])
            for rows in processes.owned(len(t)).split(self.teacher.chunk)
        ]
        self.teacher_states += 2 * len(t)
        return {
            "conditional": processes.gather(torch.cat([part.conditional for part in parts]).half().cpu()),
            "gap": processes.gather(torch.cat([part.gap for part in parts]).half().cpu()),
        }

    def _write(self, tensors: dict[str, Tensor], file: pathlib.Path) -> None:
        if not (file.parent / META).is_file():
            write_atomically(file.parent / META, json.dumps(self.meta, indent=1) + "\n")
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            save_file(tensors, beside)
        except SafetensorError as error:  # how safetensors reports a full disk
            beside.unlink(missing_ok=True)
            raise OSError(errno.EIO, str(error), str(file)) from error
        os.replace(beside, file)


def place(step: int, rows_a_step: int, window: int, reuse: float) -> tuple[int, int]:
    """First shard and number of shards of a step's window, which slides by one shard for every reuse x SHARD rows."""
    count = max(1, -(-window // SHARD))
    return int(step * rows_a_step // (reuse * SHARD)), count


def draw(n: int, rows: int, law: tuple[float, float], stratify: bool, generator: torch.Generator) -> Tensor:
    """Which of `n` rows, sorted by time, a batch of `rows` takes; (rows,), in order of time where stratified.

    Quantiles are uniform, or of the Beta law (a, b) of t.
    """
    u = torch.rand(rows, generator=generator)
    if stratify:
        u = (torch.arange(rows) + u) / rows
    if law != (1.0, 1.0):
        from scipy.stats import beta

        u = torch.from_numpy(beta.ppf(u.double().numpy(), *law)).float()
    return (u * n).long().clamp(max=n - 1)
