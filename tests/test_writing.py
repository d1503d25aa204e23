"""What is written is there in full or not at all: full disks, read-only folders, signals, kills.

Every command that writes is run in this process until its first file fails, then again with room: it names
the file, leaves nothing behind, and the same command works. Every command that only prints is run with
standard output on a full disk.
"""

import builtins
import contextlib
import io
import itertools
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch

import bad_input
import generate
import tokenizer
from evaluate import analyser
from interop import convert
from support import audio, common

FIT = "fit_codec --dataset toy --out c.pt --steps 2 --batch_size 1 --filters 2 --dim 4 --card 2 --codebooks 1"
WRITERS = {    # name: (command, the file that cannot be written)
    "tokenizer": ("tokenizer @good.wav out.wav", "out.wav"),
    "generate": ("generate --run @model --unconditional --n 2", "codes_"),
    "data cache": ("data cache @music --out out", "out/cache.json"),
    "fit_codec": (FIT, "c.pt.fit"),
    "convert nano": ("convert @model --to nano --out out", "best.pt"),
    "convert hf": ("convert @cross --to hf --out out", "model.safetensors"),
    "page": ("page @run", "run/index.html"),
    "train --only generate": ("train --only generate --out @run --generate_samples 1", "000_"),
}
PRINTERS = ("data check @music", "metrics --n 2", "analyser @good.wav --clips 1", "chroma @good.wav",
            "train --only valid --out @run", "train --only evaluate --out @run")


def code_of(command: str, otherwise: int) -> int:
    """train.py says 1 where it is not the user's mistake."""
    return 1 if command.startswith("train") else otherwise


@contextlib.contextmanager
def full_disk():
    """No file may grow past 64 bytes: a real failure of write(2). But the memory that sound is encoded in."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    encode = audio.encode_audio

    def encode_in_memory(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        try:
            return encode(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "encode_audio", encode_in_memory)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_output():
    """A full disk behind standard output."""
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        yield


@contextlib.contextmanager
def signal_in_a_write(number: int):
    """A signal comes when the first file, written but not renamed, is flushed to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), number))
        yield


@contextlib.contextmanager
def signal_in_a_print(number: int):
    """A signal comes with the first line printed."""
    class Output(io.StringIO):
        def write(self, text: str) -> int:
            if not self.tell():
                super().write(text)
                os.kill(os.getpid(), number)
            return len(text)

    with contextlib.redirect_stdout(Output()):
        yield


@contextlib.contextmanager
def read_only():
    """No file or folder can be made: root may write everywhere, so it is said so here."""
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    def open_to_read(path, mode="r", *rest, **more):
        return builtins.open(path, mode, *rest, **more) if "r" in mode else refuse(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "open", open_to_read, raising=False)
        patch.setattr(Path, "mkdir", lambda path, *a, **k: path.is_dir() or refuse(path))
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        yield


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("fault", [full_disk, read_only])
def test_a_file_that_cannot_be_written(name, fault, tmp_path, bad_input_folder):
    command, file = WRITERS[name]
    ending = bad_input.run_case(name, command, tmp_path, bad_input_folder, fault())
    line = bad_input.the_line(ending.err)
    assert ending.code == code_of(command, 2), line
    if fault is full_disk:
        assert file in line and "too large" in line
    assert ending.after == ending.before, ending.after.keys() - ending.before.keys()
    again = bad_input.run_case(name, command, tmp_path, bad_input_folder)
    assert again.code == 0, again.err


@pytest.mark.parametrize("name, number",
                         list(zip(WRITERS, itertools.cycle((signal.SIGINT, signal.SIGTERM)))))
def test_a_signal_in_a_write(name, number, tmp_path, bad_input_folder):
    command, _ = WRITERS[name]
    ending = bad_input.run_case(name, command, tmp_path, bad_input_folder, signal_in_a_write(number))
    assert ending.code == 128 + number and f"stopped by {number.name}" in ending.err + ending.out
    assert len(ending.err.splitlines()) <= 1
    assert ending.after == ending.before, ending.after.keys() - ending.before.keys()
    again = bad_input.run_case(name, command, tmp_path, bad_input_folder)
    assert again.code == 0, again.err


@pytest.mark.parametrize("command", PRINTERS)
def test_printing(command, tmp_path, bad_input_folder):
    """Standard output on a full disk, and signals."""
    ending = bad_input.run_case(command, command, tmp_path, bad_input_folder, no_output())
    line = bad_input.the_line(ending.err)
    assert ending.code == code_of(command, 2) and "standard output" in line and "No space left" in line
    number = signal.SIGINT if "evaluate" in command else signal.SIGTERM
    ending = bad_input.run_case(command, command, tmp_path, bad_input_folder, signal_in_a_print(number))
    assert ending.code == 128 + number and ending.after == ending.before


def test_a_training_goes_on_without_its_output(tmp_path, bad_input_folder):
    """Also the line that says that a file was not written may find a full disk."""
    command = "train --generate_samples 1"
    ending = bad_input.run_case(command, command, tmp_path, bad_input_folder, no_output())
    assert ending.code == 0 and "standard output could not be written" in bad_input.the_line(ending.err)
    wanted = {f"out/{name}" for name in ("best.pt", "last.pt", "log.jsonl", "index.html")}
    assert wanted <= ending.after.keys()
    assert any(name.startswith("out/samples/epoch_0001/000_") for name in ending.after)


def test_a_cache_that_stopped_says_that_it_goes_on(tmp_path, bad_input_folder):
    command = "data cache @music --out out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.encode.write_shard", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        ending = bad_input.run_case("cache", command, tmp_path, bad_input_folder)
    unfinished = r"out is unfinished: 0 of \d+ files to encode are stored, the same command goes on"
    assert ending.code == 130 and re.search(unfinished, ending.out)
    assert ending.err == "data.py: stopped by SIGINT\n"
    assert bad_input.run_case("cache", command, tmp_path, bad_input_folder).code == 0


@pytest.mark.parametrize("suffix", audio.WRITTEN_SUFFIXES)
def test_audio_is_whole_or_not_there(suffix, tmp_path):
    path, wav = tmp_path / f"a{suffix}", torch.rand(2, 16_000) - 0.5
    with full_disk(), pytest.raises(OSError, match=f"a{suffix} could not be written .*too large"):
        audio.write_audio(path, wav, 16_000)
    assert not list(tmp_path.iterdir())
    audio.write_audio(path, wav, 16_000)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError):
        audio.write_audio(path, -wav, 16_000)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_clip_and_its_record_are_written_both_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        audio.write_clip(tmp_path / "000.wav", torch.zeros(1, 100), 16_000, {})
    assert not list(tmp_path.iterdir())


def test_the_heads_of_the_analyser(tmp_path):
    heads = analyser.Analyser()
    with full_disk(), pytest.raises(OSError, match="heads.npz could not be written"):
        heads.save(tmp_path / "heads.npz")
    assert not list(tmp_path.iterdir())
    heads.save(tmp_path / "heads.npz")
    assert (tmp_path / "heads.npz").stat().st_size > 64


def test_nothing_writes_past_the_one_writer():
    """No file of the product opens another to write to it but support/common.py, which writes beside it."""
    here = Path(__file__).parent.parent
    folders = (here, *(here / room for room in ("support", "evaluate", "interop", "tools")))
    sources = [path for folder in folders for path in folder.glob("*.py")]
    direct = re.compile(r"write_text\(|write_bytes\(|savez\w*\(path|open\([^)]*[\"'][wx]b?[\"']")
    found = {path.name for path in sources if direct.search(path.read_text())}
    assert found == {"common.py"} and len(sources) > 30
    assert [p.name for p in sources if re.search(r"\bsave_file\(", p.read_text())] == ["tensors.py"]


# ----------------------------------------------------------------------------------------------------------
# kills


def start(action) -> int:
    """Forks a process that does something and exits with what it returns."""
    if (pid := os.fork()) == 0:
        code = 99
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            code = action() or 0
        finally:
            os._exit(code)
    return pid


def test_no_half_wav_after_a_kill(tmp_path):
    """Killed while it writes clips of 60 s, as soon as one is seen: whatever has a final name is whole."""
    wav = torch.rand(2, 32_000 * 60) - 0.5

    def write_clips() -> None:
        for i in range(99):
            audio.write_audio(tmp_path / f"{i}.wav", wav, 32_000)

    for moment in (0.0, 0.01, 0.03):
        pid, deadline = start(write_clips), time.monotonic() + 30
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            pass
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert list(tmp_path.iterdir())
        for path in tmp_path.iterdir():
            assert path.suffix == ".tmp" or soundfile.info(path).frames == wav.shape[1]
            path.unlink()


def test_a_conversion_that_was_killed_can_be_made_again(tmp_path, bad_input_folder, monkeypatch):
    argv = [str(bad_input_folder / "run"), "--to", "nano", "--out", str(tmp_path / "out")]

    def killed() -> None:
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        convert.main(argv)

    assert os.waitstatus_to_exitcode(os.waitpid(start(killed), 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert convert.main(argv) == 0 and (tmp_path / "out" / "best.pt").is_file()


# ----------------------------------------------------------------------------------------------------------
# names


def test_two_generate_in_one_folder(tmp_path, bad_input_folder):
    """Three processes with 5 x 3 clips each: 45 clips, whole, each with its record."""
    argv = ["--run", str(bad_input_folder / "run"), "--unconditional", "--n", "3", "--seconds", "0.1",
            "--device", "cpu", "--out", str(tmp_path)]
    pids = [start(lambda: max(generate.main(argv) for _ in range(5))) for _ in range(3)]
    assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids} == {0}
    wanted = [f"{i:03d}{suffix}" for i in range(45) for suffix in (".json", ".wav")]
    assert sorted(path.name for path in tmp_path.iterdir()) == wanted


def test_names_are_held(tmp_path):
    (tmp_path / "004.wav").touch()
    (tmp_path / "notes.txt").touch()
    with common.numbered_names(tmp_path, 2) as mine, common.numbered_names(tmp_path, 2) as others:
        assert [path.name for path in mine + others] == ["005", "006", "007", "008"]
        audio.write_audio(mine[0].with_suffix(".wav"), torch.zeros(1, 9), 16_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["004.wav", "005.wav", "notes.txt"]


def test_a_name_that_another_takes_while_one_looks(tmp_path, monkeypatch):
    """The other is done with 000 between the look at the folder and the first name held."""
    glob = Path.glob

    def look(folder, pattern):
        found = list(glob(folder, pattern))
        (tmp_path / "000.wav").touch()
        return found

    monkeypatch.setattr(Path, "glob", look)
    with common.numbered_names(tmp_path, 1) as names:
        assert [path.name for path in names] == ["001"]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_round_trip_onto_a_link_of_its_input(link, tmp_path, capsys):
    source, other = tmp_path / "in.wav", tmp_path / "out.wav"
    audio.write_audio(source, torch.rand(1, 16_000) - 0.5, 16_000)
    link(source, other)
    before = source.read_bytes()
    assert tokenizer.main([str(source), str(other)]) == 2
    error = capsys.readouterr().err
    assert "out.wav: is the input itself" in error and error.count("\n") == 1
    assert source.read_bytes() == before


def test_a_link_to_another_file_stays_a_link(tmp_path):
    audio.write_audio(tmp_path / "in.wav", torch.rand(1, 16_000) - 0.5, 16_000)
    (tmp_path / "out.wav").symlink_to(tmp_path / "far.wav")
    assert tokenizer.main([str(tmp_path / "in.wav"), str(tmp_path / "out.wav")]) == 0
    assert (tmp_path / "out.wav").is_symlink() and soundfile.info(tmp_path / "far.wav").frames == 16_000
