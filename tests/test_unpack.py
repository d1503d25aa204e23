"""Packed data becomes a plain folder: what is taken and what is not, whoever packed it, however it ends."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

import data
from bad_material import audio
from support import unpack

SONGS = {kind: audio(None, kind=kind) for kind in ("WAV", "FLAC", "OGG", "MP3")}
WAV = SONGS["WAV"]


def make_tar(path: Path, members: dict, mode: str = "w") -> Path:
    """A tar of {name: content}; a content that is a TarInfo stands for itself."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def make_parquet(path: Path, columns: dict, classes: dict | None = None) -> Path:
    """A parquet file of {column: values}; classes: {column: names}, as hub data sets note them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    table = pyarrow.table(columns)
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in (classes or {}).items()}
    note = json.dumps({"info": {"features": features}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": note}), path)
    return path


def files_of(folder: Path) -> dict:
    """{path: content} of what is not hidden."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)}


def run(capsys, *argv) -> tuple[int, str]:
    """(exit code, what is printed) of data.py import."""
    code = data.main(["import", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_tar_shard_becomes_audio_and_captions(tmp_path, capsys):
    """Texts find the audio of their name, or of their sample; everything else is counted."""
    link = tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    shard = make_tar(tmp_path / "train-000007.tar", {
        "a.mix.mp3": SONGS["MP3"], "a.json": b'{"description": "a mix"}', "a.cls": b"3",
        "./deep/01. Song.FLAC": SONGS["FLAC"], "deep/01. Song.TXT": b"first", "deep/01. Other.wav": WAV,
        "/b.ogg": SONGS["OGG"], "b.caption": b"of b", "b.txt": b"again", "b.csv": b"x,y", "c.txt": b"lost",
        "../evil.wav": WAV, "x/../../evil.wav": WAV, "..\\evil.wav": WAV, "._a.mp3": b"x", "link.wav": link,
        "line\n.wav": WAV, f"{'x' * 230}.wav": WAV})
    code, out = run(capsys, shard, "--out", tmp_path / "out")
    assert code == 0
    assert files_of(tmp_path / "out") == {
        "train/000007/a.mix.mp3": SONGS["MP3"], "train/000007/a.mix.json": b'{"description": "a mix"}',
        "train/000007/deep/01. Song.FLAC": SONGS["FLAC"], "train/000007/deep/01. Song.txt": b"first",
        "train/000007/deep/01. Other.wav": WAV, "train/000007/b.ogg": SONGS["OGG"],
        "train/000007/b.txt": b"of b", "train/000007/b.csv": b"x,y"}
    for line in ("4 audio files", "3 leads out of its folder", "1 hidden file", "1 link or device",
                 "1 control characters", "1 name too long", "1 neither audio nor text by its name, .cls",
                 "2 text of no audio, or its second one"):
        assert line in out, line
    assert not (tmp_path / "evil.wav").exists()


def test_a_parquet_file_becomes_audio_and_captions(tmp_path, capsys):
    """Names by path, row or bytes, classes by their names; each row that is left out is counted."""
    cells = [{"bytes": SONGS["MP3"], "path": "a.mp3"}, {"bytes": SONGS["FLAC"], "path": "/x/a"},
             {"bytes": WAV, "path": "../../evil.wav"}, {"bytes": SONGS["OGG"], "path": None},
             {"bytes": None, "path": "away.mp3"}, {"bytes": b"no audio", "path": "b.png"}, None]
    n = len(cells)
    shard = make_parquet(
        tmp_path / "train-00000-of-00002-0123456789abcdef.parquet",
        {"picture": [{"bytes": b"\x89PNG", "path": "c.png"}] * n, "audio": cells,
         "caption": ["one", "two", None, "four", "", "six", "seven"], "genre": [1, 0, 1, -1, 0, 0, 0],
         "tempo": [90.5] * n, "tags": [["a", "b"]] * n, "embedding": [[0.1, 0.2]] * n},
        classes={"genre": ["blues", "rock"]})
    code, out = run(capsys, shard, "--out", tmp_path / "out")
    assert code == 0
    folder = tmp_path / "out/train/00000-of-00002-0123456789abcdef"
    same = {"tempo": 90.5, "tags": ["a", "b"]}
    made = {name: json.loads(content) if name.endswith(".json") else content
            for name, content in files_of(folder).items()}
    assert made == {
        "a.mp3": SONGS["MP3"], "a.json": {"caption": "one", "genre": "rock"} | same,
        "a_1.flac": SONGS["FLAC"], "a_1.json": {"caption": "two", "genre": "blues"} | same,
        "evil.wav": WAV, "evil.json": {"genre": "rock"} | same,
        "000003.ogg": SONGS["OGG"], "000003.json": {"caption": "four", "genre": -1} | same}
    for line in ("4 audio files", "1 row of a path without audio", "1 not audio", "1 row without audio",
                 "2 column of no texts or numbers"):
        assert line in out, line


def test_a_tar_that_became_parquet(tmp_path, capsys):
    """The hub shows WebDataset's members as columns."""
    shard = make_parquet(tmp_path / "0000.parquet", {
        "mp3": [SONGS["MP3"]] * 2, "json": [{"description": "by json"}, None], "txt": [None, "by txt"],
        "__key__": ["a", "b"]})
    assert run(capsys, shard, "--out", tmp_path / "out")[0] == 0
    rows = [json.loads(content) for name, content in files_of(tmp_path / "out").items() if "json" in name]
    assert rows == [{"description": "by json", "__key__": "a"}, {"text": "by txt", "__key__": "b"}]


def test_the_column_of_captions_can_be_named(tmp_path, capsys):
    shard = make_parquet(tmp_path / "a.parquet", {
        "mp3": [SONGS["MP3"]], "sentence": ["slow"], "mood": ["sad"]})
    code, out = run(capsys, shard, "--out", tmp_path / "out", "--caption_column", "sentences")
    assert code == 2 and "--caption_column sentences: it has sentence, mood" in out
    assert run(capsys, shard, "--out", tmp_path / "out", "--caption_column", "sentence")[0] == 0
    made = json.loads((tmp_path / "out/a/000000.json").read_text())
    assert made == {"mood": "sad", "description": "slow"}
    code, out = run(capsys, shard, "--out", tmp_path / "out", "--caption_column", "mood")
    assert code == 2 and "another --caption_column" in out
    code, out = run(capsys, make_tar(tmp_path / "b.tar", {"a.wav": WAV}), "--out", tmp_path / "out",
                    "--caption_column", "sentence")
    assert code == 2 and "is for parquet" in out


@pytest.mark.parametrize("damage", [
    "in audio", "between members", "end missing", "junk header", "empty", "gz"])
def test_a_damaged_shard_is_named_and_the_others_are_imported(damage, tmp_path, capsys):
    """tarfile takes some of these for the end of the archive."""
    good = make_tar(tmp_path / "good.tar", {"a.wav": WAV})
    bad = make_tar(tmp_path / "bad.tar", {"a.wav": WAV, "b.wav": WAV})
    raw = bad.read_bytes()
    second = 512 + len(WAV) + -len(WAV) % 512
    raw = {"in audio": raw[:second // 2], "between members": raw[:second], "end missing": raw[:2 * second],
           "junk header": raw[:second] + b"x" * 512 + raw[second + 512:], "empty": b"",
           "gz": gzip.compress(raw)[:9999]}[damage]
    bad.write_bytes(raw)
    code, out = run(capsys, good, bad, "--out", tmp_path / "out")
    assert code == 2 and "1 of 2 shards cannot be imported" in out and "bad.tar" in out
    assert list(files_of(tmp_path / "out")) == ["good/a.wav"]
    assert not (tmp_path / "out/.bad.part").exists()


def test_joined_and_compressed_tars_are_read_whole(tmp_path, capsys):
    one, two = (make_tar(tmp_path / f"{name}.tar", {f"{name}.wav": WAV}) for name in ("one", "two"))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    make_tar(tmp_path / "three.tar.gz", {"three.wav": WAV}, "w:gz")
    assert run(capsys, one, tmp_path / "three.tar.gz", "--out", tmp_path / "out")[0] == 0
    assert list(files_of(tmp_path / "out")) == ["one/one.wav", "one/two.wav", "three/three.wav"]


def test_sizes_are_not_believed(tmp_path, capsys, monkeypatch):
    """A member that claims terabytes is left out before anything is written."""
    monkeypatch.setattr(unpack, "MAX_AUDIO_BYTES", len(WAV))
    shard = make_tar(tmp_path / "a.tar", {"good.wav": WAV, "large.wav": WAV + b"x", "good.txt": b"good"})
    monkeypatch.setattr(unpack, "MAX_TEXT_BYTES", 3)
    code, out = run(capsys, shard, "--out", tmp_path / "out")
    assert code == 0 and "2 absurd size" in out
    assert list(files_of(tmp_path / "out")) == ["a/good.wav"]


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupted_import_goes_on(stop_at, tmp_path, capsys, monkeypatch):
    """To the same folder, without writing again what is there; until then no half shard is to be seen."""
    for shard in "xy":
        make_tar(tmp_path / f"{shard}.tar", {f"{name}.wav": WAV for name in "abc"})
    assert run(capsys, tmp_path / "x.tar", tmp_path / "y.tar", "--out", tmp_path / "whole")[0] == 0
    write, written = unpack.write_piece, []

    def stopped(folder, piece):
        if len(written) == stop_at + 1:
            raise KeyboardInterrupt
        written.append(piece.place)
        write(folder, piece)

    monkeypatch.setattr(unpack, "write_piece", stopped)
    code, out = run(capsys, tmp_path / "x.tar", tmp_path / "y.tar", "--out", tmp_path / "out")
    assert code == 130 and "the same command goes on" in out
    assert list(files_of(tmp_path / "out")) == [f"x/{name}.wav" for name in "abc" * (stop_at == 3)]
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.wav")}
    if stop_at < 3:    # as a kill leaves a folder whose record is being written
        (tmp_path / "out/.y.part").mkdir()
        (tmp_path / "out/.y.part" / f"{unpack.RECORD}.tmp").touch()
    monkeypatch.setattr(unpack, "write_piece", write)
    assert run(capsys, tmp_path / "x.tar", tmp_path / "y.tar", "--out", tmp_path / "out")[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    after = {path.stat().st_ino for path in (tmp_path / "out").rglob("*.wav")}
    assert len(before) == stop_at + 1 and set(before.values()) <= after
    assert not list((tmp_path / "out").rglob("*.part"))


def test_nothing_of_the_user_is_overwritten(tmp_path, capsys):
    """Neither a folder in the way nor a mended caption; a shard that changed is no longer the same."""
    shard, out = make_tar(tmp_path / "a.tar", {"a.wav": WAV, "a.txt": b"old"}), tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a/mine.txt").write_text("mine")
    code, said = run(capsys, shard, "--out", out)
    assert code == 2 and "was not made by an import" in said and list(files_of(out)) == ["a/mine.txt"]
    out = tmp_path / "other"
    assert run(capsys, shard, "--out", out)[0] == 0
    (out / "a/a.txt").write_text("mended")
    code, said = run(capsys, shard, "--out", out)
    assert code == 0 and "1 of 1 shards are imported already" in said
    make_tar(shard, {"a.wav": WAV, "a.txt": b"newer"})
    code, said = run(capsys, shard, "--out", out)
    assert code == 2 and "delete that folder" in said
    assert files_of(out)["a/a.txt"] == b"mended"


def test_a_folder_of_shards_keeps_its_folders(tmp_path, capsys):
    for folder in ("train", "validation", ".cache"):
        (tmp_path / "hub" / folder).mkdir(parents=True)
        make_tar(tmp_path / "hub" / folder / "0000.tar", {f"{folder}.wav": WAV})
    assert run(capsys, tmp_path / "hub", "--out", tmp_path / "out")[0] == 0
    assert list(files_of(tmp_path / "out")) == ["train/0000/train.wav", "validation/0000/validation.wav"]
    code, out = run(capsys, *sorted((tmp_path / "hub").rglob("0000.tar")), "--out", tmp_path / "flat")
    assert code == 2 and "would both go to" in out and not (tmp_path / "flat").exists()


def test_what_cannot_be_imported_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "song.zip").write_bytes(b"PK")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    notes = make_tar(tmp_path / "notes.tar", {"a.txt": b"slow"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)    # as if it were not installed
    for source, words in (
            ("user/name", "hf download"), (tmp_path / "song.zip", ".parquet, .tar"),
            (notes, "holds no audio"), (tmp_path / "table.parquet", "pip install pyarrow")):
        code, out = run(capsys, source, "--out", tmp_path / "out")
        assert code == 2 and words in out and not list(tmp_path.glob("out/*")), out


def test_a_parquet_file_without_audio_is_refused(tmp_path, capsys):
    table = make_parquet(tmp_path / "table.parquet", {"file_name": ["a.mp3"], "text": ["slow"]})
    (tmp_path / "text.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    code, out = run(capsys, table, tmp_path / "text.parquet", "--out", tmp_path / "out")
    assert code == 2 and "no column holds audio files" in out and "cannot be read as parquet" in out
    assert not list((tmp_path / "out").iterdir())
