"""A hook of mkdocs: the order of the pages, the pages that are generated, and links to files of the repository.

Reference pages are made at build time from the code itself (docs/reference.py), so none can drift.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs import reference

ROOT: Final = reference.ROOT
START: Final = ("index.md", "tutorial.md", "why.md")
_MEASURED: Final = re.compile(r'<!-- measured: (\S+) "([^"]+)" -->')
_LINK: Final = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the files of the repository that pages link to; put all into an order."""
    for name, text in reference.pages().items():
        files.append(File.generated(config, name, content=text))
    for name in _linked(Path(config.docs_dir)):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            files.src_uris[f"repository/{name}"].inclusion = InclusionLevel.NOT_IN_NAV
    pages = [f.src_uri for f in files.documentation_pages() if not f.src_uri.startswith("repository/")]
    pages = [p for p in pages if p != "README.md"]
    topics = sorted(p for p in pages if "/" not in p and p not in START)
    config.nav = [
        *(p for p in START if p in pages),
        {"How to": topics},
        {"Reference": sorted(p for p in pages if p.startswith("reference/"))},
        {"Contributing": "repository/CONTRIBUTING.md"},
    ]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ lead to the copies that the site carries."""
    here = page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        target = _outside(here, match[2])
        if target is None:
            return match[0]
        uri = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return f"{match[1]}{os.path.relpath(uri, os.path.dirname(here) or '.')}{match[3] or ''})"  # noqa: PTH120

    return _LINK.sub(lead, _MEASURED.sub(lambda match: measured(Path(config.docs_dir, match[1]), match[2]), markdown))


def measured(page: Path, heading: str) -> str:
    """The first table of `page` below `heading`, and the command of a benchmark that is nearest to it.

    Raises:
        ValueError: the page has no such heading, table or command.
    """
    text = page.read_text(encoding="utf-8")
    begin = re.search(rf"^#+ .*{re.escape(heading)}.*$", text, re.MULTILINE)
    table = begin and re.compile(r"(?:^\|.*\n)+", re.MULTILINE).search(text, begin.end())
    commands = list(re.finditer(r"^```console\n[^`]*python -m benchmarks\.[^`]*```\n", text, re.MULTILINE))
    if not table or not commands:
        raise ValueError(f"{page.name} has no table below {heading!r}, or no command of a benchmark")
    at = table.start()
    nearest = min(commands, key=lambda c: abs(c.start() - at))
    return f"{nearest[0]}\n{table[0]}"


def _outside(uri: str, link: str) -> str | None:
    """The file of the repository, as a path from its root, that `link` on the page `uri` means; None for links within docs/."""
    if "://" in link or link.startswith(("#", "mailto:", "/")):
        return None
    inside = uri.startswith("repository/")
    folder = Path(uri.removeprefix("repository/")).parent if inside else Path("docs", uri).parent
    path = os.path.normpath(folder / link)
    if not inside and path.startswith("docs/"):
        return None
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _linked(docs: Path) -> list[str]:
    """Files outside docs/ that pages link to, and what these link to in turn."""
    found: dict[str, None] = {"CONTRIBUTING.md": None}
    waiting = [*((p.relative_to(docs).as_posix(), p) for p in sorted(docs.rglob("*.md")))]
    waiting.append(("repository/CONTRIBUTING.md", ROOT / "CONTRIBUTING.md"))
    while waiting:
        uri, path = waiting.pop()
        for match in _LINK.finditer(path.read_text(encoding="utf-8")):
            target = _outside(uri, match[2])
            if target is None or target in found or target.startswith("docs/"):
                continue
            found[target] = None
            if target.endswith(".md"):
                waiting.append((f"repository/{target}", ROOT / target))
    return sorted(found)
