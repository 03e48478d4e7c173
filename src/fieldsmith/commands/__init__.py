"""The verbs as the command line runs them: arguments -> config -> method -> artefacts and a page.

In: the words after the verb. Out: a run directory (design, section 4). Each command imports what it needs, late.
"""

from __future__ import annotations

from collections.abc import Sequence


def erase(words: Sequence[str]) -> None:
    from fieldsmith.commands.erase import main

    main(words)


def demo(words: Sequence[str]) -> None:
    from fieldsmith.commands.demo import main

    main(words)


def pretrain(words: Sequence[str]) -> None:
    from fieldsmith.commands.models import pretrain as run

    run(words)


def sample(words: Sequence[str]) -> None:
    from fieldsmith.commands.models import sample as run

    run(words)


def evaluate(words: Sequence[str]) -> None:
    from fieldsmith.commands.models import evaluate as run

    run(words)


def reproduce(words: Sequence[str]) -> None:
    from fieldsmith.commands.models import reproduce as run

    run(words)
