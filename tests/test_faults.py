"""The fault campaign in short: kills, signals, restarts, numbers of ranks. tests/faults.py has all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults.py"


@pytest.mark.parametrize("command, says", [
    ("kills --kills 4 --terms 2 --short", "kill -9, one rank of two, DDP"),
    ("equal --updates 4 --short", "float32, muon, FSDP x2, micro-batches of 1"),
    ("worlds --short", "sharded     single"),
    ("starts --tries 6", "6 of 6 starts"),
    ("restarts --tries 1", "restarts  equal"),
    ("nan", "weight, FSDP"),
    ("hang", "exit code 1"),
])
def test_campaign(command, says):
    """Each asserts by itself and prints its table."""
    command = [sys.executable, str(FAULTS), *command.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and says in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
