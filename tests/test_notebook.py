"""The notebook: it runs from its first cell to its last, and its outputs are those of the run that it shows."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install nbclient ipykernel")
pytest.importorskip("matplotlib", reason='no matplotlib: pip install "wsd_hf[diagnose]"')
pytest.importorskip("ipykernel", reason="no ipykernel: pip install ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "wsd.ipynb"


def shown(cell: Any) -> str:
    """All that a cell shows as text; of warnings and pictures nothing."""
    pieces = []
    for output in cell.outputs:
        if output.get("name") == "stdout":
            pieces.append(output.text)
        elif "image/png" not in output.get("data", {}):
            pieces.append(output.get("data", {}).get("text/html", output.get("data", {}).get("text/plain", "")))
    return "".join(pieces)


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.sweep
def test_ten_cells_show_what_they_showed() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    again = copy.deepcopy(stored)
    nbclient.NotebookClient(again, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    cells, ran = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (stored, again))
    assert len(cells) == 10
    assert [pictures(cell) for cell in ran] == [pictures(cell) for cell in cells] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    for number, (before, after) in enumerate(zip(cells, ran, strict=True)):
        assert without_rounding(shown(after)) == without_rounding(shown(before)), f"cell {number + 1}"
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)


def without_rounding(text: str) -> str:
    """A text whose probabilities have two digits: the third may differ from machine to machine."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)
