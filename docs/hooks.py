"""Hooks of the documentation site.

Files of the repository that a page links to become part of the site, so that links hold there as they do in the repository.
Markers in pages, `<!-- settings: wsd -->`, `<!-- settings -->` and `<!-- modules -->`, become tables made from the code.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from posixpath import relpath
from typing import Any

from griffe import Docstring, DocstringSectionKind
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from wsd_hf.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
"""Target of a relative link, without its fragment."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md as the first page, and every file outside of `docs/` that a page links to, or one of those in turn."""
    pages = [ROOT / "README.md", *(Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path)]
    for page in pages:
        for source in (page, *_linked(page)):
            if _place(source) not in files.src_uris:
                files.append(File.generated(config, _place(source), abs_src_path=str(source)))
                if source.suffix == ".md":
                    pages.append(source)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to where the site has their targets, and replaces markers."""
    source = Path(str(page.file.abs_src_path))

    def placed(link: re.Match[str]) -> str:
        target = _target(source, link[1])
        return relpath(_place(target), Path(_place(source)).parent.as_posix()) if target else link[1]

    markdown = LINK.sub(placed, markdown)
    markdown = re.sub(r"<!-- settings: (\w+) -->", lambda marker: _settings(STRATEGIES[marker[1]]), markdown)
    markdown = markdown.replace("<!-- settings -->", _all_settings())
    return markdown.replace("<!-- modules -->", "\n".join(_modules(ROOT / "src" / "wsd_hf")))


def _target(page: Path, link: str) -> Path | None:
    """The file of the repository that a link on a page leads to; None if there is none."""
    target = (page.parent / link).resolve()
    return target if target.is_relative_to(ROOT) and target.is_file() else None


def _linked(page: Path) -> Iterator[Path]:
    return filter(None, (_target(page, link) for link in LINK.findall(page.read_text("utf-8"))))


def _place(source: Path) -> str:
    """Path of a file of the repository in the site: pages of `docs/` at the top, all else as in the repository."""
    path = source.relative_to(ROOT).as_posix()
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _settings(strategy: Any) -> str:
    """The settings of a strategy as a table: keyword of `generate`, field, default, documentation."""
    documented = _arguments(strategy)
    rows = ["| keyword of `generate` | field | default | |", "|---|---|---|---|"]
    for keyword, field in strategy.keywords().items():
        rows.append(f"| `{keyword}` | `{field.name}` | {_default(field)} | {documented[field.name]} |")
    return "\n".join(rows)


def _all_settings() -> str:
    """Every setting in one table, with the strategies that take it."""
    owners: dict[str, list[str]] = {}
    for name, strategy in STRATEGIES.items():
        for keyword in strategy.keywords():
            page = f"[{name}](strategies/{name.replace('_', '-')}.md#settings)"
            owners.setdefault(keyword, []).append(f"{page}: {_default(strategy.keywords()[keyword])}")
    rows = [f"| `{keyword}` | {', '.join(strategies)} |" for keyword, strategies in owners.items()]
    return "\n".join(["| keyword of `generate` | strategies, with their defaults |", "|---|---|", *rows])


def _arguments(strategy: Any) -> dict[str, str]:
    """Documentation of each field, from the docstrings of the class and those it inherits from, each on one line."""
    lines: dict[str, str] = {}
    for owner in reversed(strategy.__mro__):
        for section in Docstring(inspect.cleandoc(owner.__doc__ or "")).parse("google", warnings=False):
            if section.kind is DocstringSectionKind.parameters:
                arguments = {argument.name: " ".join(argument.description.split()) for argument in section.value}
                lines |= {name: line.replace("|", r"\|") for name, line in arguments.items()}
    return {name: line[0].upper() + line[1:] for name, line in lines.items()}


def _default(field: Any) -> str:
    return "needed" if field.default is MISSING else f"`{field.default!r}`"


def _modules(folder: Path, indent: str = "") -> Iterator[str]:
    """A nested list of modules, each with the first line of its docstring."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and (path / "__init__.py").is_file():
            yield f"{indent}- **`{path.name}/`** {_first_line(path / '__init__.py')}"
            yield from _modules(path, indent + "    ")
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield f"{indent}- `{path.stem}`: {_first_line(path)}"


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
