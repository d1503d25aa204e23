"""Captions in tables, under other names and in manifests; what is listed, split and refused. Offline."""

import csv
import gzip
import json
import os
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data
from support.scan import Entry, scan_dataset, split_by_hash, split_entries


def song(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), np.full(round(1000 * seconds), 0.1), 1000)
    return path


def songs(folder, *names):
    for name in names:
        song(folder / name)
    return folder


def table(path, *rows, separator=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


def captions(found):
    """{name within the dataset: (caption, where it came from)}."""
    return {e.key: (e.meta["description"], e.caption) for e in found.entries}


def scan(folder, **more):
    return scan_dataset(str(folder), **more)


# --------------------------------------------------------------------------------------------------- sidecars
@pytest.mark.parametrize("fields, wanted", [
    ({"caption": "a"}, "a"), ({"text": "a"}, "a"), ({"prompt": "a"}, "a"), ({"style": "a"}, "a"),
    ({"tags": ["slow", "folk"]}, "slow, folk"), ({"Caption": "a"}, "a"), ({"captions": ["a"]}, "a"),
    ({"description": "a", "text": "b"}, "a"), ({"description": None, "text": "b"}, "b"),
    ({"caption": {"en": "x"}, "text": "b"}, "b")])
def test_json_fields_of_other_trainers(tmp_path, fields, wanted):
    songs(tmp_path, "a.wav")
    (tmp_path / "a.json").write_text(json.dumps(fields))
    assert captions(scan(tmp_path)) == {"a.wav": (wanted, "json")}


def test_fields_that_are_not_used_are_named(tmp_path):
    songs(tmp_path, "a.wav", "b.wav")
    (tmp_path / "a.json").write_text('{"text": "x", "tags": "y", "lyrics": "z", "empty": "", "bpm": 90}')
    (tmp_path / "b.json").write_text('{"lyrics": "z"}')
    found = scan(tmp_path)
    assert found.notes == ["fields not used: lyrics (2), tags (1)"] and not found.problems
    assert found.entries[0].meta["bpm"] == 90


def test_other_names_of_sidecars(tmp_path):
    songs(tmp_path, "a.wav", "b.wav", "c.wav", "d.WAV", "d.flac")
    for name in ("a.TXT", "b.wav.txt", "c.Json", "d.txt", "d.flac.txt", "README.txt"):
        (tmp_path / name).write_text('{"text": "c.Json"}' if name == "c.Json" else name)
    found = scan(tmp_path)
    assert captions(found) == {"a.wav": ("a.TXT", "txt"), "b.wav": ("b.wav.txt", "txt"),
                               "c.wav": ("c.Json", "json"), "d.WAV": ("d.txt", "txt"),
                               "d.flac": ("d.flac.txt", "txt")}
    assert found.notes[0] == "1 texts belong to no audio file of their name ('README.txt')"


# ----------------------------------------------------------------------------------------------------- tables
def write_rows(path, columns, rows):
    """A table in the format of its suffix."""
    if path.suffix in (".csv", ".tsv"):
        table(path, columns, *rows, separator="\t" if path.suffix == ".tsv" else ",")
        return
    objects = [dict(zip(columns, row)) for row in rows]
    if path.suffix == ".json":
        path.write_text(json.dumps(objects))
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(objects), path)
    else:
        content = "\n".join(map(json.dumps, objects)).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "t.tsv", "t.json",
                                  "t.jsonl.gz"])
def test_a_table_beside_the_audio(tmp_path, name):
    """Hugging Face's audiofolder, and its relatives. What stands beside a file wins over a table."""
    songs(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "b.txt").write_text("of b.txt")
    rows = [["a.wav", "slow, sad waltz", 90, "x"], ["b.wav", "of the table", 120, "y"],
            ["no.wav", "z", 1, "z"]]
    write_rows(tmp_path / name, ["file_name", "text", "bpm", "singer"], rows)
    found = scan(tmp_path)
    kind = name.removesuffix(".gz").split(".")[-1]
    assert captions(found) == {"a.wav": ("slow, sad waltz", kind), "b.wav": ("of b.txt", "txt"),
                               "c.wav": (None, "none")}
    assert [e.meta.get("bpm") for e in found.entries] == [90, 120, None]
    assert found.notes == [f"captions of '{name}': 2 files by their file_name, column text; 1 rows name no "
                           "file that is here, or more than one; not used: singer"]
    assert not found.skipped and not found.problems


def test_splits_in_folders(tmp_path):
    """A table above names files by their folder; a folder of its own is read with the metadata above it."""
    songs(tmp_path, "train/1.wav", "test/1.wav")
    table(tmp_path / "metadata.csv", ["file_name", "text"], ["train/1.wav", "a"], ["test/1.wav", "b"])
    assert captions(scan(tmp_path)) == {"test/1.wav": ("b", "csv"), "train/1.wav": ("a", "csv")}
    assert captions(scan(tmp_path / "train")) == {"1.wav": ("a", "csv")}
    table(tmp_path / "test" / "metadata.csv", ["file_name", "text"], ["1.wav", "nearer"])
    assert captions(scan(tmp_path))["test/1.wav"] == ("nearer", "csv")


LAYOUTS = {
    "MusicCaps by ytid": (["-0Gj8-vB1q4_30_40.wav", "[-1UWSisgo7Q]-[10-20].wav", "03-2EDZy5sc.wav"],
                          ["ytid", "start_s", "aspect_list", "caption"],
                          [["-0Gj8-vB1q4", 30, "['x']", "one"], ["-1UWSisgo7Q", 10, "['y']", "two"],
                           ["03-2EDZy5sc", 0, "[]", "three"]], ["one", "two", "three"]),
    "Song Describer": (["26/1004126.2min.mp3", "27/9.2min.mp3"],
                       ["caption_id", "track_id", "caption", "path"],
                       [[1, 1004126, "one", "26/1004126.mp3"], [2, 9, "two", "27/9.mp3"]], ["one", "two"]),
    "paths of another machine": (["A/1.wav", "B/1.wav"], ["path", "text"],
                                 [["/old/music/B/1.wav", "two"], ["/old/music/A/1.wav", "one"]],
                                 ["one", "two"]),
    "paths of Windows": (["A/1.wav", "B/1.wav"], ["path", "text"],
                         [["A\\1.wav", "one"], ["B\\1.wav", "two"]], ["one", "two"]),
    "another format": (["1.flac"], ["path", "text"], [["wavs/1.wav", "one"]], ["one"]),
    "a column without a known name": (["1.wav"], ["id", "what is heard"], [["1", "a slow waltz"]],
                                      ["a slow waltz"]),
    "a file that is not here": (["A/1.wav", "A/2.wav"], ["path", "text"],
                                [["A/2.wav", "two"], ["B/1.wav", "wrong"]], [None, "two"]),
    "names in two folders": (["A/1.wav", "B/1.wav"], ["path", "text"], [["1.wav", "of which?"]],
                             [None, None]),
    "capitals and accents as macOS writes them": (["Cafe\u0301.WAV"], ["path", "text"],
                                                  [["caf\u00e9.wav", "one"]], ["one"]),
    "no names of columns": (["1.wav", "2.wav"], ["1.wav", "a slow waltz"], [["2.wav", "a fast slow reel"]],
                            ["a slow waltz", "a fast slow reel"]),
    "a list": (["1.wav"], ["file", " tags "], [["1.wav", "['slow', 'folk']"]], ["slow, folk"]),
    "numbers with zeros": (["000/000002.mp3"], ["track_id", "text"], [[2, "two"]], ["two"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_of_the_field(tmp_path, name):
    files, columns, rows, wanted = LAYOUTS[name]
    for file in files:
        path = song((tmp_path / file).with_suffix(".wav"))
        path.rename(tmp_path / file)
    table(tmp_path / "captions.csv", columns, *rows)
    by_key = {key: caption for key, (caption, _) in captions(scan(tmp_path)).items()}
    assert by_key == dict(zip(files, wanted))


def test_tags_in_columns_and_behind_one(tmp_path):
    songs(tmp_path / "magna", "f/a.wav", "f/b.wav")
    table(tmp_path / "magna" / "annotations.csv", ["clip_id", "guitar", "slow", "mp3_path"],
          ["2", "1", "1", "f/a.wav"], ["6", "0", "1", "f/b.wav"], separator="\t")
    assert captions(scan(tmp_path / "magna")) == {"f/a.wav": ("guitar, slow", "csv"),
                                                  "f/b.wav": ("slow", "csv")}
    songs(tmp_path / "mtg", "48/948.wav")
    (tmp_path / "mtg" / "autotagging.tsv").write_text(
        "TRACK_ID\tPATH\tDURATION\tTAGS\n"
        "track_0000948\t48/948.mp3\t212.7\tgenre---rock\tmood/theme---happy\n")
    assert captions(scan(tmp_path / "mtg")) == {"48/948.wav": ("rock, happy", "tsv")}


def test_a_table_that_does_not_say_which_column(tmp_path, capsys):
    """It is named with its columns, and --caption_column decides. FMA's names of columns fill three lines."""
    songs(tmp_path / "m", "000/000002.wav")
    table(tmp_path / "tracks.csv", ["", "album", "track", "track"], ["", "title", "genre_top", "title"],
          ["track_id", "", "", ""], ["2", "AWOL", "Hip-Hop", "Food"])
    columns = "track_id, album.title, track.genre_top, track.title"
    with pytest.raises(ValueError, match=f"--captions .*tracks.csv: which column holds captions.*{columns}"):
        scan(tmp_path / "m", captions=str(tmp_path / "tracks.csv"))
    table_file = str(tmp_path / "tracks.csv")
    found = scan(tmp_path / "m", captions=table_file, caption_column="track.genre_top")
    assert captions(found) == {"000/000002.wav": ("Hip-Hop", "csv")}
    table(tmp_path / "m" / "t.csv", ["file", "first", "second"], ["000002.wav", "x", "y"])
    found = scan(tmp_path / "m")
    assert captions(found) == {"000/000002.wav": (None, "none")}
    assert "table 't.csv' not used: which column holds captions? It has file, first, second" in found.notes[0]
    assert captions(scan(tmp_path / "m", caption_column="second"))["000/000002.wav"] == ("y", "csv")
    for more, line in ((dict(caption_column="third"), "third: it has file, first, second"),
                       (dict(captions="no.csv"), "--captions no.csv: no such file")):
        with pytest.raises(ValueError, match=line):
            scan(tmp_path / "m", **more)
    assert data.main(["check", str(tmp_path / "m"), "--caption_column", "second"]) == 0
    assert "captions     csv (1)" in capsys.readouterr().out


def test_a_table_given_for_a_manifest_and_for_two_folders(tmp_path):
    """Files of a manifest lie anywhere. The validation files need not be in the table of --captions."""
    songs(tmp_path, "one/a.wav", "two/b.wav", "valid/v.wav")
    lines = [{"path": "../one/a.wav"}, {"path": str(tmp_path / "two" / "b.wav")}]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table(tmp_path / "t.csv", ["path", "text"], ["one/a.wav", "x"], ["b.wav", "y"])
    scanning = dict(captions=str(tmp_path / "t.csv"), caption_column="text")
    for dataset in ("lists", "lists/data.jsonl"):
        found = scan(tmp_path / dataset, **scanning)
        assert [e.meta["description"] for e in found.entries] == ["x", "y"]
    train, valid, _ = split_entries(found.entries, str(tmp_path / "valid"), **scanning)
    assert len(train) == 2 and len(valid) == 1
    with pytest.raises(ValueError, match="--captions .*t.csv: no column names a file; it has path, text"):
        scan(tmp_path / "valid", **scanning)


def test_tables_that_say_nothing_are_named(tmp_path):
    songs(tmp_path, "a.wav")
    (tmp_path / "binary.csv").write_bytes(b"\xff\0\n\0\n" * 9)
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "gone.json").write_text('{"description": "of a file that is not here"}')
    (tmp_path / "no.parquet").write_text("PAR1")
    table(tmp_path / "others.csv", ["file_name", "text"], ["x.wav", "a waltz"])
    found = scan(tmp_path)
    assert captions(found) == {"a.wav": (None, "none")}
    for name in ("binary.csv", "empty.csv", "broken.jsonl", "deep.json", "gone.json", "no.parquet",
                 "others.csv"):
        assert sum(name in line for line in found.notes) == 1, (name, found.notes)
    assert any("no column names a file; it has file_name, text" in line for line in found.notes)


def test_a_table_of_metadata_without_captions(tmp_path):
    songs(tmp_path, "a.wav")
    table(tmp_path / "t.csv", ["name", "genre", "bpm"], ["a", "Folk", "90"])
    found = scan(tmp_path)
    assert found.entries[0].meta == {"description": None, "genre": "folk", "bpm": 90}
    assert found.entries[0].caption == "none" and "no column of captions, other fields" in found.notes[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_of_texts_and_tables(tmp_path, encoding):
    songs(tmp_path, "a.wav", "b.wav")
    (tmp_path / "a.txt").write_bytes("Caf\u00e9".encode(encoding))
    (tmp_path / "t.csv").write_bytes("path,text\nb.wav,Caf\u00e9\n".encode(encoding))
    assert captions(scan(tmp_path)) == {"a.wav": ("Caf\u00e9", "txt"), "b.wav": ("Caf\u00e9", "csv")}


def test_parquet_with_audio_inside_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"audio": {"bytes": b"RIFF", "path": "a.wav"}, "text": "a waltz"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="0.parquet' not used: it holds the audio itself.*data.py import"):
        scan(tmp_path)


def test_several_captions_of_a_file_and_two_rows_that_want_one(tmp_path):
    songs(tmp_path, "a.wav", "b.wav")
    table(tmp_path / "t.csv", ["path", "text"], ["a.wav", "first"], ["a.wav", "second"], ["A/b.wav", "x"],
          ["B/b.wav", "y"])
    found = scan(tmp_path)
    assert captions(found) == {"a.wav": ("first", "csv"), "b.wav": (None, "none")}
    assert "1 files have several captions, of which the first is taken" in found.notes[0]
    assert "1 files could be meant by two names and are left alone" in found.notes[0]


@pytest.mark.parametrize("name", ["t.csv", "a.json"])
def test_captions_by_time(tmp_path, name):
    """A segment has the captions of its part; what stands beside the file for the whole of it wins."""
    song(tmp_path / "a.wav", 9.0)
    rows = [["a", 0, 3, "first"], ["a", 3, 6, "second."], ["a", 6, 8, "third"]]
    if name == "t.csv":
        table(tmp_path / name, ["id", "start_s", "end_s", "caption"], *rows)
    else:
        spans = [dict(zip(("start", "end", "text"), row[1:])) for row in rows]
        (tmp_path / name).write_text(json.dumps({"segments": spans}))
    found = scan(tmp_path)
    assert not found.problems and "several captions" not in str(found.notes)
    assert found.entries[0].meta["description"] == "first. second. third"
    codec = SimpleNamespace(sample_rate=1000, channels=1, hop=10)
    for seconds, wanted in ((2.0, {"first", "second", "third"}), (8.9, {"first. second. third"}),
                            (4.0, {"first", "first. second", "second", "second. third", "third"})):
        examples = data.AudioDataset(found.entries, codec, seconds, 0, min_segment_ratio=1.0)
        heard = [examples.example(0, i) for i in range(40)]
        assert {x.meta["description"] for x in heard} == wanted
        for x in heard:
            middle = x.start_seconds + seconds / 2
            assert ("first", "second", "third")[min(2, int(middle / 3))] in x.meta["description"]
    (tmp_path / "a.txt").write_text("of the whole")
    if name == "t.csv":
        assert scan(tmp_path).entries[0].meta == {"description": "of the whole"}


def test_times_of_a_recording_that_the_file_is_cut_from(tmp_path):
    """MusicCaps: one row a file, whose times are those of the whole video."""
    songs(tmp_path, "a.wav")
    table(tmp_path / "t.csv", ["ytid", "start_s", "end_s", "caption"], ["a", 30, 40, "a waltz"])
    assert scan(tmp_path).entries[0].meta == {"description": "a waltz"}


# -------------------------------------------------------------------------------------------------- manifests
def test_manifest_with_captions_weight_and_info_path(tmp_path):
    songs(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav")
    (tmp_path / "info").mkdir()
    (tmp_path / "info" / "a.json").write_text('{"description": "of info_path", "bpm": 99}')
    with zipfile.ZipFile(tmp_path / "info.zip", "w") as file:
        file.writestr("in/b.json", '{"description": "of the zip"}')
    (tmp_path / "b.txt").write_text("of b.txt")
    lines = [{"path": "a.wav", "info_path": "info/a.json", "weight": 2.5, "description": "of the line"},
             {"path": "b.wav", "info_path": "info.zip:in/b.json", "weight": None},
             {"file_name": "c.wav", "text": "of the line", "weight": -1},
             {"path": "d.wav", "info_path": "info.zip:no.json", "weight": 0}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = scan(tmp_path)
    assert captions(found) == {"a.wav": ("of info_path", "json"), "b.wav": ("of the zip", "json"),
                               "c.wav": ("of the line", "manifest"), "d.wav": (None, "none")}
    assert [e.weight for e in found.entries] == [2.5, None, None, 0] and found.entries[0].meta["bpm"] == 99
    reasons = {Path(path).name: reason for path, reason in found.problems.items()}
    assert reasons.keys() == {"c.wav", "d.wav"}
    assert "weight left out: -1" in reasons["c.wav"] and "no.json" in reasons["d.wav"]


def test_messages_name_the_file_and_what_is_missing(tmp_path):
    songs(tmp_path, "a.wav")
    (tmp_path / "m.jsonl").write_text('{"text": "x", "n": 1}')
    (tmp_path / "gone.jsonl").write_text('{"path": "sub/gone.wav"}')
    for name in ("t.csv", "t.parquet", "t.tar", "t.json", "t.zip", "notes.md"):
        (tmp_path / name).write_text("x")
    for name, message in {"m.jsonl": r"1 manifest line without .path., with 'text', 'n'.*m.jsonl:1",
                          "gone.jsonl": f"1 missing .*{tmp_path}/sub/gone.wav",
                          "t.csv": "is a table: give the folder.*--captions",
                          "t.json": "is a table: give the folder.*--captions",
                          "t.parquet": "is packed: .*data.py import .*t.parquet --out FOLDER",
                          "t.tar": "is packed: .*data.py import", "t.zip": "is an archive: unpack it",
                          "notes.md": "is a file of another kind", "no.csv": "is not there",
                          "a.wav": "is one audio file: give the folder"}.items():
        with pytest.raises(ValueError, match=message) as error:
            scan(tmp_path / name)
        assert name.split(".")[0] in str(error.value)


# ----------------------------------------------------------------------------------- what is listed and split
def test_hidden_files_and_trash_are_left_out_and_counted(tmp_path):
    root = songs(tmp_path / ".music", "a.wav", "._a.wav", ".Trash-1000/files/x.wav", "#recycle/y.wav",
                 "@eaDir/z.wav", "sub/.hidden/w.wav", "sub/b.wav")
    found = scan(root)
    assert [e.key for e in found.entries] == ["a.wav", "sub/b.wav"]
    assert len(found.skipped) == 5 and set(found.skipped.values()) == {"hidden or in a trash folder"}
    (tmp_path / "m.jsonl").write_text('{"path": ".music/._a.wav"}')             # asked for by name
    assert len(scan(tmp_path / "m.jsonl").entries) == 1


def test_a_link_never_takes_the_place_of_its_file(tmp_path):
    songs(tmp_path, "m/song.wav", "m/other.wav", "elsewhere/far.wav")
    (tmp_path / "m" / "song.txt").write_text("of the song")
    (tmp_path / "m" / "1_other.txt").write_text("of the link")
    (tmp_path / "elsewhere" / "far.txt").write_text("of what it points to")
    os.symlink("song.wav", tmp_path / "m" / "0_link.wav")
    os.symlink("other.wav", tmp_path / "m" / "1_other.wav")
    os.symlink(tmp_path / "elsewhere" / "far.wav", tmp_path / "m" / "far_link.wav")
    found = scan(tmp_path / "m")
    assert captions(found) == {"song.wav": ("of the song", "txt"), "other.wav": ("of the link", "txt"),
                               "far_link.wav": ("of what it points to", "txt")}
    assert sorted(found.skipped.values()) == ["same file twice: other.wav", "same file twice: song.wav"]


def test_a_file_is_asked_for_once(tmp_path, monkeypatch):
    """200,000 files on a network disk: a listing a folder, a question a file."""
    songs(tmp_path / "m", *(f"{i}.wav" for i in range(40)))
    lines = [{"path": f"m/{i}.wav", "duration": 0.1, "sample_rate": 1000} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = []
    for name in ("stat", "lstat", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name, **more:
                            asked.append(name) or real(*args, **more))
    assert len(scan(tmp_path / "data.jsonl").entries) == 40
    assert asked.count("stat") <= 60 and asked.count("lstat") <= 20 and asked.count("scandir") == 1, asked


@pytest.mark.parametrize("waits", [False, True])
def test_threads_take_over_where_the_disk_makes_them_wait(waits, tmp_path, monkeypatch):
    """On a fast disk they would wait for each other. Either way every file is there, in order."""
    (tmp_path / "m.jsonl").write_text("".join(f'{{"path": "{i:03}.wav"}}\n' for i in range(600)))
    seen = set()

    def slow(path, key, *more):
        seen.add(threading.get_ident())
        time.sleep(0.002 if waits else 0)
        return Entry(path, key, 1.0), [], []

    monkeypatch.setattr("support.scan.make_entry", slow)
    assert [entry.key for entry in scan(tmp_path / "m.jsonl").entries] == [f"{i:03}.wav" for i in range(600)]
    assert (len(seen) > 1) == waits


def test_few_files_are_split_near_the_fraction():
    def held_out(n, fraction, names="{}.wav", **more):
        return len(split_by_hash([Entry("", names.format(i), 1.0) for i in range(n)], fraction, **more)[1])

    for names in ("{}.wav", "song{}.mp3", "x/{}.flac"):
        assert held_out(3, 0.34, names) == 1 and held_out(10, 0.2, names) == 2
        for n in range(2, 60):
            for fraction in (0.05, 0.1, 0.34, 0.5):
                wanted = min(max(1, round(n * fraction)), n - 1)
                assert abs(held_out(n, fraction, names) - wanted) <= wanted // 3
        large = [held_out(5000, 0.1, names, hash_alone=alone) for alone in (False, True)]
        assert large[0] == large[1] != 500
    assert any(held_out(3, 0.34, names + "{}", hash_alone=True) == 2 for names in "abcdefgh")
