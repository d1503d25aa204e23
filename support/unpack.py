"""Packed data -> a plain folder of audio files with captions beside them, which every other command reads.

    train-00000-of-00002.parquet   a row: audio {bytes, path}, caption, ..  ──┐
    train-000000.tar               members: a.mp3, a.json, b.mp3, b.txt ..  ──┤
                                                                              ▼
    OUT/train/00000-of-00002/a.mp3, a.json ..      one folder a shard, there in full or not at all
    OUT/train/.00000-of-00002.part/a.mp3 ..        while it is being written

Parquet as the Hugging Face hub has it is read by pyarrow, as is what `save_to_disk` of its datasets writes
(.arrow), WebDataset's tar shards by Python's tarfile. Shards come from strangers: no name in them leads out
of their folder, and no size in them is believed. What is not taken is counted, with its reason.
"""

import contextlib
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from support.common import output_folder, read_json, sync_folder, write_atomically, write_json
from support.decode import AUDIO_SUFFIXES
from support.headers import suffix_by_content
from support.scan import RECORD, SHARD_SUFFIXES, skip_lines
from support.tables import require_pyarrow

TEXT_MEMBERS = {".json": ".json", ".txt": ".txt", ".text": ".txt", ".caption": ".txt"}  # the caption's suffix
TABLE_MEMBERS = (".csv", ".tsv", ".jsonl")
ARROW_SUFFIXES = (".parquet", ".arrow")
MAX_AUDIO_BYTES = 4 * 2 ** 30  # 6 hours of wav; a header that claims more lies
MAX_TEXT_BYTES = 64 * 2 ** 20  # of a caption or a table
MAX_NAME_BYTES = 200  # file systems take 255, with what is appended while a file is written
BLOCK_BYTES = 2 ** 20  # read at once; without, pyarrow reads a whole group of rows
ROWS_AT_ONCE = 8
NUMBERED = re.compile(r"(.+?)[-_.](\d+(?:-of-\d+)?(?:-[0-9a-f]{16})?)")  # train-00000-of-00002[-hash]


@dataclass
class Piece:
    """One file to write, at a path within the shard's folder."""
    place: str
    size: int  # bytes
    read: Callable[[], Iterator[bytes]]  # its content in blocks


def piece_of(place: str, content: bytes) -> Piece:
    """A file whose content is at hand."""
    return Piece(place, len(content), lambda: iter([content]))


def safe_place(name: str) -> str:
    """The path of a member within its folder. Errors: ValueError for one that leads out of it or is hidden,
    or that no disk would take."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("leads out of its folder")
    if not parts or any(part.startswith(".") for part in parts):
        raise ValueError("hidden file")
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
        raise ValueError("name too long")
    if re.search(r"[\0-\x1f]", name):
        raise ValueError("control characters in its name")
    return "/".join(parts)


# ------------------------------------------------------------------------------------------------------------
# parquet


def class_names(schema) -> dict[str, list]:
    """{column: names of its classes}: the hub keeps classes as numbers, and their names in the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {column: kind["names"] for column, kind in features.items() if "names" in kind}
    except (TypeError, KeyError, ValueError):  # no such note
        return {}


def may_hold_audio(kind) -> bool:
    """Whether a column of this Arrow type may hold files: {bytes, path}, or bytes."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and may_hold_audio(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def may_hold_text(kind, within_list: bool = False) -> bool:
    """Whether a column of this Arrow type holds metadata: texts, numbers, lists of texts, structs of these.

    A list of numbers is none: an embedding, or samples."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return may_hold_text(kind.value_type, within_list or not types.is_dictionary(kind))
    if types.is_struct(kind):
        return all(may_hold_text(field.type) for field in kind)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_temporal(kind):
        return True
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return number and not within_list


def audio_cell(value) -> tuple[bytes, str, str | None]:
    """A cell -> (content of the file, its path, its suffix: None where this is no audio)."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    content, path = content or b"", str(path or "")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in AUDIO_SUFFIXES:
        suffix = suffix_by_content(content)
    return content, path, suffix if content else None


class ArrowStream:
    """A file that `save_to_disk` of Hugging Face's datasets wrote, read as pyarrow reads parquet."""
    def __init__(self, pyarrow, path: Path):
        self.pyarrow, self.path = pyarrow, str(path)
        with pyarrow.memory_map(self.path) as file, pyarrow.ipc.open_stream(file) as stream:
            self.schema_arrow = stream.schema

    def iter_batches(self, rows: int, columns: list) -> Iterator:
        """These columns, so many rows at a time."""
        with self.pyarrow.memory_map(self.path) as file, self.pyarrow.ipc.open_stream(file) as stream:
            for batch in stream:
                for start in range(0, len(batch), rows):
                    yield batch.select(columns).slice(start, rows)


def audio_columns(file) -> list[str]:
    """Columns of a parquet file whose first filled cell holds audio; those that are called so come first."""
    found = []
    for name in sorted(file.schema_arrow.names, key=lambda name: "audio" not in name.lower()):
        if may_hold_audio(file.schema_arrow.field(name).type):
            for batch in file.iter_batches(1, columns=[name]):
                content, _, suffix = audio_cell(batch.column(0)[0].as_py())
                if content:
                    found += [name] if suffix else []
                    break
    return found


def read_parquet(shard: Path, skipped: dict, caption_column: str | None = None) -> Iterator[Piece]:
    """The audio of each row, and as JSON its columns of texts and numbers, under their own names; that of
    captions, if it is named, as the description.

    Errors: ValueError where pyarrow is missing, cannot read the file, or finds no audio or captions in it."""
    pyarrow = require_pyarrow()
    try:
        if shard.suffix.lower() == ".arrow":
            file = ArrowStream(pyarrow, shard)
        else:
            file = pyarrow.parquet.ParquetFile(shard, buffer_size=BLOCK_BYTES, pre_buffer=False)
        schema = file.schema_arrow
        audio, *others = audio_columns(file) or [None]
        if audio is None:
            raise ValueError(f"no column holds audio files, as bytes or {{bytes, path}}: it has "
                             f"{', '.join(f'{field.name} ({field.type})' for field in schema)[:300]}")
        texts = [field.name for field in schema if may_hold_text(field.type)]
        plain = [name for name in texts if not pyarrow.types.is_struct(schema.field(name).type)]
        if caption_column is not None and caption_column not in plain:
            raise ValueError(f"--caption_column {caption_column}: it has {', '.join(plain)[:300] or 'none'}")
        for name in schema.names:
            if name != audio and name not in texts:
                reason = "column of more audio" if name in others else "column of no texts or numbers"
                skipped[f"{shard.name}: {name}"] = reason
        classes, names = class_names(schema), set()
        batches = file.iter_batches(ROWS_AT_ONCE, columns=[audio, *texts])
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            content, path, suffix = audio_cell(row.pop(audio))
            if suffix is None:
                reason = "row of a path without audio" if path else "row without audio"
                skipped[f"{shard.name}: row {number} {path}"] = "not audio" if content else reason
                continue
            # Its own name, unless another row has it
            try:
                stem = os.path.splitext(safe_place(path.replace("\\", "/").split("/")[-1]))[0]
            except ValueError:
                stem = f"{number:06d}"
            while stem in names:
                stem = f"{stem}_{number}"
            names.add(stem)
            caption = None if caption_column is None else row[caption_column]
            # A tar shard that became parquet has what was in its .json and .txt as columns
            fields = row | row.pop("json") if isinstance(row.get("json"), dict) else row
            if "txt" in fields and fields.get("text") is None:
                fields["text"] = fields.pop("txt")
            for name, labels in classes.items():
                if isinstance(label := fields.get(name), int) and 0 <= label < len(labels):
                    fields[name] = labels[label]
            if caption_column is not None:  # instead of what the row calls so, in whatever case
                labels = classes.get(caption_column, [])
                if isinstance(caption, int) and 0 <= caption < len(labels):
                    caption = labels[caption]
                fields = {name: value for name, value in fields.items()
                          if name.lower() != "description" and name != caption_column}
                fields["description"] = caption
            fields = {name: value for name, value in fields.items() if value is not None}
            if fields:
                yield piece_of(f"{stem}.json", json.dumps(fields, default=str).encode())
            yield piece_of(stem + suffix, content)
    except (pyarrow.ArrowException, OSError, OverflowError) as error:  # the last for a date of no calendar
        raise ValueError(f"cannot be read as {shard.suffix[1:].lower()} ({error})") from None


# ------------------------------------------------------------------------------------------------------------
# tar


@contextlib.contextmanager
def bad_tar_named() -> Iterator[None]:
    """What tarfile and its decompressors raise, as a ValueError."""
    try:
        yield
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise ValueError(f"cannot be read as tar ({error})") from None


def tar_blocks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    """The content of a member. Errors: ValueError."""
    with bad_tar_named():
        file = tar.extractfile(member)
        while block := file.read(BLOCK_BYTES):
            yield block


def check_gap(tar: tarfile.TarFile, end: int, start: int) -> None:
    """Between members, and behind the last, are blocks of zeros: tarfile takes all else for the end.

    Errors: ValueError."""
    tar.fileobj.seek(end)
    if start == end or any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise ValueError(f"cut off or damaged at byte {end}")


def sample_key(place: str) -> str:
    """What members of one sample share, as WebDataset has it: their name up to its first dot."""
    folder, name = os.path.split(place)
    return os.path.join(folder, name.split(".")[0])


def list_tar(tar: tarfile.TarFile, skipped: dict, shard: str) -> dict[str, tarfile.TarInfo]:
    """{place: member} of audio, texts and tables, in their order. Errors: ValueError."""
    members, folders, end = {}, set(), None
    for member in tar:
        if end not in (None, member.offset):
            check_gap(tar, end, member.offset)
        end = tar.offset
        if member.isdir():
            continue
        suffix = os.path.splitext(member.name)[1].lower()
        limit = MAX_AUDIO_BYTES if suffix in AUDIO_SUFFIXES else MAX_TEXT_BYTES
        try:
            place = safe_place(member.name)
            if not member.isfile():
                raise ValueError("link or device")
            if suffix not in (*AUDIO_SUFFIXES, *TEXT_MEMBERS, *TABLE_MEMBERS):
                raise ValueError(f"neither audio nor text by its name, {suffix or 'no suffix'}")
            if member.size > limit:
                raise ValueError(f"absurd size ({member.size} bytes)")
            if place in members:
                raise ValueError("same name twice")
            parents = [str(parent) for parent in Path(place).parents]
            if place in folders or any(parent in members for parent in parents):
                raise ValueError("a file and a folder of one name")
            folders.update(parents)
            members[place] = member
        except ValueError as error:
            skipped[f"{shard}: {member.name}"] = str(error)
    check_gap(tar, end or 0, tar.offset)
    return members


def read_tar(shard: Path, skipped: dict) -> Iterator[Piece]:
    """The audio of a tar shard, the texts that belong to it, and tables. Errors: ValueError.

    A text belongs to the audio of its own name (a.mp3, a.txt), else to that of its sample (a.mix.mp3,
    a.caption.txt)."""
    with bad_tar_named(), tarfile.open(shard, ignore_zeros=True) as tar:  # zeros: where tars were joined
        members = list_tar(tar, skipped, shard.name)
        samples, stems, written = {}, set(), set()
        for place in members:
            stem, suffix = os.path.splitext(place)
            if suffix.lower() in AUDIO_SUFFIXES:
                stems.add(stem)
                samples.setdefault(sample_key(place), []).append(stem)
        if not stems:
            raise ValueError(f"holds no audio: {'; '.join(skip_lines(skipped)) or 'nothing'}")
        for place, member in members.items():
            stem, suffix = os.path.splitext(place)
            places = [place]
            if sidecar := TEXT_MEMBERS.get(suffix.lower()):
                owners = [stem] if stem in stems else samples.get(sample_key(place), [])
                places = [owner + sidecar for owner in owners if owner + sidecar not in written]
            if not places:
                skipped[f"{shard.name}: {member.name}"] = "text of no audio, or its second one"
            written.update(places)
            for each in places:
                yield Piece(each, member.size, lambda member=member: tar_blocks(tar, member))


# ------------------------------------------------------------------------------------------------------------
# the folder


def find_shards(sources: list[str], out: str) -> dict[Path, Path]:
    """{folder to make: shard} of files, and of folders that hold shards. Errors: ValueError."""
    found = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            shards = [p for p in sorted(path.rglob("*"))
                      if p.name.lower().endswith(SHARD_SUFFIXES) and not p.is_dir()  # Spark's x.parquet/
                      and not any(part.startswith(".") for part in p.relative_to(path).parts)]
            cached = [p for p in shards if re.fullmatch(r"cache-.*\.arrow", p.name)]
            shards = [p for p in shards if p not in cached]
            if cached:
                print(f"left out {len(cached)} intermediate results of datasets, such as {cached[0].name}")
        elif not path.exists():
            raise ValueError(f"{source!r} is not there: give files or folders on a disk; `hf download NAME "
                             "--repo-type dataset --local-dir FOLDER` brings those of the hub")
        else:
            shards = [path] if path.name.lower().endswith(SHARD_SUFFIXES) else []
        if not shards:
            raise ValueError(f"{source!r} is not, or does not hold, what can be imported: "
                             f"{', '.join(SHARD_SUFFIXES)}")
        for shard in shards:
            suffix = next(suffix for suffix in SHARD_SUFFIXES if shard.name.lower().endswith(suffix))
            try:
                name = safe_place(shard.name[:-len(suffix)])
            except ValueError as error:
                raise ValueError(f"{ascii(str(shard))}: {error}; rename it") from None
            if numbered := NUMBERED.fullmatch(name):
                name = os.path.join(*numbered.groups())
            folder = Path(out, shard.relative_to(path).parent if shard != path else "", name)
            if folder in found:
                raise ValueError(f"{found[folder]} and {shard} would both go to {folder}: give the folder "
                                 "that holds both, or another --out for one of them")
            found[folder] = shard
    for folder, shard in found.items():
        for parent in set(folder.parents) & found.keys():
            raise ValueError(f"{found[parent]} would go to {parent}, and {shard} into it, to {folder}: give "
                             "another --out for one of them")
    return found


def write_piece(folder: Path, piece: Piece) -> None:
    """Writes a file unless it is there, in full or not at all."""
    path = folder / piece.place
    if path.is_file() and path.stat().st_size == piece.size:  # from before an interruption
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.writelines(piece.read()))


def shard_record(shard: Path, caption_column: str | None) -> dict:
    """What tells whether a folder was made of this shard, as it is now, in this way."""
    stat = shard.stat()
    return {"shard": shard.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns,
            "caption_column": caption_column}


def part_folder(folder: Path) -> Path:
    """Where a shard's folder is written."""
    return folder.with_name(f".{folder.name}.part")


def is_imported(shard: Path, folder: Path, caption_column: str | None) -> bool:
    """Whether a shard's folder is whole. Errors: ValueError where something else stands in its place."""
    for place in (folder, part_folder(folder)):
        if not os.path.lexists(place):
            continue
        if place.is_dir() and {path.name for path in place.iterdir()} <= {RECORD + ".tmp"}:
            continue  # a kill left it before its record was written
        try:
            record = read_json(place / RECORD)
        except ValueError:
            raise ValueError(f"{place} is there and was not made by an import: give another --out") from None
        if place == folder and record != shard_record(shard, caption_column):
            raise ValueError(f"{folder} was imported from another state of {shard}, or with another "
                             "--caption_column: delete that folder to import it again")
    return (folder / RECORD).exists()


def import_shard(shard: Path, folder: Path, skipped: dict, caption_column: str | None) -> tuple[int, int]:
    """Writes what a shard holds into its folder -> (audio files, bytes). Errors: ValueError, OSError."""
    # Go on with what an interruption left, unless the shard is another one by now
    part, record = part_folder(folder), shard_record(shard, caption_column)
    if (part / RECORD).exists() and read_json(part / RECORD) != record:
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    write_json(part / RECORD, record)

    files, size = 0, 0
    if shard.suffix.lower() in ARROW_SUFFIXES:
        pieces = read_parquet(shard, skipped, caption_column)
    else:
        pieces = read_tar(shard, skipped)
    for piece in tqdm(pieces, shard.name, unit="file", leave=False, disable=not sys.stderr.isatty()):
        write_piece(part, piece)
        files += piece.place.lower().endswith(AUDIO_SUFFIXES)
        size += piece.size
    if files == 0:
        raise ValueError(f"none of its audio can be taken: {'; '.join(skip_lines(skipped))}")
    for path in part.rglob("*"):  # at the end: once after each file, it would take longer than writing them
        sync_folder(path)
    os.replace(part, folder)
    return files, size


def import_shards(sources: list[str], out: str, caption_column: str | None = None) -> None:
    """Unpacks shards, or all shards of folders, into the folder `out`, and says so. Run again, it goes on.

    caption_column: of parquet files. Errors: ValueError where a source or a folder in `out` is not what it
    should be, or a shard cannot be read (the others are imported first); OSError where the disk refuses."""
    shards = find_shards(sources, out)
    suffixes = {shard.suffix.lower() for shard in shards.values()}
    if caption_column is not None and suffixes - set(ARROW_SUFFIXES):
        raise ValueError(f"--caption_column {caption_column} is for parquet: the captions of a tar are its "
                         ".txt and .json members")
    output_folder(out)
    left = {folder: shard for folder, shard in shards.items()
            if not is_imported(shard, folder, caption_column)}
    if len(left) < len(shards):
        print(f"{len(shards) - len(left)} of {len(shards)} shards are imported already")
    skipped, failed = {}, []
    try:
        for folder, shard in left.items():
            of_shard = {}
            try:
                files, size = import_shard(shard, folder, of_shard, caption_column)
                print(f"{ascii(str(folder))}: {files} audio files, {size / 1e6:.1f} MB", flush=True)
            except ValueError as error:
                failed.append(f"{ascii(str(shard))}: {error}")
                shutil.rmtree(part_folder(folder))
            skipped |= of_shard
    except BaseException:
        print(f"{out} is unfinished: the same command goes on from here", flush=True)
        raise
    for line in skip_lines(skipped):
        print(f"left out {line}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(shards)} shards cannot be imported, the others are in "
                         f"{out}: {'; '.join(failed[:3])}")
    print(f"what can be used of it: python data.py check {out}")
