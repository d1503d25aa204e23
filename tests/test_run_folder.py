"""The folder of a run: what is in it is never written over, whoever put it there, and has one writer."""

import shutil
from pathlib import Path

import pytest
import torch

import bad_material
import tokenizer
import train
from bad_input import listing
from evaluate import stages
from support import estimate, resume
from test_train import SMALL, lines

ONE = [*SMALL, "--epochs", "1", "--segment_seconds", "0.5", "--valid_samples", "4"]


def run(out, *flags, samples: int = 0) -> int:
    """A training, without an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "evaluate_stage", lambda run: {})
        patch.setattr(estimate, "machine_flops", lambda args: 1e9)
        return train.main([*ONE, "--generate_samples", str(samples), "--out", str(out), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("folder") / "run"
    assert run(out, samples=1) == 0
    return out


@pytest.fixture()
def unsaved(finished, tmp_path):
    """What a run leaves that was killed before its first checkpoint: its config and a part of its log."""
    out = tmp_path / "unsaved"
    out.mkdir()
    shutil.copy(finished / "config.json", out)
    records = (finished / "log.jsonl").read_text().splitlines(keepends=True)
    assert ['"stage": "train"' in record for record in records[:5]] == [True] * 4 + [False]
    (out / "log.jsonl").write_text("".join(records[:4]) + records[4][:30])
    return out


def write(name: str, content: bytes = b"precious"):
    """Puts a file into a folder for a new run."""
    def prepare(out: Path, finished: Path) -> None:
        out.mkdir()
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    return prepare


def without(*names: str):
    """A finished run of which files were removed."""
    return lambda out, finished: shutil.copytree(finished, out, ignore=shutil.ignore_patterns(*names))


def keep(*names: str):
    """Files of a finished run, and nothing else of it."""
    def prepare(out: Path, finished: Path) -> None:
        out.mkdir()
        for name in names:
            shutil.copy(finished / name, out)
    return prepare


PRECIOUS = {    # what lies in the folder: (how it comes there, what the line names)
    "a finished run without its checkpoints": (without("last*"), "best.pt"),
    "and without its best weights": (without("last*", "best.pt"), "samples"),
    "its log": (keep("config.json", "log.jsonl"), "more than a first epoch"),
    "its log alone": (keep("log.jsonl"), "log.jsonl"),
    "best weights": (keep("best.pt"), "--out"),
    "a foreign best.pt": (write("best.pt"), "best.pt"),
    "a foreign log": (write("log.jsonl", b'{"kind": "step", "loss": 3}\n'), "log.jsonl"),
    "a foreign log in one line": (write("log.jsonl", b"1.5 2.5"), "log.jsonl"),
    "a log of nested lists": (write("log.jsonl", b"[" * 100_000 + b"\n"), "log.jsonl"),
    "a folder called log.jsonl": (write("log.jsonl/x"), "log.jsonl"),
    "a foreign config.json": (write("config.json", b'{"model_type": "musicgen"}'), "config.json"),
    "a damaged config.json": (write("config.json", b"{"), "config.json"),
    "a page": (write("index.html"), "index.html"),
    "samples": (write("samples/drums.wav"), "samples"),
}


@pytest.mark.parametrize("resume_flag", ("auto", "never"))
@pytest.mark.parametrize("name", PRECIOUS)
def test_nothing_is_written_over(name, resume_flag, finished, tmp_path, capsys):
    prepare, says = PRECIOUS[name]
    out = tmp_path / "run"
    prepare(out, finished)
    before = listing(out)
    assert run(out, "--resume", resume_flag) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and "another --out" in error, error
    after = listing(out)
    assert before.items() <= after.items() and after.keys() - before.keys() <= {".lock"}


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(unsaved, finished):
    assert run(unsaved) == 0
    ours, theirs = ([(r["stage"], r["step"], r.get("ce")) for r in lines(out)] for out in (unsaved, finished))
    assert ours == theirs


@pytest.mark.parametrize("log", ("", None))
def test_one_that_logged_nothing_may_change_its_flags(log, unsaved):
    (unsaved / "log.jsonl").unlink()
    if log is not None:
        (unsaved / "log.jsonl").write_text(log)
    assert run(unsaved, "--seed", "1") == 0


def test_one_of_other_flags_keeps_its_log(unsaved, capsys):
    before = listing(unsaved)
    assert run(unsaved, "--seed", "1") == 2
    assert "--seed 0 there, 1 now" in capsys.readouterr().err
    assert before.items() <= listing(unsaved).items()


def test_best_weights_that_are_gone_are_written_again(finished, tmp_path, capsys):
    """last.pt holds them; "finished" names no file that is not there."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "best.pt").unlink()
    assert run(out, "--init_from", "gone") == 0
    printed = capsys.readouterr().out
    assert f"best valid ce {lines(out)[4]['ce']:.4f}; {out / 'best.pt'}" in printed
    assert "; --init_from gone has no effect" in printed
    there, here = (torch.load(Path(o, "best.pt"), weights_only=True) for o in (finished, out))
    assert all(torch.equal(x, here["model"][name]) for name, x in there["model"].items())
    assert {k: v for k, v in here.items() if k not in ("model", "args", "assets")} == \
        {k: v for k, v in there.items() if k not in ("model", "args", "assets")}


def test_a_run_follows_its_data_and_its_codec(tmp_path, monkeypatch, capsys):
    """Another spelling of a path, and files that were moved, are the same data; one file more is not."""
    monkeypatch.chdir(tmp_path)
    bad_material.music(tmp_path / "music", "good.wav")
    shutil.copy(tokenizer.TOY_FILE, "codec.pt")
    given = {"--dataset": "music", "--codec": "codec.pt", "--valid": "0.4", "--workers": "0"}

    def again(**more) -> int:
        flags = given | {f"--{name}": value for name, value in more.items()}
        return run("out", *(word for pair in flags.items() for word in pair))

    assert again() == 0
    shutil.move("music", "elsewhere")
    shutil.move("codec.pt", "other.pt")
    for name in ("./elsewhere", "elsewhere/", str(tmp_path / "elsewhere")):
        assert again(dataset=name, codec="other.pt") == 0
    assert f"--dataset is {tmp_path / 'elsewhere'} now" in capsys.readouterr().out
    assert again(dataset="elsewhere", codec="toy") == 0              # the same codec
    assert again(dataset="elsewhere", codec="toy", valid="0.7") == 2
    shutil.copy("elsewhere/song0.wav", "elsewhere/song9.wav")
    capsys.readouterr()
    assert again(dataset="elsewhere", codec="toy") == 2
    assert "--dataset music there, elsewhere now" in capsys.readouterr().err
    shutil.move("elsewhere", "music")                                # one more, in the same place
    for name in ("./music", "music/", str(tmp_path / "music")):
        assert again(dataset=name, codec="toy") == 0


@pytest.mark.parametrize("how", ("removed", "begun anew"))
def test_a_run_whose_folder_is_taken_away_stops(how, tmp_path, monkeypatch, capsys):
    """It writes nothing more: not into the folder of the run that came after it either."""
    out, save = tmp_path / "run", resume.save_checkpoint

    def save_and_lose(run):
        save(run)
        if run.step == 2:
            shutil.rmtree(out)
            if how == "begun anew":
                out.mkdir()
                (out / ".lock").touch()
                (out / "log.jsonl").touch()

    monkeypatch.setattr(resume, "save_checkpoint", save_and_lose)
    assert run(out, "--save_minutes", "0") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "removed, or begun anew" in error and "after update 3" in error
    assert listing(tmp_path).keys() == ({"run/.lock", "run/log.jsonl"} if how == "begun anew" else set())
    assert how == "removed" or (out / "log.jsonl").read_text() == ""
