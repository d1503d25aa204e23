"""The fault campaign in short: kills, signals, other numbers of ranks, equal numbers.

tests/faults.py has all of it; `restarts` is only there, since gloo now and then fails to connect after torchrun's restart."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults.py"


@pytest.mark.parametrize("command, says", [
    ("kills --kills 4 --terms 2", "kill -9, one rank of two, DDP"),
    ("equal --updates 4 --short", "float32, FSDP x2, micro-batches of 1"),
    ("worlds --short", "sharded     single"),
    ("nan", "weight, FSDP"),
    ("hang", "exit code 1"),
])
def test_campaign(command, says):
    """Each asserts by itself and prints its table."""
    done = subprocess.run([sys.executable, str(FAULTS), *command.split()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and says in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
