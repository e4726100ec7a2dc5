"""Checks the wheel and the sdist in `dist/` against the repository: their files, and the packages that they require.

python tests/dist.py    after `python -m build`; `make dist` runs both

The wheel holds all files of `src/`, the sdist all files of the repository except hidden ones. Every package that the wheel
imports is among its requirements, those of its extras included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = re.compile(r"[^/]+\.dist-info/.*|(src/[^/]+\.egg-info/.*|PKG-INFO)")
"""Files that the build adds to a wheel, or to an sdist."""

TOOLS = re.compile(r"extra == [\"'](dev|docs|bench)[\"']")
"""Marker of requirements that serve the work on this package."""


def main() -> int:
    [wheel], [sdist] = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    visible = {name for name in tracked if name and not name.startswith(".")}
    source = {name.removeprefix("src/") for name in visible if name.startswith("src/")}
    faults = [*compare(wheel, files_of_wheel(wheel), source), *compare(sdist, files_of_sdist(sdist), visible)]
    faults += [f"{wheel.name} imports {name}, which it does not require" for name in undeclared(wheel)]
    print("\n".join(faults) or f"{wheel.name}: {len(source)} files; {sdist.name}: {len(visible)} files")
    return 1 if faults else 0


def compare(archive: Path, found: set[str], expected: set[str]) -> Iterator[str]:
    found = {name for name in found if not GENERATED.fullmatch(name)}
    yield from (f"{archive.name} lacks {name}" for name in sorted(expected - found))
    yield from (f"{archive.name} has {name}, which is not tracked" for name in sorted(found - expected))


def files_of_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_of_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def undeclared(wheel: Path) -> list[str]:
    """Modules outside of the standard library that the wheel imports and none of whose distributions it requires."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (archive.read(name).decode() for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        trees = [ast.parse(archive.read(name)) for name in archive.namelist() if name.endswith(".py")]
    lines = [line for line in re.findall(r"^Requires-Dist: (.*)", metadata, re.MULTILINE) if not TOOLS.search(line)]
    required = {canonical(name) for line in lines for name in re.findall(r"^[\w.-]+", line)}
    modules = {name.partition(".")[0] for tree in trees for node in ast.walk(tree) for name in imported(node)}
    distributions = packages_distributions()
    third_party = sorted(modules - sys.stdlib_module_names - {"wsd_hf"})
    return [name for name in third_party if not required & {canonical(found) for found in distributions.get(name, [])}]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return [node.module]
    return []


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
