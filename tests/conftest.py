"""Tests run from anywhere: the product's files lie one folder up. One thread: the models are tiny."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(1)

import faults  # after the paths

faults.remember_captions()


@pytest.fixture(scope="session")
def bad_input_folder():
    """The runs, songs and token cache that the cases of bad input copy and damage."""
    import bad_material    # here, because few tests need it
    with tempfile.TemporaryDirectory() as folder:
        yield bad_material.prepare(Path(folder))
