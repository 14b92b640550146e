"""What `make docs` does beyond MkDocs: links that leave docs/ lead into the site, and no page loads anything elsewhere.

A page may link to a file of the repository (a result, a script, CONTRIBUTING.md), as it must to be read on a git host.
The site gets a copy of each such file: Markdown as a page, everything else as it is. A link to a folder becomes its
path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COPIES = "repository"
"""The folder of the site in which copies of repository files are."""

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_FENCE = re.compile(r"(```.*?```)", re.DOTALL)
_LOADED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"|<link\b[^>]*\bhref="https?://[^"]*"'
)


def on_files(files: Any, config: Any) -> Any:
    """Adds every file of the repository that a page links to, and what is linked to from there."""
    waiting = [DOCS / one.src_uri for one in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for _, target in _LINK.findall(_without_code(page.read_text(encoding="utf-8"))):
            found = _target(page, target)
            if found is None or found.is_relative_to(DOCS) or not found.is_file():
                continue
            uri = _copied(found)
            if files.get_file_from_path(uri) is None:
                made = File.generated(config, uri, abs_src_path=str(found), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(made)
                if found.suffix == ".md":
                    waiting.append(found)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to the repository's files into links to their copies."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(COPIES + "/") if uri.startswith(COPIES + "/") else DOCS / uri
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: _rewritten(found, source, uri), part) for part in parts[::2]]
    return "".join(parts)


def on_post_build(config: Any) -> None:
    """Fails where a page would ask another machine for a script, a style, a font or an image."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if COPIES in page.relative_to(config.site_dir).parts:
            continue
        found = _LOADED.search(page.read_text(encoding="utf-8"))
        if found is not None and 'rel="canonical"' not in found[0]:
            raise PluginError(f"{page.relative_to(config.site_dir)} loads something from elsewhere: {found[0]}")


def _rewritten(found: re.Match[str], source: Path, uri: str) -> str:
    text, target = found[1], found[2]
    path = _target(source, target)
    if path is None:
        return found[0]
    anchor = "#" + target.partition("#")[2] if "#" in target else ""
    if path.is_dir():
        return f"`{path.relative_to(ROOT)}`"
    if not path.is_file():
        return found[0]  # MkDocs says so
    wanted = path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else _copied(path)
    return f"{text}({os.path.relpath(wanted, Path(uri).parent)}{anchor})"


def _target(source: Path, target: str) -> Path | None:
    """The path that a relative link means; None for others."""
    if target.startswith(("#", "http:", "https:", "mailto:")):
        return None
    return Path(os.path.normpath(source.parent / target.partition("#")[0]))


def _copied(path: Path) -> str:
    return f"{COPIES}/{path.relative_to(ROOT).as_posix()}"


def _without_code(markdown: str) -> str:
    return "".join(_FENCE.split(markdown)[::2])
