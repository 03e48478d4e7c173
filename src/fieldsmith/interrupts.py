"""SIGINT and SIGTERM while a run trains: the first one asks for an end after this step, the second one ends at once.

Outside of training both raise KeyboardInterrupt (cli.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = b"\nfieldsmith: finishing this step, then a checkpoint; once more ends at once\n"


@dataclass
class Asked:
    """Whether the run was asked to end, and whether at once."""

    end: bool = False
    at_once: bool = False


@contextlib.contextmanager
def listening(wanted: bool, speaks: bool) -> Iterator[Asked]:
    """Inside, the first signal is only noted and the second one raises KeyboardInterrupt; where it is not `wanted`, or
    in a thread, which hears no signals, nothing changes."""
    asked = Asked()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: Any) -> None:
        if asked.end:
            asked.at_once = True
            raise KeyboardInterrupt
        asked.end = True
        if speaks and number == signal.SIGINT:  # a person; SIGTERM comes from launchers and systems
            with contextlib.suppress(OSError):
                os.write(2, NOTE)  # print is not to be called in the middle of another print

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            signal.signal(number, hear)
        yield asked
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: it was not set from Python
                signal.signal(number, handler)
