"""fieldsmith: control what a diffusion or flow model produces, after pretraining, without breaking everything else.

`fieldsmith.load("folder, hub id or zoo:name")` gives a Model; the verbs are in `fieldsmith.methods`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldsmith.models import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # late, because it brings torch and diffusers
        from fieldsmith.models import load

        return load
    raise AttributeError(f"module 'fieldsmith' has no attribute '{name}'")
