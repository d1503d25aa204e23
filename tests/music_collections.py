"""Music as people keep it: small collections in the layouts of this field, and files in many formats.

    python tests/music_collections.py [WORD]    the table: case | taken, or refused with which line

A case makes its files in an empty folder and says what is true of them: {name of a file: its caption}. What
is neither taken as that nor named in a line of `data.py check` is lost without a word: the table says LOST.
Encoders: libsndfile's; else the ffmpeg program, else PyAV. Without either, a case is not made, and counted.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import soundfile

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import data

SECONDS, RATE = 2.0, 44_100
CLOSE = 0.1    # seconds: encoders pad what they are given
BY_SNDFILE = {    # suffix -> (format, subtype); what libsndfile writes
    ".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", None), ".ogg": ("OGG", "VORBIS"), ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"), ".mp3": ("MP3", None), ".aiff": ("AIFF", None), ".aif": ("AIFF", None),
    ".aifc": ("AIFF", "FLOAT"), ".caf": ("CAF", "PCM_16"), ".w64": ("W64", None), ".au": ("AU", None)}
NAMING = ("skipped", "problem", "note", "left out")    # how lines begin that say what is not taken
BY_AV = {".m4a": "aac", ".mp4": "aac", ".aac": "aac", ".wma": "wmav2", ".webm": "libopus", ".mka": "flac",
         ".wv": "wavpack", ".mp2": "mp2"}


class NotMade(Exception):
    """There is no encoder for it here, or no package that writes it."""


class Case(NamedTuple):
    """A collection: what makes it in a folder, and what is true of it."""
    make: Callable[[Path], None]
    captions: dict    # {path of a file: its caption or None}
    dataset: str = "."
    says: str = ""    # words of the line that names what is not taken; "" where all is
    shards: tuple = ()    # imported first, into the dataset
    seconds: float = 0.5    # of each file


# ------------------------------------------------------------------------------------------------------------
# files


def sound(seconds: float = SECONDS, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """A tone [N, C], not too clean."""
    n = np.arange(round(seconds * rate))
    tone = 0.3 * np.sin(2 * np.pi * 440 * n / rate) + np.random.default_rng(0).normal(0, 0.01, len(n))
    return np.stack([tone] * channels, 1)


def encode(path: Path, *options: str, seconds: float = SECONDS, channels: int = 1) -> Path:
    """Writes a tone; the suffix is the format. options: of ffmpeg, which then makes it. Errors: NotMade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower()
    if kind in BY_SNDFILE and not options:
        form, subtype = BY_SNDFILE[kind]
        rate = 48_000 if kind == ".opus" else RATE
        soundfile.write(os.fsencode(path), sound(seconds, channels, rate), rate, subtype, format=form)
    elif shutil.which("ffmpeg"):
        wav = io.BytesIO()
        soundfile.write(wav, sound(seconds, channels), RATE, format="WAV")
        command = ["ffmpeg", "-loglevel", "error", "-y", "-i", "-", *options]
        piped = "pipe:1" in options
        done = subprocess.run([*command, *([] if piped else [os.fsencode(path)])], input=wav.getvalue(),
                              capture_output=True)
        if done.returncode:
            raise NotMade(f"ffmpeg: {done.stderr.decode(errors='replace').strip()[-100:]}")
        if piped:
            path.write_bytes(done.stdout)
    elif not options and kind in BY_AV and find_spec("av"):
        import av
        with av.open(str(path), "w") as container:
            stream = container.add_stream(BY_AV[kind], rate=48_000, layout="mono")
            stream.bit_rate = 128_000                          # wmav2 has no default
            frame = av.AudioFrame.from_ndarray(sound(seconds, 1, 48_000).T.astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 48_000, 0           # Matroska takes no packet without a time
            container.mux([packet for f in (frame, None) for packet in stream.encode(f)])
    else:
        raise NotMade(f"needs ffmpeg{' ' + ' '.join(options) if options else ' or the av package'}")
    return path


def file(name: str, *options: str, damage: Callable[[bytes], bytes] | None = None, **more) -> Callable:
    """A case's `make`: one file, whose bytes `damage` may change."""
    def make(folder: Path) -> None:
        path = encode(folder / name, *options, **more)
        if damage:
            path.write_bytes(damage(path.read_bytes()))
    return make


def songs(folder: Path, *names: str) -> None:
    """Files of sound."""
    for name in names:
        encode(folder / name, seconds=0.5)


def table(path: Path, *rows: tuple, delimiter: str = ",") -> None:
    """A table whose first row are the columns."""
    with open(path, "w", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows(rows)


def lines(path: Path, *rows: dict) -> None:
    """One JSON object a line; gzipped where the name says so."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def parquet(path: Path, columns: dict) -> None:
    """A parquet file of {column: values}. Errors: NotMade."""
    if not find_spec("pyarrow"):
        raise NotMade("needs the pyarrow package")
    import pyarrow
    from pyarrow import parquet as writer
    writer.write_table(pyarrow.table(columns), path)


def renamed(folder: Path, name: str, new: str) -> None:
    """A file under another name."""
    os.rename(folder / name, folder / new)


# ------------------------------------------------------------------------------------------------------------
# layouts


def sidecars(folder: Path) -> None:
    songs(folder, "a.mp3", "b.mp3")
    (folder / "a.txt").write_text("slow")
    (folder / "b.json").write_text('{"description": "fast"}')


def other_fields(folder: Path) -> None:
    songs(folder, "a.wav", "b.wav", "c.wav")
    for name, fields in (("a", {"caption": "slow"}), ("b", {"text": "fast"}), ("c", {"prompt": "loud"})):
        (folder / f"{name}.json").write_text(json.dumps(fields))


def other_names(folder: Path) -> None:
    songs(folder, "a.mp3", "B.MP3")
    (folder / "a.mp3.txt").write_text("slow")
    (folder / "B.TXT").write_text("fast")


def audiofolder(name: str) -> Callable:
    """Hugging Face's: metadata.csv, .jsonl or .parquet with file_name and text."""
    def make(folder: Path) -> None:
        songs(folder, "train/a.mp3", "train/b.mp3", "test/c.mp3")
        train, test = [("a.mp3", "slow"), ("b.mp3", "fast")], [("c.mp3", "loud")]
        for split, pairs in (("train", train), ("test", test)):
            path = folder / split / name
            if name.endswith(".csv"):
                table(path, ("file_name", "text"), *pairs)
            elif name.endswith(".jsonl"):
                lines(path, *({"file_name": n, "text": t} for n, t in pairs))
            else:
                parquet(path, {"file_name": [n for n, _ in pairs], "text": [t for _, t in pairs]})
    return make


def music_caps(folder: Path) -> None:
    songs(folder, "audio/-0Gj8-vB1q4.wav", "audio/[-0SdAVK79lg]-[30-40].wav")
    table(folder / "musiccaps-public.csv", ("ytid", "start_s", "end_s", "aspect_list", "caption"),
          ("-0Gj8-vB1q4", 30, 40, "['slow']", "a slow song"),
          ("-0SdAVK79lg", 30, 40, "['fast']", "a fast song"))


def song_describer(folder: Path) -> None:
    songs(folder, "audio/26/1004726.2min.mp3", "audio/07/7107.2min.mp3")
    table(folder / "song_describer.csv", ("caption_id", "track_id", "caption", "is_valid_subset", "path"),
          (1, 1004726, "a slow song", True, "26/1004726.mp3"), (2, 7107, "a fast song", False, "07/7107.mp3"))


def magnatagatune(folder: Path) -> None:
    songs(folder, "f/a-1.mp3", "0/b-2.mp3")
    table(folder / "annotations_final.csv", ("clip_id", "slow", "harp", "mp3_path"),
          (2, 1, 1, "f/a-1.mp3"), (6, 0, 1, "0/b-2.mp3"), delimiter="\t")


def jamendo(folder: Path) -> None:
    songs(folder, "48/948.mp3", "14/1114.mp3")
    (folder / "autotagging.tsv").write_text(
        "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n"
        "track_0000948\tartist_1\talbum_1\t48/948.mp3\t0.5\tgenre---rock\tmood/theme---happy\n"
        "track_0001114\tartist_2\talbum_2\t14/1114.mp3\t0.5\tgenre---folk\n")


def fma(folder: Path) -> None:
    songs(folder, "fma_small/000/000002.mp3", "fma_small/000/000005.mp3")
    table(folder / "tracks.csv", ("", "album", "track", "track"), ("", "title", "genre_top", "title"),
          ("track_id", "", "", ""), (2, "AWOL", "Hip-Hop", "Food"), (5, "AWOL", "Rock", "This World"))


def manifest(name: str) -> Callable:
    """audiocraft's, with captions beside the audio."""
    def make(folder: Path) -> None:
        sidecars(folder)
        lines(folder / name, *({"path": n, "duration": 0.5, "sample_rate": RATE} for n in ("a.mp3", "b.mp3")))
    return make


def info_path(folder: Path) -> None:
    songs(folder, "a.mp3", "b.mp3")
    with zipfile.ZipFile(folder / "info.zip", "w") as archive:
        archive.writestr("a.json", '{"description": "slow"}')
    (folder / "elsewhere.json").write_text('{"description": "fast"}')
    lines(folder / "data.jsonl", {"path": "a.mp3", "info_path": "info.zip:a.json", "weight": 2.0},
          {"path": "b.mp3", "info_path": "elsewhere.json", "weight": 1.0})


def other_manifest(column: str) -> Callable:
    """Lines whose files stand in a field of this name."""
    def make(folder: Path) -> None:
        songs(folder, "a.mp3")
        lines(folder / "my.jsonl", {column: "a.mp3", "text": "slow"})
    return make


def genres(folder: Path) -> None:
    songs(folder, "blues/blues.00000.wav", "rock/rock.00000.wav")
    (folder / "rock/rock.00000.txt").write_text("a rock song")


def albums(folder: Path) -> None:
    songs(folder, "Artist/Album/01 - Song.mp3")
    (folder / "Artist/Album/cover.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "Artist/Album/album.m3u").write_text("01 - Song.mp3\n")


def by_time(folder: Path) -> None:
    songs(folder, "a.mp3")
    table(folder / "captions.csv", ("file_name", "start", "end", "text"), ("a.mp3", 0, 0.2, "slow"),
          ("a.mp3", 0.2, 0.5, "fast"))


def youtube(folder: Path) -> None:
    songs(folder, "A Song [abcdefghijk].opus")
    (folder / "A Song [abcdefghijk].info.json").write_text('{"title": "A Song", "description": "slow"}')


def trash(folder: Path) -> None:
    sidecars(folder)
    songs(folder, ".Trash-1000/files/old.mp3", ".hidden.mp3", "@eaDir/a.mp3")


def hub_links(folder: Path) -> None:
    songs(folder, "blobs/0123.mp3")
    (folder / "snapshots/main").mkdir(parents=True)
    (folder / "snapshots/main/a.mp3").symlink_to("../../blobs/0123.mp3")
    (folder / "snapshots/main/a.txt").write_text("slow")


def embedded(folder: Path) -> None:
    content = encode(folder / "song.mp3", seconds=0.5).read_bytes()
    (folder / "song.mp3").unlink()
    for split, name, text in (("train", "a.mp3", "slow"), ("test", "b.mp3", "fast")):
        parquet(folder / f"{split}-00000-of-00001.parquet",
                {"audio": [{"bytes": content, "path": name}], "caption": [text]})


def web_dataset(folder: Path) -> None:
    content = encode(folder / "song.mp3", seconds=0.5).read_bytes()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for name, part in (("a.mp3", content), ("a.json", b'{"caption": "slow"}'), ("a.cls", b"3"),
                           ("b.mp3", content), ("b.txt", b"fast")):
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))


TWO = {"a.mp3": "slow", "b.mp3": "fast"}
SPLITS = {"train/a.mp3": "slow", "train/b.mp3": "fast", "test/c.mp3": "loud"}
LAYOUTS = {
    "txt and json beside the audio": Case(sidecars, TWO),
    "json with caption, text, prompt": Case(
        other_fields, {"a.wav": "slow", "b.wav": "fast", "c.wav": "loud"}),
    "a.mp3.txt, B.TXT": Case(other_names, {"a.mp3": "slow", "B.MP3": "fast"}),
    "audiofolder, csv": Case(audiofolder("metadata.csv"), SPLITS),
    "audiofolder, jsonl": Case(audiofolder("metadata.jsonl"), SPLITS),
    "audiofolder, parquet": Case(audiofolder("metadata.parquet"), SPLITS),
    "parquet with audio, of the hub": Case(
        embedded, {"train/00000-of-00001/a.mp3": "slow", "test/00000-of-00001/b.mp3": "fast"},
        "out", shards=(".",)),
    "parquet with audio as a dataset": Case(
        embedded, {}, "train-00000-of-00001.parquet", "data.py import"),
    "WebDataset": Case(web_dataset, {"000000/a.mp3": "slow", "000000/b.mp3": "fast"}, "out",
                       shards=("000000.tar",)),
    "WebDataset as a dataset": Case(web_dataset, {}, "000000.tar", "data.py import"),
    "audiocraft's manifest": Case(manifest("my.jsonl"), TWO, "my.jsonl"),
    "audiocraft's folder of data.jsonl.gz": Case(manifest("data.jsonl.gz"), TWO),
    "audiocraft's info_path, a zip, weights": Case(info_path, TWO),
    "manifest of audio_path and text": Case(other_manifest("audio_path"), {"a.mp3": "slow"}, "my.jsonl"),
    "manifest without path": Case(other_manifest("what"), {}, "my.jsonl", "path"),
    "MusicCaps": Case(music_caps, {"audio/-0Gj8-vB1q4.wav": "a slow song",
                                   "audio/[-0SdAVK79lg]-[30-40].wav": "a fast song"}),
    "Song Describer": Case(song_describer, {"audio/26/1004726.2min.mp3": "a slow song",
                                            "audio/07/7107.2min.mp3": "a fast song"}),
    "MagnaTagATune": Case(magnatagatune, {"f/a-1.mp3": "slow, harp", "0/b-2.mp3": "harp"}),
    "MTG-Jamendo": Case(jamendo, {"48/948.mp3": "rock, happy", "14/1114.mp3": "folk"}),
    "FMA": Case(fma, {"fma_small/000/000002.mp3": None, "fma_small/000/000005.mp3": None}, ".", "tracks.csv"),
    "a folder a genre (GTZAN)": Case(
        genres, {"blues/blues.00000.wav": None, "rock/rock.00000.wav": "a rock song"}),
    "artist/album/song, covers, playlists": Case(albums, {"Artist/Album/01 - Song.mp3": None}, ".", ".jpg"),
    "captions by time": Case(by_time, {"a.mp3": "slow"}, ".", "captions.csv"),
    "yt-dlp": Case(youtube, {"A Song [abcdefghijk].opus": "slow"}, ".", ".info.json"),
    "trash and hidden files": Case(trash, TWO, ".", "hidden"),
    "links of the hub's cache": Case(hub_links, {"a.mp3": "slow"}, "snapshots/main"),
    "a table as the dataset": Case(audiofolder("metadata.csv"), {}, "train/metadata.csv", "is a table"),
}


# ------------------------------------------------------------------------------------------------------------
# formats


def zero_length(raw: bytes) -> bytes:
    """A wav whose data has length 0 in its header, as programs leave it that are killed."""
    at = raw.index(b"data")
    return raw[:at + 4] + bytes(4) + raw[at + 8:]


def under_name(name: str, new: str) -> Callable:
    """A file under the name of another format."""
    def make(folder: Path) -> None:
        encode(folder / name)
        renamed(folder, name, new)
    return make


def odd_name(folder: Path) -> None:
    encode(folder / "a.wav")
    os.rename(folder / "a.wav", os.fsencode(folder) + b"/caf\xe9.wav")


def channels_cancel(folder: Path) -> None:
    tone = sound()
    soundfile.write(folder / "song.wav", np.concatenate([tone, -tone], 1), RATE)


def one_format(name: str, *options: str, says: str = "", true_seconds: float = SECONDS, **more) -> Case:
    """A case of one file, which is to be taken whole."""
    return Case(file(name, *options, **more), {name: None}, says=says, seconds=true_seconds)


FORMATS = {
    **{suffix: one_format(f"song{suffix}") for suffix in (*BY_SNDFILE, *BY_AV)},
    ".MP3": one_format("SONG.MP3"),
    "wav, 24 bits": one_format("song.wav", "-c:a", "pcm_s24le"),
    "wav, 8 bits": one_format("song.wav", "-c:a", "pcm_u8"),
    "wav, ADPCM": one_format("song.wav", "-c:a", "adpcm_ms"),
    "wav, RF64": one_format("song.wav", "-rf64", "always"),
    "wav, data of length 0": one_format("song.wav", damage=zero_length),
    "wav, piped": one_format("song.wav", "-f", "wav", "pipe:1"),
    "wav, 6 channels": one_format("song.wav", channels=6),
    "wav, right = -left": Case(channels_cancel, {"song.wav": None}, seconds=SECONDS),
    "wav, cut off": one_format("song.wav", damage=lambda raw: raw[:len(raw) // 2], true_seconds=1.0),
    "flac, piped": one_format("song.flac", "-f", "flac", "pipe:1"),
    "flac in Ogg": one_format("song.oga", "-c:a", "flac", "-f", "ogg"),
    "ogg, two joined": one_format("song.ogg", damage=lambda raw: raw * 2, seconds=1.0),
    "opus, two joined": one_format("song.opus", damage=lambda raw: raw * 2, seconds=1.0),
    "mp3, VBR without Xing": one_format("song.mp3", "-c:a", "libmp3lame", "-q:a", "2", "-write_xing", "0"),
    "mp3, two joined": one_format("song.mp3", damage=lambda raw: raw * 2, seconds=1.0),
    "mp3, cut off": one_format("song.mp3", damage=lambda raw: raw[:len(raw) // 2], true_seconds=1.0),
    "m4a, ALAC": one_format("song.m4a", "-c:a", "alac"),
    "m4a under the name .mp3": Case(under_name("song.m4a", "song.mp3"), {"song.mp3": None}, seconds=SECONDS),
    "mp3 under the name .wav": Case(under_name("song.mp3", "song.wav"), {"song.wav": None}, seconds=SECONDS),
    "a name that is no text": Case(odd_name, {os.fsdecode(b"caf\xe9.wav"): None}, seconds=SECONDS),
    "zero bytes": one_format("song.wav", damage=lambda raw: b"", says="zero bytes"),
    "midi": Case(lambda folder: (folder / "song.mid").write_bytes(b"MThd"), {"song.mid": None}, says=".mid"),
}


# ------------------------------------------------------------------------------------------------------------
# the table


def run_check(folder: Path, case: Case) -> tuple[int, str, list]:
    """(exit code, what is printed, entries) of `data.py check` of a collection, imported first if packed."""
    said, found = io.StringIO(), []

    def report(dataset, scan, *split):
        found.extend(scan.entries)
        print_report(dataset, scan, *split)

    print_report = data.print_report
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.chdir(folder), \
            mock.patch.object(data, "print_report", report):
        code = data.main(["import", *case.shards, "--out", case.dataset]) if case.shards else 0
        code = code or data.main(["check", case.dataset, "--decode"])
    return code, said.getvalue().replace(f"{folder}/", "").replace(str(folder), "."), found


def judge(case: Case, folder: Path) -> tuple[str, str]:
    """("taken" | "named" | "refused" | "LOST", the line that says so or what was lost). Errors: NotMade.

    named: something is not taken as it is, and a line says so."""
    case.make(folder)
    code, said, entries = run_check(folder, case)
    if code:
        return "refused", said.splitlines()[-1]
    entries = {entry.key: entry for entry in entries}
    wrong = {}
    for name, caption in case.captions.items():
        if name not in entries:
            wrong[name] = "not taken"
        elif abs(entries[name].seconds - case.seconds) > CLOSE:
            wrong[name] = f"{entries[name].seconds:.2f} s, {case.seconds:.2f} s are there"
        elif entries[name].meta.get("description") != caption:
            wrong[name] = f"caption {entries[name].meta.get('description')!r}"
    # Lines that name a file or what the case says
    named = [line for line in said.splitlines() if line.startswith(NAMING)]
    for name, what in wrong.items():
        if not any(os.path.basename(name) in line or case.says and case.says in line for line in named):
            return "LOST", f"{ascii(name)}: {what}"
    if case.says and not any(case.says in line for line in named):
        return "LOST", f"no line has {case.says!r}"
    if wrong or case.says:
        words = [case.says] if case.says else [os.path.basename(name) for name in wrong]
        return "named", next(line for line in named if any(word in line for word in words))
    return "taken", f"{len(case.captions)} files"


def main(word: str = "") -> int:
    """Prints the table -> exit code, 1 if something was lost without a word."""
    cases = {name: case for name, case in (LAYOUTS | FORMATS).items() if word in name}
    counts = Counter()
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdict, line = judge(case, Path(folder))
            except NotMade as reason:
                verdict, line = "not made", str(reason)
        counts[verdict] += 1
        print(f"{name:<40} | {verdict:<8} | {line[:200]}", flush=True)
    print(f"{len(cases)} cases: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    return int(counts["LOST"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
