"""What outlives a crash: files whole or absent, damage found, one run a folder, signals obeyed in order."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import faults
import train
from evaluate import page
from support import audio, checkpoint, common, signals
from support.distributed import Ranks

HERE = Path(__file__).parent.parent
KEYS = {"format", "step"}


def content(step: int) -> dict:
    return dict(format="f", step=step, x=torch.arange(1000.0) + step, shards=None)


def two(folder: Path) -> None:
    """last.pt of step 2, last.prev.pt of step 1."""
    for step in (1, 2):
        common.write_torch(folder / "last.pt", content(step), folder / "last.prev.pt")


def in_a_child(action) -> str:
    """Does something in a forked process -> the message of the error that ended it, "" for none."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        message = b""
        try:
            action()
        except BaseException as error:
            message = str(error).encode() or b"an error without words"
        finally:
            os.write(writer, message)
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as f:
        message = f.read().decode()
    assert os.waitpid(pid, 0)[1] == 0
    return message


def test_write_keeps_the_one_before(tmp_path):
    two(tmp_path)
    steps = [checkpoint.read_checkpoint_file(tmp_path / name)["step"] for name in ("last.pt", "last.prev.pt")]
    assert steps == [2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.prev.pt", "last.pt"]


@pytest.mark.parametrize("when", range(4))
def test_no_moment_of_a_write_loses_both(when, tmp_path, monkeypatch):
    """Dies before the bytes are on the disk, before each of the renames, and after them."""
    class Died(BaseException):
        pass

    two(tmp_path)
    calls = []
    for name in ("fsync", "replace"):
        def die(*rest, original=getattr(os, name)):
            calls.append(0)
            if len(calls) == when + 1:
                raise Died
            return original(*rest)
        monkeypatch.setattr(os, name, die)
    with pytest.raises(Died):
        common.write_torch(tmp_path / "last.pt", content(3), tmp_path / "last.prev.pt")
        raise Died
    monkeypatch.undo()
    name, lines = checkpoint.newest_checkpoint(tmp_path, "f", KEYS)
    assert checkpoint.read_checkpoint_file(tmp_path / name)["step"] == (3 if when == 3 else 2) and not lines


@pytest.mark.parametrize("damage", ("cut", "flip", "empty", "text", "pickle"))
def test_a_damaged_checkpoint_is_put_aside(damage, tmp_path):
    two(tmp_path)
    last = tmp_path / "last.pt"
    raw = last.read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 16]) + raw[middle + 1:]
    last.write_bytes({"cut": raw[:middle], "flip": flipped, "empty": b"", "text": b"not a checkpoint",
                      "pickle": pickle.dumps(content(9))}[damage])
    name, lines = checkpoint.newest_checkpoint(tmp_path, "f", KEYS)
    assert name == "last.prev.pt" and "last.pt cannot be used" in lines[0] and "last.damaged.pt" in lines[1]
    assert (tmp_path / "last.damaged.pt").exists() and not last.exists()
    common.write_torch(last, content(3), tmp_path / "last.prev.pt")  # nothing whole was pushed out
    assert checkpoint.newest_checkpoint(tmp_path, "f", KEYS)[0] == "last.pt"
    assert checkpoint.read_checkpoint_file(tmp_path / "last.prev.pt")["step"] == 1


def test_none_that_can_be_read_is_not_a_new_start(tmp_path):
    two(tmp_path)
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="last.pt cannot be used.*last.prev.pt cannot be used"):
        checkpoint.newest_checkpoint(tmp_path, "f", KEYS)
    assert checkpoint.newest_checkpoint(tmp_path / "nowhere", "f", KEYS) == (None, [])


@pytest.mark.parametrize("other, says", [
    ({"format": "g", "step": 1}, "its format is 'g'"),
    ({"format": "f"}, "it lacks step"),
])
def test_another_kind_of_file_is_refused(other, says, tmp_path):
    common.write_torch(tmp_path / "last.pt", other)
    with pytest.raises(ValueError, match=says):
        checkpoint.newest_checkpoint(tmp_path, "f", KEYS)


def test_a_full_disk_keeps_what_is_there(tmp_path):
    """A real failure of write(2): no file may grow past 64 KiB in the child."""
    def fill() -> None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        common.write_torch(tmp_path / "last.pt", dict(x=torch.zeros(100_000)), tmp_path / "last.prev.pt")

    common.write_torch(tmp_path / "last.pt", dict(x=torch.zeros(100)))
    assert "last.pt could not be written ([Errno 27] File too large" in in_a_child(fill)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.read_checkpoint_file(tmp_path / "last.pt")["x"].numel() == 100


def test_a_run_goes_on_when_its_disk_is_full(tmp_path, monkeypatch, capsys):
    """The second checkpoint fails twice; the run goes on, tries again, and ends as if nothing had been.

    Where every write fails, the run ends with exit code 1 and says what it could not write."""
    write, fails = common.write_torch, [2]

    def full(path, *rest):
        if Path(path).name == "last.pt" and run_now["step"] >= 2 and fails[0] > 0:
            fails[0] -= 1
            raise OSError(28, "No space left on device")
        write(path, *rest)

    run_now = {"step": 0}
    update = train.update

    def counted(run, micros):
        run_now["step"] += 1
        return update(run, micros)

    flags = [*faults.TINY, "--updates_per_epoch", "2", "--save_minutes", "0"]
    assert train.main([*flags, "--out", str(tmp_path / "free")]) == 0
    monkeypatch.setattr(train, "update", counted)
    monkeypatch.setattr(common, "write_torch", full)
    assert train.main([*flags, "--out", str(tmp_path / "full")]) == 0
    assert capsys.readouterr().out.count("last.pt was not written: OSError: [Errno 28] No space left") == 2
    faults.assert_same_run(tmp_path / "full", tmp_path / "free")
    run_now["step"], fails[0] = 0, 99
    assert train.main([*flags, "--out", str(tmp_path / "never")]) == 1  # told, not hidden
    assert "could not be written: last.pt" in capsys.readouterr().err
    assert faults.saved_step(tmp_path / "never") == 1


def test_best_that_is_written_late_says_of_which_update_it_is(tmp_path, monkeypatch):
    """The first two writes of best.pt fail; the third comes an update later, with the same weights."""
    write, steps = common.write_torch, []

    def full(path, content, *rest):
        if Path(path).name == "best.pt":
            steps.append(content["step"])
            if len(steps) < 3:
                raise OSError(28, "No space left on device")
        write(path, content, *rest)

    monkeypatch.setattr(common, "write_torch", full)
    flags = [*faults.TINY, "--updates_per_epoch", "2", "--epochs", "2", "--save_minutes", "0"]
    assert train.main([*flags, "--out", str(tmp_path)]) == 0
    assert steps[:3] == [2, 2, 2]


class Foreign:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_shards_of_one_process(tmp_path, monkeypatch):
    """Saved, read back, checked; the table of contents executes nothing."""
    monkeypatch.chdir(tmp_path)  # where the foreign pickles would leave their file
    alone = Ranks(0, 1, torch.device("cpu"))
    tensors = {"a": torch.arange(10.0), "b/c": torch.ones(3, 4)}
    shards = checkpoint.save_shards(tmp_path, tensors, alone)
    common.write_torch(tmp_path / "last.pt", content(1) | dict(shards=shards))
    again = checkpoint.save_shards(tmp_path, tensors, alone)
    assert again["folder"] != shards["folder"]  # the one that last.pt names is left alone
    checkpoint.remove_unused_shards(tmp_path)
    assert [p.name for p in tmp_path.glob("last.shards.*")] == [shards["folder"]]
    empty = {name: torch.zeros_like(x) for name, x in tensors.items()}
    checkpoint.load_shards(tmp_path, shards, empty, alone)
    assert all(torch.equal(empty[name], x) for name, x in tensors.items())
    table = tmp_path / shards["folder"] / ".metadata"
    table.write_bytes(table.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match="checksum of last.shards.0/.metadata is wrong"):
        checkpoint.newest_checkpoint(tmp_path, "f", KEYS)
    table.write_bytes(pickle.dumps(Foreign()))
    with pytest.raises(pickle.UnpicklingError, match="posix.system has no place"):
        checkpoint.PlainReader(tmp_path / shards["folder"]).read_metadata()
    writer = checkpoint.FileSystemWriter(tmp_path / "foreign")
    checkpoint.dcp.save({"a": Foreign()}, storage_writer=writer, no_dist=True)
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata has no place"):
        checkpoint.PlainReader(tmp_path / "foreign").read_metadata()
    with pytest.raises(RuntimeError, match="foreign: "):
        checkpoint.load_shards(tmp_path, {"folder": "foreign"}, {"a": torch.zeros(1)}, alone)
    assert not (tmp_path / "owned").exists()


def test_one_run_a_folder(tmp_path):
    """Another process is refused, for as long as this one lives."""
    handle = checkpoint.lock_folder(tmp_path)
    assert "is in use by another process" in in_a_child(lambda: checkpoint.lock_folder(tmp_path))
    os.close(handle)
    assert in_a_child(lambda: checkpoint.lock_folder(tmp_path)) == ""


def test_a_killed_run_lets_go_of_its_folder(tmp_path):
    """At once, although a process it had forked, such as a loader, lives on for a while."""
    code = ("import os, signal, sys, time; from pathlib import Path; from support import checkpoint\n"
            "checkpoint.lock_folder(Path(sys.argv[1]))\n"
            "if os.fork() == 0: os.close(1); os.close(2); time.sleep(20); os._exit(0)\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=HERE, timeout=60)
    assert done.returncode == -signal.SIGKILL
    os.close(checkpoint.lock_folder(tmp_path))


def test_loading_processes_end_with_a_killed_run(tmp_path):
    """They leave SIGTERM, which a whole job is sent, to the run; killed, it leaves none of them behind."""
    flags = [*faults.TINY, "--updates_per_epoch", "5000", "--workers", "2", "--out", str(tmp_path)]
    [run] = faults.launch(flags, 1, tmp_path / "log")

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)

    def names(pids) -> list:
        return [Path(f"/proc/{pid}/comm").read_text() for pid in pids if Path(f"/proc/{pid}").exists()]

    log = tmp_path / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text())
    loaders = Path(f"/proc/{run}/task/{run}/children").read_text().split()
    assert len(loaders) == 2
    os.kill(int(loaders[0]), signal.SIGTERM)
    size = log.stat().st_size
    wait_for(lambda: log.stat().st_size > size + 2000)               # it goes on with both
    assert len(names(loaders)) == 2
    os.kill(run, signal.SIGKILL)
    faults.wait([run])
    killed = time.monotonic()
    wait_for(lambda: not names(loaders))
    assert time.monotonic() - killed < 5


@pytest.mark.parametrize("name", ("SIGTERM", "SIGINT"))
def test_a_signal_while_loading_processes_start(name):
    """One that comes between their fork and their first line ends the run in its own way, not them."""
    code = (f"import os, signal; import data, tokenizer; from support import signals\n"
            f"os.register_at_fork(after_in_child=lambda: signal.raise_signal(signal.{name}))\n"
            "with signals.Stop():\n"
            "    dataset = data.open_dataset('toy', codec=tokenizer.load_codec('toy'))\n"
            "    print(len([*data.batches(dataset, 0, 0, 3, 2, workers=2)]))\n"
            f"    signal.raise_signal(signal.{name})")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.stdout == "3\n" and done.stderr.splitlines()[-1].endswith(f"Stopped: {name}"), done


def test_signals_wait_for_what_must_be_whole():
    """Held back within `hold`, obeyed at its end; outside of it at once; two in a moment are one request."""
    before = signal.getsignal(signal.SIGINT)
    with signals.Stop() as stop:
        done = []
        with pytest.raises(signals.Stopped, match="SIGTERM"):
            with stop.hold():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what came to all
                done.append(1)
        assert done and stop.requested == "SIGTERM"
    with signals.Stop():
        with pytest.raises(signals.Stopped, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("write", ("file", "page"))
def test_a_signal_while_sound_is_written_is_obeyed(write, tmp_path, capfd):
    """At once, wherever it strikes: no library calls Python in between, which could not pass it on."""
    wav = torch.rand(1, 16_000 * 30) - 0.5
    for milliseconds in range(1, 30):
        with signals.Stop() as stop:
            timer = threading.Timer(milliseconds / 1000, os.kill, (os.getpid(), signal.SIGTERM))
            with pytest.raises(signals.Stopped):
                timer.start()
                for _ in range(50):
                    if write == "page":
                        page.audio_uri(wav, 16_000)
                    else:
                        audio.write_audio(tmp_path / "a.flac", wav, 16_000)
            timer.join()
        assert stop.requested == "SIGTERM"
    assert capfd.readouterr().err == "" and {p.name for p in tmp_path.iterdir()} <= {"a.flac"}
