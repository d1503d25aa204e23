"""The notebook docs/tour.ipynb runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def cells() -> list:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_it_is_short_and_holds_no_outputs():
    assert len(cells()) <= 10
    for cell in cells():
        assert cell["cell_type"] == "markdown" or cell["outputs"] == [] and cell["execution_count"] is None
        assert max(len(line.rstrip("\n")) for line in cell["source"]) <= 118


def test_the_short_training_is_one_that_train_takes():
    source = "".join(cells()[6]["source"])
    command = source.split("train.main(")[1].split(".split())")[0]
    args = train.build_parser().parse_args(eval(f"({command})").split())    # two strings side by side
    assert args.out == "runs/tour" and args.epochs * args.updates_per_epoch == 100


def test_it_runs(tmp_path):
    """In a folder where the quick start has left a model, as a notebook does."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel"), pytest.importorskip("matplotlib")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("assets", "support", "interop", "evaluate", "tests"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(ROOT / "tests" / "old_run")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": tmp_path / "docs"}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    shown = [[kind for output in each for kind in output.get("data", {})] for each in outputs]
    pictures, sounds = ([i for i, kinds in enumerate(shown) if kind in kinds] for kind in
                        ("image/png", "text/html"))
    assert pictures == [2, 3, 5, 7] and sounds == [2, 8]
    assert "q2   S S 0 1" in outputs[1][0].text
    assert "log(256) = 5.545" in outputs[4][0].text
    assert not any(output.get("name") == "stderr" for each in outputs for output in each)
