"""What the site shows of files outside of docs/: the tables of results/ with their figures.

A hook of MkDocs (mkdocs.yml names it). On the hub and in an editor the same links lead to the files themselves.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SHOWN = "measured"  # where results/ stands in the site; docs/results.md is a page of its own
KIND = re.compile(r"^```(\w+) norun$", re.MULTILINE)  # what our tests read behind a block's language
FILE = re.compile(r"\[([^\]]*)\]\(\.\./(?!results/)[^)]*\)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # only where the site is built

    for path in sorted((ROOT / "results").rglob("*")):
        if path.suffix in (".md", ".png", ".svg") and "runs" not in path.parts:
            place = f"{SHOWN}/{path.relative_to(ROOT / 'results').as_posix()}"
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to results/ lead to the copies; of one to another file outside only the words stay."""
    markdown = KIND.sub(r"```\1", markdown)
    if page.file.src_uri.startswith(SHOWN):
        return markdown
    return FILE.sub(r"\1", markdown.replace("](../results/", f"]({SHOWN}/"))
