"""What each objective weighs: terms in the branch errors (e_c, e_u) at one input (DASH notes, 2.1 and 3).

config.py has the objective of a DistillConfig; identifiability.py says what each leaves open. Importing this costs no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal[
    "dash", "conditional", "composite", "tag", "gap", "cond+gap", "matched-dropout", "student-dropout", "w-conditioned",
    "fitnets", "bk-sdm", "scratch",
]  # fmt: skip
FEATURES = ("fitnets", "bk-sdm")  # objectives that also match what is inside the networks
BY_ROW = ("matched-dropout", "student-dropout", "scratch")  # objectives that drop labels row by row


@dataclass(frozen=True)
class Objective:
    """Weights of the terms; errors are mean squares over a sample's numbers.

    `scales` are the guidance scales of the composite term |w e_c - (w - 1) e_u|^2: one number is fixed, two are the
    ends of a uniform law, 'tag' is TAG's w(t). `null_target` is what the null branch is taught where it is taught at
    all: the teacher's own null branch, its conditional one (the tower property makes the marginal of it), or the noise.
    """

    imitation: float = 0.0  # |e_c|^2
    unconditional: float = 0.0  # |e_u|^2
    anchor: float = 0.0  # |s_c - eps|^2
    gap: float = 0.0  # |e_c - e_u|^2
    composite: float = 0.0  # |w e_c - (w - 1) e_u|^2
    scales: tuple[float, ...] | str = (1.0,)
    null_target: str = "unconditional"
    null_share: float | None = None  # where labels drop out at this rate and rows count as they fall
    guided_input: bool = False  # one branch that takes w: the composite of every w, with nothing else to learn

    @property
    def coupled(self) -> bool:
        """Whether a term needs both branches at one input."""
        return self.gap > 0 or self.composite > 0


OBJECTIVES: dict[str, Objective] = {
    "dash": Objective(imitation=1, unconditional=1, anchor=0.1),
    "conditional": Objective(imitation=1),
    "composite": Objective(composite=1),
    "tag": Objective(composite=1, scales="tag"),
    "gap": Objective(gap=1),
    "cond+gap": Objective(imitation=1, gap=1),
    "matched-dropout": Objective(imitation=1, unconditional=1),
    "student-dropout": Objective(imitation=1, unconditional=1, null_target="conditional"),
    "w-conditioned": Objective(composite=1, guided_input=True),
    "fitnets": Objective(imitation=1),
    "bk-sdm": Objective(imitation=1, anchor=1),
    "scratch": Objective(anchor=1, unconditional=1, null_target="noise"),
}
WEIGHTS = ("imitation", "unconditional", "anchor", "gap")  # those that the settings may give
