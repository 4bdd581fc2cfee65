"""Links to source code: in Markdown to the file, in the built documentation to the line of the name.

A link whose text is a name in code, as [`Worker.run`](../../diracx-tasks/src/.../worker.py), leads in the built
documentation to a page with that file, at the definition of the name. A name that is not there fails the build.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[`([^`\]]+)`\]\((?:\.\./)+((?:diracx-tasks|gubbins)/src/[\w./-]+\.(py|lua))\)")
_LANGUAGES = {"py": "python", "lua": "lua"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: add a page for each file that a page links to."""
    texts = [Path(file.abs_src_path).read_text() for file in files.documentation_pages() if file.abs_src_path]
    for path, suffix in sorted({(found[2], found[3]) for text in texts for found in LINK.finditer(text)}):
        code = (ROOT / path).read_text()
        settings = f"title: {PurePosixPath(path).name}\nsearch: {{exclude: true}}\nhide: [toc]\n"
        content = f'---\n{settings}---\n\n# `{path}`\n\n````{_LANGUAGES[suffix]} linenums="1"\n{code}````\n'
        files.append(File.generated(config, f"source/{path}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Called by mkdocs for every page."""

    def to_line(found: re.Match[str]) -> str:
        name, path = found[1], found[2]
        here = PurePosixPath(page.file.src_uri).parent
        address = os.path.relpath(f"source/{path}.html", here)
        # Not as Markdown: mkdocs does not know the anchors of lines, and would warn.
        return f'<a href="{address}#__codelineno-0-{line_of(path, name)}"><code>{name}</code></a>'

    return LINK.sub(to_line, markdown)


def line_of(path: str, name: str) -> int:
    """Line of a definition, as `function` or `Class.method`; the first line for the name of the file itself."""
    if PurePosixPath(path).name == PurePosixPath(name).name:
        return 1
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    line = 0
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise PluginError(f"there is no {name} in {path}: mend the link, or the name")
        line, body = found[-1].lineno, getattr(found[-1], "body", [])
    return line
