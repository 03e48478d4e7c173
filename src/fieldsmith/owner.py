"""Who owns a run directory: one launch at a time, which a file in the folder names with its machine.

The file is made by exclusive creation, which network disks keep to, and holds what is needed to see that its process is
gone: a process number and when that process began, so that a number that the system gave out again is no owner. Whether
a process of another machine still runs cannot be seen from here, so that lock is removed by hand.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import socket
import time
from typing import Any

import psutil

from fieldsmith.errors import InputError

FILE = ".owner"
PATIENCE = 2.0  # seconds in which who made the file has written into it, unless it is gone
SAME = 5.0  # seconds by which one process's beginning may differ between two askings, where clocks are set

_held: set[pathlib.Path] = set()  # by this process, so that they go with it


def check(folder: pathlib.Path) -> None:
    """Raises InputError, in a sentence that names it, where another living process owns the folder."""
    _refuse(folder, _read(folder / FILE))


def take(folder: pathlib.Path) -> None:
    """Own the folder, which is there, until `release` or the end of this process. What this process owns already it
    keeps, and what is left of a process that is gone is taken over. Raises InputError where another one owns it."""
    path, mine = folder / FILE, _myself()
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            found = _read(path)
            _refuse(folder, found)
            if found is not None and _is_mine(found):
                break
            _remove_stale(path, found)
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(mine))
        if _read(path) == mine:  # else it was slow, and somebody took it for one that is gone
            break
    if not _held:
        atexit.register(_release_all)
    _held.add(path.absolute())


def release(folder: pathlib.Path) -> None:
    """Let go of a folder that this process owns; of others nothing happens."""
    path = folder.absolute() / FILE
    found = _read(path) if path in _held else None
    _held.discard(path)
    if found is not None and _is_mine(found):
        with contextlib.suppress(OSError):  # the folder may have gone, or its disk may be read-only by now
            path.unlink()


def _release_all() -> None:
    for path in list(_held):
        release(path.parent)


def _myself() -> dict[str, Any]:
    began = psutil.Process().create_time()
    return {"machine": socket.gethostname(), "process": os.getpid(), "began": began, "taken": time.strftime("%F %T")}


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """What the file says; {} where it stays empty or unreadable, as a process that was killed at once leaves it; None
    where there is none."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and {"machine", "process", "began", "taken"} <= found.keys():
                return found
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            pass
        if time.monotonic() > end:
            return {}
        time.sleep(0.05)


def _is_mine(found: dict[str, Any]) -> bool:
    return found.get("process") == os.getpid() and not _is_gone(found) and found["machine"] == socket.gethostname()


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether no such process runs on this machine."""
    try:
        return abs(psutil.Process(int(found["process"])).create_time() - float(found["began"])) > SAME
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return True
    except psutil.AccessDenied:  # of another user, alive
        return False


def _refuse(folder: pathlib.Path, found: dict[str, Any] | None) -> None:
    if not found or _is_mine(found):
        return
    who = f"process {found['process']}"
    if found["machine"] != socket.gethostname():
        raise InputError(
            f"out folder '{folder}' belongs to {who} on machine '{found['machine']}' since {found['taken']}; name "
            f"another folder or, if that process is gone, remove '{folder / FILE}'"
        )
    if not _is_gone(found):
        raise InputError(
            f"out folder '{folder}' belongs to {who} on this machine since {found['taken']}; wait until it ends, or "
            "name another folder"
        )


def _remove_stale(path: pathlib.Path, found: dict[str, Any] | None) -> None:
    """Move away what a process that is gone left; if another process was quicker, what it made is put back."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != found and not path.exists():
            os.rename(aside, path)
        else:
            aside.unlink()
