"""Collections of odd users: a damaged or ambiguous file is named in one line, and nothing gets lost."""

import gzip
import json
import zipfile

import numpy as np
import pytest
import soundfile

import data
from bad_material import audio
from support import scan
from test_unpack import WAV, files_of, make_parquet, make_tar, run


def captions(folder, **asked) -> dict:
    """{file: caption} of a dataset."""
    return {entry.key: entry.meta["description"] for entry in scan.scan_dataset(str(folder), **asked).entries}


def music(folder, table: str = "m.csv", content: str | bytes = b""):
    """A folder of a.wav, b.wav and a table."""
    for name in ("a.wav", "b.wav"):
        (folder / name).write_bytes(audio(None, kind="WAV"))
    (folder / table).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_table_that_was_cut_off_is_named(tmp_path):
    """One line, and the music is used without it."""
    whole = gzip.compress(b'{"file_name": "a.wav", "text": "slow"}\n' * 300)
    found = scan.scan_dataset(str(music(tmp_path, "metadata.jsonl.gz", whole[:-12])))
    assert len(found.entries) == 2 and any("cut off or damaged" in line for line in found.notes)


def test_a_quote_that_is_never_closed_is_named(tmp_path):
    """Its cell would hold all rows after it. Quotes within a text, and texts of several lines, stay."""
    found = scan.scan_dataset(str(music(tmp_path, "m.csv", 'file_name,text\na.wav,"slow\nb.wav,fast\n')))
    assert any("a quote that begins in line 2 is never closed" in line for line in found.notes)
    assert not any(entry.meta["description"] for entry in found.entries)
    music(tmp_path, "m.csv", 'file_name,text\na.wav,a 12" single\nb.wav,"fast\nand ""loud"""\n')
    assert captions(tmp_path) == {"a.wav": 'a 12" single', "b.wav": 'fast and "loud"'}


@pytest.mark.parametrize("table, content, wanted", [
    ("t.json", '[{"file_name": "a.wav", "text": NaN}, {"file_name": "b.wav", "text": "two"}]', [None, "two"]),
    ("t.json", '[{"file_name": "a.wav", "text": ["x", null]}, {"file_name": "b.wav", "text": "two"}]',
     ["x", "two"]),
    ("m.csv", "File_Name,Caption\nA.WAV,one\nB,two\n", ["one", "two"]),
    ("m.csv", "file_name,caption,caption\na.wav,one,other\nb.wav,two,\n", ["one", "two"]),
])
def test_cells_mean_what_they_say(tmp_path, table, content, wanted):
    """NaN is an empty cell; capitals do not matter; of two columns of a name the first counts."""
    assert list(captions(music(tmp_path, table, content)).values()) == wanted


def test_the_column_that_is_missing_is_named_once(tmp_path):
    """The flag is not said twice in one line."""
    music(tmp_path, "m.csv", "file_name,caption\na.wav,one\n")
    with pytest.raises(ValueError, match="^--caption_column zzz: it has file_name, caption$"):
        captions(tmp_path, caption_column="zzz")


def test_fields_of_another_kind_in_a_manifest(tmp_path):
    """A line's info_path, meta and from may be anything; what is not read is named."""
    manifest = music(tmp_path) / "data.jsonl"
    manifest.write_text('{"path": "a.wav", "info_path": 5}\n{"path": "b.wav", "meta": {"text": "x"}}\n')
    found = scan.scan_dataset(str(manifest))
    assert "info_path left out: 5" in found.problems[str(tmp_path / "a.wav")]
    assert "fields not used: manifest's meta (1)" in found.notes


def test_a_zip_of_captions_that_is_damaged(tmp_path):
    """The file whose caption it holds is used without one, with the reason."""
    music(tmp_path)
    with zipfile.ZipFile(tmp_path / "i.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.json", json.dumps({"description": "z" * 200 + "abcdef"}))
    raw = bytearray((tmp_path / "i.zip").read_bytes())
    raw[36] |= 6  # the kind of the first block, which no decompressor knows
    (tmp_path / "i.zip").write_bytes(raw)
    (tmp_path / "data.jsonl").write_text('{"path": "a.wav", "info_path": "i.zip:a.json"}\n')
    found = scan.scan_dataset(str(tmp_path))
    assert "json not used" in found.problems[str(tmp_path / "a.wav")]


@pytest.mark.parametrize("seconds", ["nan", "-1", "0", "inf"])
def test_check_refuses_a_segment_of_no_length(tmp_path, capsys, seconds):
    """As training does."""
    assert data.main(["check", str(music(tmp_path)), "--segment_seconds", seconds]) == 2
    assert f"--segment_seconds {seconds}" in capsys.readouterr().err


def test_no_row_of_parquet_takes_the_name_of_another(tmp_path, capsys):
    """Rows a_2, a, a: the third would be a_2 again."""
    names = ("a_2.wav", "a.wav", "a.wav")
    cells = [{"bytes": WAV + bytes(2 * i), "path": name} for i, name in enumerate(names)]
    shard = make_parquet(tmp_path / "x.parquet", {"audio": cells, "text": ["one", "two", "three"]})
    assert run(capsys, shard, "--out", tmp_path / "out")[0] == 0
    assert sorted(captions(tmp_path / "out").values()) == ["one", "three", "two"]


@pytest.mark.parametrize("asked", ["txt", "title"])
def test_the_caption_column_of_parquet_may_have_any_name(tmp_path, capsys, asked):
    """Also one that is renamed on the way, or where the row has a Description of its own."""
    columns = {"mp3": [{"bytes": WAV, "path": "a.wav"}], "Description": ["no"], asked: ["yes"]}
    shard = make_parquet(tmp_path / "x.parquet", columns)
    assert run(capsys, shard, "--out", tmp_path / "out", "--caption_column", asked)[0] == 0
    assert list(captions(tmp_path / "out").values()) == ["yes"]


def test_an_empty_txt_column_takes_no_text_away(tmp_path, capsys):
    """Of the columns txt and text, the one that holds something is the caption."""
    songs = [{"bytes": WAV + bytes(2 * i), "path": f"{i}.wav"} for i in range(2)]
    columns = {"mp3": songs, "text": ["kept", None], "txt": [None, "other"]}
    assert run(capsys, make_parquet(tmp_path / "x.parquet", columns), "--out", tmp_path / "out")[0] == 0
    assert list(captions(tmp_path / "out").values()) == ["kept", "other"]


def test_a_date_of_no_calendar_is_no_traceback(tmp_path, capsys):
    """Python has no year 280000: the shard is named."""
    pyarrow = pytest.importorskip("pyarrow")
    late = pyarrow.array([2 ** 62], pyarrow.timestamp("us"))
    columns = {"audio": [{"bytes": WAV, "path": "a.wav"}], "t": late}
    code, printed = run(capsys, make_parquet(tmp_path / "x.parquet", columns), "--out", tmp_path / "out")
    assert code == 2 and "x.parquet" in printed and "date" in printed


def test_a_folder_with_the_name_of_a_shard_is_searched(tmp_path, capsys):
    """Spark writes x.parquet/part-0.parquet."""
    shards = tmp_path / "in" / "x.tar"
    shards.mkdir(parents=True)
    make_tar(shards / "part-0.tar", {"a.wav": WAV})
    assert run(capsys, tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    assert list(files_of(tmp_path / "out")) == ["x.tar/part/0/a.wav"]


def test_shards_whose_folders_lie_in_one_another_are_refused(tmp_path, capsys):
    """x.tar goes to x, x-1.tar to x/1: nothing is written."""
    for name in ("x.tar", "x-1.tar"):
        make_tar(tmp_path / name, {"1/a.wav": WAV})
    code, printed = run(capsys, tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "x-1.tar into it" in printed and not (tmp_path / "out").exists()


def test_a_member_that_is_file_and_folder(tmp_path, capsys):
    """The first of both is taken and the other counted."""
    shard = make_tar(tmp_path / "x.tar", {"a.wav": WAV, "a.wav/b.wav": WAV, "c.wav/d.wav": WAV, "c.wav": WAV})
    code, printed = run(capsys, shard, "--out", tmp_path / "out")
    assert code == 0 and "2 a file and a folder of one name" in printed
    assert list(files_of(tmp_path / "out")) == ["x/a.wav", "x/c.wav/d.wav"]


def test_a_shard_whose_name_cannot_be_used_is_named(tmp_path, capsys):
    """Not only what is wrong with it."""
    shard = make_tar(tmp_path / "new\nline.tar", {"a.wav": WAV})
    code, printed = run(capsys, shard, "--out", tmp_path / "out")
    assert code == 2 and "new\\nline.tar" in printed


def printed_by_check(capsys, folder, *more, code=0) -> str:
    """What `data.py check` prints of a folder."""
    assert data.main(["check", str(folder), *more]) == code
    said = capsys.readouterr()
    return said.out + said.err


def test_packed_files_among_the_audio_are_named(tmp_path, capsys):
    """With the command that unpacks them; an import's own record is none of what is skipped."""
    make_tar(music(tmp_path) / "more-000000.tar.gz", {"c.wav": WAV}, "w:gz")
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    said = printed_by_check(capsys, tmp_path)
    assert "skipped      2 packed, which `python data.py import FILE --out FOLDER` unpacks: " in said
    assert run(capsys, tmp_path / "more-000000.tar.gz", "--out", tmp_path / "out")[0] == 0
    assert "0 skipped" in printed_by_check(capsys, tmp_path / "out")


@pytest.mark.parametrize("content", [
    '{"num_captions_per_audio": 1, "data": [{"id": "a", "caption": "one"}, {"id": "b", "caption": "two"}]}',
    '{"location": "a.wav", "main_caption": "one"}\n{"location": "b.wav", "main_caption": "two"}\n'])
def test_json_tables_of_wavcaps_and_musicbench(tmp_path, content):
    assert captions(music(tmp_path, "captions.json", content)) == {"a.wav": "one", "b.wav": "two"}


def test_a_list_without_a_known_name_is_no_caption(tmp_path):
    """A game's album.json: the modes in which a track is played are words, but say nothing of its sound."""
    tracks = [{"filename": f"{x}.wav", "modes": ["duel", "skirmish", "campaign"], "bpm": 80} for x in "ab"]
    folder = music(tmp_path, "album.json", json.dumps({"title": "Songs", "tracks": tracks}))
    assert captions(folder) == {"a.wav": None, "b.wav": None}
    note, = scan.scan_dataset(str(folder)).notes
    assert note.endswith("2 files by their filename, no column of captions, other fields; not used: modes")


def test_files_without_a_text_in_a_table_are_counted(tmp_path):
    content = 'file_name,text,bpm\na.wav,,90\nb.wav,two,80\n'
    notes = scan.scan_dataset(str(music(tmp_path, "m.csv", content))).notes
    wanted = "2 files by their file_name, column text; 1 files have no text there"
    assert notes == [f"captions of 'm.csv': {wanted}"]


@pytest.mark.parametrize("flags, wanted", [
    (["--captions", "a.wav"], "--captions a.wav: no table by its name, which ends in .csv, .tsv, .jsonl"),
    (["--valid", "nofolder"], "--valid 'nofolder' is not there: give a folder of audio, a manifest "
                              ".jsonl[.gz], or a fraction"),
    (["--min_seconds", "9"], "--min_seconds 9 leaves no file for training"),
    (["--min_seconds", "-1"], "--min_seconds -1.0: at least 0")])
def test_flags_of_check_are_named(tmp_path, capsys, monkeypatch, flags, wanted):
    monkeypatch.chdir(music(tmp_path))
    assert wanted in printed_by_check(capsys, tmp_path, *flags, code=2)


def test_check_leaves_out_short_files_as_training_does(tmp_path, capsys):
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.full(8000 if i % 2 else 48_000, 0.1), 16_000)
    said = printed_by_check(capsys, tmp_path, "--min_seconds", "1", "--segment_seconds", "2")
    counts = [int(line.split()[1]) for line in said.splitlines() if line.startswith(("train ", "valid "))]
    assert sum(counts) == 3 and "draws        0.00 % go to the 0 files" in said


def make_arrow(path, cells: list, **columns) -> None:
    """What `save_to_disk` of Hugging Face's datasets writes: a stream of record batches."""
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"audio": cells} | columns)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def test_a_folder_of_save_to_disk(tmp_path, capsys):
    """Its splits lie in folders; what its functions kept beside them is no music."""
    cells = [{"bytes": WAV, "path": f"{name}.wav"} for name in "abc"]
    make_arrow(tmp_path / "d" / "train" / "data-00000-of-00001.arrow", cells, text=["one", "two", "three"])
    make_arrow(tmp_path / "d" / "train" / "cache-0123.arrow", cells, text=["one", "two", "three"])
    (tmp_path / "d" / "train" / "state.json").write_text("{}")
    code, said = run(capsys, tmp_path / "d", "--out", tmp_path / "out")
    assert code == 0 and "left out 1 intermediate results" in said
    assert list(captions(tmp_path / "out").items()) == [
        (f"train/data/00000-of-00001/{name}.wav", text) for name, text in zip("abc", ("one", "two", "three"))]
    (tmp_path / "cut.arrow").write_bytes(b"\xff\xff\xff\xff\0")
    code, said = run(capsys, tmp_path / "cut.arrow", "--out", tmp_path / "out")
    assert code == 2 and "cannot be read as arrow" in said


def test_a_caption_column_that_holds_no_texts_is_refused(tmp_path, capsys):
    cells = [{"bytes": WAV, "path": "a.wav"}]
    shard = make_parquet(tmp_path / "x.parquet", {"audio": cells, "notes": [{"a": "one"}], "text": ["two"]})
    code, said = run(capsys, shard, "--out", tmp_path / "out", "--caption_column", "notes")
    assert code == 2 and "--caption_column notes: it has text" in said
