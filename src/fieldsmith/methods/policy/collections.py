"""The collection that updates learn from: made once an epoch, and never twice for the preflight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from fieldsmith.models.core import Model
from fieldsmith.training import Log

T = TypeVar("T")


class Collections(Generic[T]):
    """Collections of a run, one at a time; `collect(epoch, log)` rolls one out and judges it."""

    def __init__(self, model: Model, collect: Callable[[int, Log], T]):
        self.model, self.collect = model, collect
        self._held: tuple[int, T] | None = None
        self._log = Log()  # of collection 0, until the first step uses it
        self._nfe = 0

    def first(self) -> T:
        """Collection 0 for the preflight; its cost and log are entered where the first step uses it."""
        self._log = Log()
        with self.model.count_nfe() as nfe:
            self._held = 0, self.collect(0, self._log)
        self._nfe = nfe.total
        return self._held[1]

    def at(self, epoch: int, log: Log) -> T:
        """The collection of an epoch."""
        if self._held is None or self._held[0] != epoch:
            self._held = None  # so that two are never in memory
            self._held = epoch, self.collect(epoch, log)
        else:
            log.add(self._log)
            self.model.add_nfe(self._nfe)
        self._log, self._nfe = Log(), 0
        return self._held[1]
