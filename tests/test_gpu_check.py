"""tools/gpu_check.py: what fails or hangs is a row and the rest runs; its commands are valid."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import train
from tools import bench, gpu_check
from tools.gpu_check import TARGET_MFU, TARGET_SPEED, CheckPart, check_parts, compare, main


def part(name: str, code: str, limit: int = 20, target=None) -> CheckPart:
    return CheckPart(name, [sys.executable, "-c", code], limit, target)


def run(parts: list, tmp_path, monkeypatch, capsys) -> tuple:
    """(exit code, what was printed, what the file holds) of the command with these parts."""
    monkeypatch.setattr(gpu_check, "check_parts", lambda device, folder: parts)
    code = main(["--device", "cpu", "--json", str(tmp_path / "found.json")])
    return code, capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())


def test_what_fails_is_a_row_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); " \
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); print('half way', flush=True); " \
            "time.sleep(60)"
    parts = [
        part("broken", "print('ours 1'); raise SystemExit('no such GPU')"),
        part("hangs", child, limit=2),
        part("mistake", "print('tools.bench: --size x: choose'); print('====='); raise SystemExit(2)"),
        part("good", "print('loading'); print('ours  T 9 | 16.5 x real time | more')", target=TARGET_SPEED),
    ]
    began = time.monotonic()
    code, printed, found = run(parts, tmp_path, monkeypatch, capsys)
    assert code == 1 and time.monotonic() - began < 20
    assert [x["problem"] for x in found["parts"]] == [
        "exit code 1: no such GPU", "stopped after 2 s: half way",
        "exit code 2: tools.bench: --size x: choose", None]
    good = found["parts"][3]
    assert good["lines"] == ["ours  T 9 | 16.5 x real time | more"]
    assert good["target"] == "15 x real time: reached, 16.5 x real time"
    assert found["date"] and found["torch"] and good["command"].startswith("python -c ")
    for line in ("FAILED: exit code 1: no such GPU", "target: 15 x real time: reached",
                 "failed: broken, hangs, mistake"):
        assert line in printed
    assert has_ended(int((tmp_path / "pid").read_text()))


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and only not yet waited for, within two seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_signal_ends_all(tmp_path, monkeypatch, capsys):
    """At once, and what the parts have started with it."""
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(gpu_check, "check_parts", lambda device, folder: [part("one", code, 60)] * 3)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert main(["--device", "cpu"]) == 143 and time.monotonic() - began < 10
    assert has_ended(int((tmp_path / "pid").read_text()))
    assert capsys.readouterr().err == "tools.gpu_check: stopped by SIGTERM\n"


def test_no_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", 0)
    code, _, found = run([part("late", "print(1)")], tmp_path, monkeypatch, capsys)
    assert code == 1 and found["parts"][0]["problem"] == "not run: 0 s are over"


def test_all_is_well(tmp_path, monkeypatch, capsys):
    code, printed, found = run([part("good", "print('fine')")], tmp_path, monkeypatch, capsys)
    assert code == 0 and found["parts"][0]["lines"] == ["fine"] and "all 1 parts ran" in printed


def test_targets():
    lines = ["transformers | MFU 60.0%", "ours   T 1500 | MFU 44.9% | peak", "    ours is"]
    assert compare(lines, *TARGET_MFU) == "MFU 45%: missed, MFU 44.9%"
    assert compare(lines[:1], *TARGET_MFU) == "MFU 45%: not measured here"


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_commands_are_valid(device, tmp_path):
    """Every flag exists; on a GPU the sizes are those they are called after."""
    parts = check_parts(device, str(tmp_path))
    assert len({p.name for p in parts}) == len(parts) == 9
    for p in parts:
        if "tools.bench" in p.command:
            args = bench.bench_parser().parse_args(p.command[3:])
            assert p.name == f"{args.command} {args.size}" or device == "cpu" and args.size == "debug"
        elif "train.py" in p.command:
            train.build_parser().parse_args(p.command[2:])


@pytest.mark.parametrize("argv, says", [
    (["--device", "banana"], "--device banana"),
    (["--device", "cuda:7"], "--device cuda:7"),
    (["--json", "missing/folder/x.json"], "--json missing/folder/x.json"),
    (["--json", "."], "--json ."),
    (["--json", ""], "--json"),
])
def test_bad_flags(argv, says, capsys):
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "tools.gpu_check: " in error and says in error
