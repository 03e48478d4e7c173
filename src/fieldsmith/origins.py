"""What a run was made from beside its settings: code of the user's own, data, weights. A digest of each, by name.

A resumed run compares them with those that it began with, so that none of them changes in the middle without a word.
Code is read; of data and weights names, sizes and times of change are enough, since reading them all could take hours.
Weights of the zoo and of the hub's cache are known by their content and by their snapshot's name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fieldsmith.functions import LIBRARIES, OURS

UNTRACKED = ("out", "bank_folder", "prompts")  # prompts are settings themselves, once they are read
FILE = re.compile(r"[^:*+]+\.py(?=:)")  # of a function, in words such as 0.5*mine.py:score
FOLDER = re.compile(r"^(?:[^*]*\*)?\s*\w+:(?P<path>.+)$")  # of a pretrained reward: clip:FOLDER
DEPTH = 4  # of objects inside of objects


def of(config: Any, *given: Any) -> dict[str, str]:
    """Digests by what they are of: 'code mine.py', 'model', 'data'. `given` are functions, and objects that hold some.

    A function whose text cannot be had, and what lies on servers, is left out.
    """
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for words in value if isinstance(value, tuple) else (value,):
            if not isinstance(words, (str, pathlib.Path)) or field.name in UNTRACKED or not str(words):
                continue
            for file in map(pathlib.Path, FILE.findall(str(words))):
                if file.is_file():
                    found[f"code {file.name}"] = _code(file)
            within = FOLDER.match(str(words))
            for path in (str(words), within["path"] if within else ""):
                if path and _exists(pathlib.Path(path).expanduser()):
                    found[field.name] = _files(pathlib.Path(path).expanduser())
    for function in (function for one in given for function in _functions(one, DEPTH)):
        text = _text(function)
        if text is not None:
            found[f"code {text[0]}"] = text[1]
    return found


def weights(folder: pathlib.Path, content: bool = False) -> str:
    """The digest of a pipeline's folder; with `content` of what its files hold, for small ones."""
    if folder.parent.name == "snapshots":  # of the hub's cache, which names them by their content
        return folder.name
    return _content(folder) if content else _files(folder)


def snapshot(name: str) -> pathlib.Path | None:
    """Where the hub's cache holds a pipeline of this id; None where it does not."""
    index = try_to_load_from_cache(name, "model_index.json")
    return pathlib.Path(index).parent if isinstance(index, str) else None


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than names may be
        return False


def _code(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@functools.cache
def _content(folder: pathlib.Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)} {_code(path)}\n".encode())
    return digest.hexdigest()


def _files(path: pathlib.Path) -> str:
    """Of one file, or of all below a folder: names, sizes, times of change."""
    digest = hashlib.sha256()
    for name, stat in sorted(_stats(path, "")):
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stats(path: pathlib.Path | str, name: str) -> Iterator[tuple[str, os.stat_result]]:
    if not os.path.isdir(path):
        yield name, os.stat(path)
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _stats(entry.path, f"{name}/{entry.name}")
            elif entry.is_file():  # what a link points to, too
                yield f"{name}/{entry.name}", entry.stat()


def _functions(value: Any, depth: int) -> Iterator[Any]:
    """Functions of the user's own in an object, its fields and what they wrap."""
    if depth == 0 or value is None or isinstance(value, (str, int, float, pathlib.Path)):
        return
    if isinstance(value, functools.partial):
        yield from _functions(value.func, depth - 1)
    elif isinstance(value, (list, tuple)):
        for one in value[:16]:  # rewards; not a data set
            yield from _functions(one, depth - 1)
    elif isinstance(value, dict):
        yield from _functions(list(value.values()), depth - 1)
    elif inspect.isfunction(value) or inspect.ismethod(value):
        yield value
    elif _is_users(sys.modules.get(type(value).__module__)):
        yield type(value)
    elif hasattr(value, "__dict__"):
        for one in vars(value).values():
            yield from _functions(one, depth - 1)


def _is_users(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and not file.startswith((OURS, *LIBRARIES))


def _text(function: Any) -> tuple[str, str] | None:
    """The file's name and its digest, or of what was typed in a notebook the function's; None where it is ours."""
    module = sys.modules.get(function.__module__)
    if _is_users(module):
        return pathlib.Path(str(module.__file__)).name, _code(pathlib.Path(str(module.__file__)))  # type: ignore[union-attr]
    if getattr(module, "__file__", None) or function.__module__ in sys.builtin_module_names:
        return None
    try:
        return function.__qualname__, hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):
        return None
