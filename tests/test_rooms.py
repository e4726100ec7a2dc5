"""The rooms of the package: no import leads upwards, none goes in a circle, and no strategy imports another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import wsd_hf

ROOT = Path(wsd_hf.__file__).parent

FLOORS = [
    "errors",
    "_compat",
    "files",
    "ranks",
    "text",
    "pages",
    "engine",
    "speculation",
    "strategies",
    "generation",
    "trace",
    "hub",
    "tiny",
    "pair",
]
FLOORS += ["remote", "serving", "ui", "integrations", "bundle", "comparison", "diagnosis", "training", "cli", "__main__"]
"""Modules and folders at the top level, each of which imports only those before it."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, relative to the package; the package itself is ''."""
    path = MODULES[module]
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            name = ".".join(filter(None, base))
            inner = {f"{name}.{alias.name}".strip(".") for alias in node.names} & MODULES.keys()
            found |= inner or {name}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_no_import_leads_upwards(module: str) -> None:
    for name in imports(module):
        assert FLOORS.index(room(name)) <= FLOORS.index(room(module)), f"{module} imports {name}"


def test_no_import_goes_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in imports(module):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".") and room(name) == "strategies"])
def test_no_strategy_imports_another(module: str) -> None:
    own = ".".join(module.split(".")[:2])
    assert all(name.startswith(own) for name in imports(module) if room(name) == "strategies")


def test_few_modules_are_at_the_top() -> None:
    assert len([name for name, path in MODULES.items() if name and path.parent == ROOT]) <= 8
