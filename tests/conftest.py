"""Tests run from anywhere: the product's files lie one folder up. One thread: the models are tiny."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
