"""Functions that users write: how a name in a string becomes one, and how their errors are described in one line.

Rewards, judges and methods are all named in the same way: `file.py:name` or `package.module:name`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fieldsmith.errors import InputError, RewardError, RunError

OURS = str(pathlib.Path(__file__).parent)
LIBRARIES = tuple({path for name, path in sysconfig.get_paths().items() if "lib" in name})
LONGEST = 200  # characters of an exception that are shown


def load_function(words: str, kind: str = "function") -> Callable[..., Any]:
    """The function at `file.py:name` or `package.module:name`; `kind` says in messages what it serves as.

    A file is run again each time, so that an edited one counts; modules in its folder can be imported from it.
    Raises InputError where the words have another form, the file or module cannot be run, or holds no such function.
    """
    place, _, name = words.rpartition(":")
    if not place or not name.isidentifier():
        raise InputError(f"{kind} '{words}' is no file.py:name or package.module:name; name a function like that")
    try:
        module = _run_file(pathlib.Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        fix = "install it" if place.endswith(".py") else "put its folder on PYTHONPATH, or write file.py:name"
        raise InputError(f"{kind} '{words}' cannot be loaded: {describe(error)}; {fix}") from error
    except (Exception, SystemExit) as error:  # whatever a user's file may raise while it runs
        raise InputError(f"{kind} '{words}' cannot be loaded: {describe(error)}; fix the file") from error
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "name a function that it has"
        raise InputError(f"{kind} '{words}' cannot be loaded: '{place}' has no '{name}'; {hint}")
    if not callable(function) or isinstance(function, type):
        raise InputError(f"{kind} '{words}' is a {type(function).__name__}, not a function; name a function")
    return function


def _run_file(path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"file '{path}' does not exist")
    spec = importlib.util.spec_from_file_location(f"_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look it up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a user's random.py hides nothing
    spec.loader.exec_module(module)
    return module


def name_of(function: Any) -> str:
    """What a function calls itself: its `name` if it has one, else its `__name__`, else its type's."""
    name = getattr(function, "name", None)
    return name if isinstance(name, str) else getattr(function, "__name__", type(function).__name__)


def check_signature(function: Callable[..., Any], what: str, *arguments: str) -> None:
    """Raise RewardError if the function cannot be called with that many arguments; `what` is e.g. "reward 'f'"."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not say
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise RewardError(
            f"{what} takes {signature}, but it is called with ({', '.join(arguments)}); change what it takes ({error})"
        ) from error


def call(function: Callable[..., Any], what: str, about: str, *arguments: Any) -> Any:
    """function(*arguments). Whatever it raises becomes a RewardError: `what` failed, e.g. "reward 'f'", and `about`
    which inputs, e.g. "an image of prompt 'a cat'"; our own errors, which say what is wrong, stay as they are."""
    try:
        return function(*arguments)
    except (InputError, RunError):
        raise
    except (Exception, SystemExit) as error:  # whatever a user's function may raise
        raise RewardError(
            f"{what} raised {describe(error)} for {about}; fix the function, --debug shows its lines"
        ) from error


def describe(error: BaseException) -> str:
    """An exception on one line, with the user's line that raised it: 'ValueError: too dark (mine.py, line 7)'."""
    words = " ".join(str(error).split())
    words = f": {words[:LONGEST]}" if words else ""
    frames = user_frames(error)
    place = f" ({pathlib.Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{words}{place}"


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of a traceback that are neither fieldsmith's nor a library's, outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith((OURS, "<frozen", *LIBRARIES))]


def user_traceback(error: BaseException) -> str:
    """What `--debug` prints: the user's own frames of the exception behind an error; '' where none of them failed."""
    cause = error.__cause__
    frames = user_frames(cause) if cause else []
    if not frames:
        return ""
    return "".join(["In your code:\n", *traceback.format_list(frames), *traceback.format_exception_only(cause)])
