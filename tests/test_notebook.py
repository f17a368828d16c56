"""The notebook of the first steps runs from top to bottom, with a tenth of its training, and is
kept without its outputs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[integrations]'")
pytestmark = pytest.mark.integration
NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-steps.ipynb"


def test_it_is_kept_without_outputs_and_with_the_demo_s_drawings() -> None:
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert cells[0].source.startswith("PHOTOS = None")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    short = [cell for cell in notebook.cells if '"steps": 60' in cell.source]
    assert len(short) == 1
    short[0].source = short[0].source.replace('"steps": 60', '"steps": 6')
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = [
        "".join(output.get("text", "") for output in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    labels = set(re.search(r"classes: (.*)", "".join(said))[1].split(", "))  # type: ignore[index]
    answers = [
        line for text in said for line in text.splitlines() if re.match(r"\s*[\d.]+%  ", line)
    ]
    moved = re.findall(r"α = ([\d.]+) +[\d.]+%  ", "".join(said))
    assert labels and len(answers) == 3
    assert moved == ["0", "0.25", "0.5", "0.75", "1"]
    assert (tmp_path / "first-steps" / "merged" / "open_clip_model.safetensors").is_file()
