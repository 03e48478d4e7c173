"""Do the judges see what they should? False alarms on clean images, and how many of each corruption they find."""

from __future__ import annotations

import time
from typing import Any

import torch

from experiments.oracles.chess import ChessWorld
from fieldsmith.worlds.judged import load

CLEAN = 10_000
CORRUPTED = 1_000
PART = 500
SIZES = (("columns", 64), ("cards", 128), ("cards", 32), ("chess", 128), ("chess", 64))


def record(name: str, size: int) -> dict[str, Any]:
    """One world at one size: the published one, or the one that networks are trained at here."""
    began, world = time.monotonic(), ChessWorld(size) if name == "chess" else load(name, size)
    alarms = 0
    for part in range(CLEAN // PART):
        alarms += int((~world.judge(world.sample(PART, 1_000 + part)).valid).sum())
    found = {}
    for word, corrupt in world.mutations.items():
        seen = [world.judge(corrupt(PART // 2, 2_000 + part)).valid for part in range(2 * CORRUPTED // PART)]
        found[word] = float((~torch.cat(seen)).double().mean())
    return {
        "world": name, "size": size, "clean": CLEAN, "false alarms": alarms, "corrupted": CORRUPTED,
        "detection": found, "seconds": time.monotonic() - began,
    }  # fmt: skip
