"""MkDocs hook: what pages link to outside docs/ comes into the site, so that links work in both.

Some of these are pages there (README.md is index.md), other files are copied below
`source/`. Links are rewritten by where their targets lie in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
ROOT_PAGES = {"README.md": "index.md", "examples/README.md": "examples.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "AGENTS.md")
}
"""Pages outside docs/, and where they are in the site."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)(?=[#)])")


def locate(target: str) -> str:
    """Return where a file of the repository is in the site."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    return target.removeprefix(DOCS) if target.startswith(DOCS) else f"source/{target}"


def resolve(page: str, link: str) -> str:
    """Return the file of the repository that a link of a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and the files that any page links to."""
    pages = [*ROOT_PAGES, *(DOCS + file.src_uri for file in files.documentation_pages())]
    for name, target in ROOT_PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    there = {file.src_uri for file in files}
    for page in pages:
        for link in LINK.findall((ROOT / page).read_text("utf-8")):
            target = resolve(page, link)
            if (uri := locate(target)) not in there and (ROOT / target).is_file():
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                there.add(uri)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page to where their targets are in the site."""
    uri = page.file.src_uri
    source = next((name for name, at in ROOT_PAGES.items() if at == uri), DOCS + uri)

    def rewrite(link: re.Match[str]) -> str:
        target = locate(resolve(source, link[0]))
        return posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(rewrite, markdown)
