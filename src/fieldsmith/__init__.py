"""fieldsmith: control what a diffusion or flow model produces, after pretraining, without breaking everything else.

    import fieldsmith as fs
    model = fs.load("zoo:shapes-flux")
    result = fs.erase(model, targets=["triangle"], anchors=["circle"], out="runs/no-triangle")

Importing this costs no torch; each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldsmith.api import align as align
    from fieldsmith.api import diagnose as diagnose
    from fieldsmith.api import distill as distill
    from fieldsmith.api import edit as edit
    from fieldsmith.api import erase as erase
    from fieldsmith.api import load as load
    from fieldsmith.api import open_run as open_run
    from fieldsmith.api import sample as sample
    from fieldsmith.api import sharpen as sharpen
    from fieldsmith.errors import InputError as InputError
    from fieldsmith.errors import RewardError as RewardError
    from fieldsmith.errors import RunError as RunError
    from fieldsmith.methods.align.config import AlignConfig as AlignConfig
    from fieldsmith.methods.distill.config import DistillConfig as DistillConfig
    from fieldsmith.methods.edit.config import EditConfig as EditConfig
    from fieldsmith.methods.erase.config import EraseConfig as EraseConfig
    from fieldsmith.methods.sharpen.config import SharpenConfig as SharpenConfig
    from fieldsmith.models.core import Model as Model
    from fieldsmith.result import Result as Result

__version__ = "0.2.0"

_ROOMS = {
    "api": ("align", "diagnose", "distill", "edit", "erase", "load", "open_run", "sample", "sharpen"),
    "errors": ("InputError", "RewardError", "RunError"),
    "methods.align.config": ("AlignConfig",),
    "methods.distill.config": ("DistillConfig",),
    "methods.edit.config": ("EditConfig",),
    "methods.erase.config": ("EraseConfig",),
    "methods.sharpen.config": ("SharpenConfig",),
    "models.core": ("Model",),
    "result": ("Result",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fieldsmith' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fieldsmith.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
