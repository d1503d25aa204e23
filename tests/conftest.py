"""Tests run from anywhere: the product's files lie one folder up. One thread: the models are tiny."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(1)

import faults                                                        # after the paths

faults.remember_captions()
