"""Captions in tables: one column names files of a dataset, another holds text.

    metadata.csv | captions.tsv | .jsonl | .json | .parquet, beside or above the audio, or --captions FILE
        ─► rows {column: cell} ─► which column holds text, which names files ─► {file: metadata}

Such are Hugging Face's audiofolder (file_name, text), MusicCaps (ytid, caption), Song Describer and
MTG-Jamendo (path, ..), FMA (track_id), MagnaTagATune (a column of 0 and 1 for each tag). What a table does
not say for certain is not taken: a row that could be of two files, a column that may hold captions or not.
It is named, and --caption_column decides.
"""

import ast
import contextlib
import csv
import functools
import gzip
import itertools
import json
import os
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator

from support.captions import (END_FIELDS, FIELDS, READ_ERRORS, START_FIELDS, TEXT_FIELDS, clean_meta,
                              parse_object, text_encoding, timed_captions)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".parquet")
FILE_COLUMNS = ("file_name", "filename", "file", "file_path", "filepath", "path", "audio_path", "audio_file",
                "audio_filepath", "audio", "mp3_path", "wav", "mp3", "location", "ytid", "youtube_id",
                "track_id", "trackid", "clip_id", "song_id", "audio_id", "id", "name", "key", "track", "song")
SAMPLE_ROWS = 1000  # from which it is known what the columns hold
PROSE_WORDS = 3  # a column without a known name holds captions if its cells have so many words on average
MOST_LONE_JSON = 50  # files that are looked into: one table is likely, many are not
MOST_JSON = 2 ** 28  # bytes of a .json, which is read at once
YOUTUBE_ID = re.compile(r"\[?([\w-]{11})[]_\-. ]")  # at the start of a name: ID_30_40.wav, [ID]-[30-40].wav


def is_table(name: str) -> bool:
    """Whether a file's name is that of a table. (A .json that belongs to no audio file may be one, too.)"""
    return name.lower().endswith(TABLE_SUFFIXES)


# ------------------------------------------------------------------------------------------------------------
# reading


def table_rows(path: str) -> Iterator[dict]:
    """The rows of a table, {column: cell}. Errors: ValueError, OSError where it cannot be read."""
    name = path.lower()
    if name.endswith((".csv", ".tsv")):
        yield from csv_rows(path)
    elif name.endswith(".parquet"):
        yield from parquet_rows(path)
    elif name.endswith(".json"):
        yield from json_rows(path)
    else:
        try:
            with (gzip.open if name.endswith(".gz") else open)(path, "rb") as file:
                yield from (parse_object(line) for line in file if line.strip())
        except (EOFError, zlib.error) as error:
            raise ValueError(f"cut off or damaged: {error}") from None


def json_rows(path: str) -> Iterator[dict]:
    """The rows of a .json: a list of objects, alone or as the only list of an object ({"data": [..]}), an
    object of files, or one object a line."""
    if os.path.getsize(path) > MOST_JSON:
        raise ValueError("too large for a .json: write one object a line, as .jsonl")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read()
    try:
        content = json.loads(text)
    except ValueError:
        yield from (parse_object(line.encode()) for line in text.splitlines() if line.strip())
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1 and any(isinstance(row, dict) for row in lists[0]):
            content = lists[0]
        else:  # {file: caption}, {file: {column: cell}}
            content = [{"file_name": key, **(value if isinstance(value, dict) else {"text": value})}
                       for key, value in content.items()]
    yield from (row for row in content if isinstance(row, dict)) if isinstance(content, list) else ()


def csv_rows(path: str) -> Iterator[dict]:
    """The rows of a text table. What separates its cells is seen in its first line.

    Errors: ValueError, after the rows before, where a quote is never closed: its cell would hold the rest."""
    with open(path, "rb") as file:
        head = file.read(2 ** 16)
        encoding = text_encoding(head, whole=not file.read(1))
    with open(path, encoding=encoding, errors="replace", newline="") as file:
        first = file.readline()
        file.seek(0)
        separator = max("\t,;|", key=first.count)
        try:
            quotes = 0  # in the lines of a row

            def plain_lines() -> Iterator[str]:
                nonlocal quotes
                for line in file:
                    quotes += line.count('"')
                    yield line.replace("\0", "")

            lines = csv.reader(plain_lines(), delimiter=separator)
            columns = [name.strip() for name in next(lines, [])]
            if columns and not columns[0] and len(set(columns)) < len(columns):  # FMA: names in three lines
                columns = [".".join(filter(None, pair)) for pair in zip(columns, next(lines, []))]
                columns[0] = next(lines, [""])[0]
            quotes, ended = 0, lines.line_num
            # The first of several columns of one name keeps it; spaces tell the others apart
            columns = [name + " " * columns[:i].count(name) for i, name in enumerate(columns)]
            for cells in lines:
                if quotes % 2 and lines.line_num > ended + 1:
                    raise ValueError(f"a quote that begins in line {ended + 1} is never closed")
                quotes, ended = 0, lines.line_num
                # cells beyond the last column belong to it: tags, or a text whose commas are not quoted
                cells[len(columns) - 1:] = [", ".join(cells[len(columns) - 1:])]
                yield dict(zip(columns, cells))
        except csv.Error as error:
            raise ValueError(f"not readable as a table: {error}") from None


def require_pyarrow():
    """The package that reads parquet. Errors: ValueError where it is missing."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError("it needs `pip install pyarrow`") from None
    return pyarrow


def parquet_rows(path: str) -> Iterator[dict]:
    """The rows of a parquet file, without columns that hold structures, such as audio."""
    pyarrow = require_pyarrow()
    try:
        file = pyarrow.parquet.ParquetFile(path)
        kinds = {field.name: field.type for field in file.schema_arrow}
        packed = [name for name, kind in kinds.items()
                  if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
        if packed:
            raise ValueError("it holds the audio itself: unpack it with `python data.py import FILE --out "
                             "FOLDER`")
        plain = [name for name, kind in kinds.items()
                 if not pyarrow.types.is_struct(kind) and not pyarrow.types.is_binary(kind)]
        for batch in file.iter_batches(columns=plain):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OverflowError) as error:  # the latter for a date of no calendar
        raise ValueError(f"not readable as parquet: {str(error)[:100]}") from None


# ------------------------------------------------------------------------------------------------------------
# which column holds text


def text_column(sample: list, asked: str | None) -> str | tuple | None:
    """The column of captions; a tuple of columns of 0 and 1, which are tags; None where it is not known.

    Errors: ValueError where the table has not the column asked for."""
    columns = list(dict.fromkeys(itertools.chain(*sample)))
    if asked is not None:
        if asked in columns:
            return asked
        raise ValueError(f"--caption_column {asked}: it has {', '.join(columns)[:300] or 'no columns'}")

    def texts(column: str) -> list:
        cells = (row.get(column) for row in sample)
        return [cell for cell in cells if cell and isinstance(cell, (str, list))]

    named = {column.lower(): column for column in reversed(columns)}
    for name in TEXT_FIELDS:
        if name in named and texts(named[name]):
            return named[name]
    like = [c for c in columns if re.search("caption|description|prompt", c.lower()) and texts(c)]
    if len(like) == 1:
        return like[0]
    prose = []
    for column in columns:
        words = [cell.split() for cell in texts(column) if isinstance(cell, str)]    # a list is no sentence
        if words and sum(map(len, words)) / len(words) >= PROSE_WORDS and column.lower() not in FIELDS:
            prose.append(column)
    if len(prose) == 1 and not like:
        return prose[0]
    flags = [c for c in columns if {str(row.get(c)) for row in sample} <= {"0", "1"}]
    return tuple(flags) if len(flags) > 1 and not (prose or like) else None


def row_meta(row: dict, text, file_column: str) -> dict:
    """The metadata of a row: its caption, and its columns of the names that FIELDS has."""
    if isinstance(text, tuple):
        caption = ", ".join(name for name in text if str(row.get(name)) == "1")
    else:
        caption = row.get(text)
    if isinstance(caption, str) and caption.startswith("["):  # MusicCaps' aspect_list
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            caption = ast.literal_eval(caption)
    if isinstance(caption, str):
        caption = re.sub(r"\b[\w/]+---", "", caption)  # MTG-Jamendo: "genre---rock"
    found = {c.lower(): cell for c, cell in row.items() if c.lower() in FIELDS and c != file_column}
    return clean_meta(found | {"description": caption})[0]


# ------------------------------------------------------------------------------------------------------------
# which column names files


def fold_name(name: str) -> str:
    """A name in one spelling of its capitals and accents: macOS writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", name).casefold()


class FileNames:
    """The files of a dataset by what a table may call them."""
    def __init__(self, paths: list):
        self.by_path = {os.path.normpath(path): i for i, path in enumerate(paths)}
        self.paths, self.by_name, self.by_part = paths, defaultdict(list), defaultdict(list)
        for i, path in enumerate(paths):
            stem = os.path.splitext(os.path.basename(path))[0]
            self.by_name[stem].append(i)
            youtube = YOUTUBE_ID.match(stem)
            parts = {stem.split(".")[0], stem.lstrip("0"), youtube[1] if youtube else stem, fold_name(stem)}
            for part in parts - {stem, ""}:  # 948.low.mp3, 000002.mp3
                self.by_part[part].append(i)

    def find(self, cell, folder: str, everywhere: bool = False) -> tuple[list, bool]:
        """(numbers of the files that a cell of a table may name, whether it names their folder, too).

        folder: the table's, below which they lie; everywhere: or anywhere else."""
        name = str(cell).strip().replace("\\", "/")
        if not name or len(name) > 1000 or name.startswith("["):
            return [], False
        exact = self.by_path.get(os.path.normpath(os.path.join(folder, name)))
        if exact is not None:
            return [exact], True
        name = os.path.normpath(name)
        base = os.path.basename(name)
        stem, suffix = os.path.splitext(base)
        found = self.by_name.get(stem) if suffix[1:].isalnum() else None
        keys = (base, stem, fold_name(base), fold_name(stem))
        found = found or self.by_name.get(base) or next(filter(None, map(self.by_part.get, keys)), None)
        # A.WAV of the table is a.wav on the disk
        found = found or self.by_name.get(fold_name(stem if suffix[1:].isalnum() else base), [])
        below = [i for i in found if everywhere or self.paths[i].startswith(os.path.join(folder, ""))]
        wanted = os.path.dirname(name).strip("/")
        if not wanted:
            return below, False
        alike = []
        for i in below:
            there = os.path.relpath(os.path.dirname(self.paths[i]), folder)
            there = "" if there == "." else there
            if there == "" or f"/{there}".endswith(f"/{wanted}") or f"/{wanted}".endswith(f"/{there}"):
                alike.append(i)
        return (alike, True) if alike else (below, False)


def one_song(paths: list) -> bool:
    """Whether files differ in nothing but their suffix."""
    return len({os.path.splitext(path)[0] for path in paths}) == 1


def with_columns(rows: Iterator[dict], names: list) -> Iterator[dict]:
    """The rows of a table without names of columns, whose first row was taken for these `names`."""
    columns = [f"column {i}" for i in range(1, len(names) + 1)]
    yield dict(zip(columns, names))
    yield from (dict(zip(columns, row.values())) for row in rows)


def open_table(path: str, find: Callable) -> tuple[Callable, list, list]:
    """(function that reads its rows, names of its columns, first rows) of a table.

    find: see `FileNames.find`. Errors: ValueError, OSError where it cannot be read, or is empty."""
    read = functools.partial(table_rows, path)
    sample = list(itertools.islice(read(), SAMPLE_ROWS))
    columns = list(dict.fromkeys(itertools.chain(*sample)))
    if not sample:
        raise ValueError("it has no rows")
    if path.lower().endswith((".csv", ".tsv")) and any(find(column)[0] for column in columns):
        read = lambda: with_columns(table_rows(path), columns)  # its first row is none of names
        sample = list(itertools.islice(read(), SAMPLE_ROWS))
        return read, list(sample[0]), sample
    return read, columns, sample


def find_file_column(rows: Callable, columns: list, find: Callable) -> str | None:
    """The column that names most files; names that such columns have go first."""
    known = [c for c in columns if c.lower() in FILE_COLUMNS]
    known.sort(key=lambda c: FILE_COLUMNS.index(c.lower()))
    others = [c for c in columns if c not in known]
    for group in filter(None, (known, others)):
        counts = dict.fromkeys(group, 0)
        for row in rows():
            for column in group:
                counts[column] += bool(find(row.get(column) or "")[0])
        best = max(group, key=counts.get)  # the first of equals
        if counts[best]:
            return best
    return None


def claim_files(rows: Callable, file_column: str, text, columns: list, find: Callable,
                paths: list) -> tuple[dict, set, int]:
    """What each row says of which file.

    -> ({number of a file: {cell that names it: [(metadata, times) of each such row]}}, the files that are
    named with their folder, number of rows without a file)."""
    times = [c for c in columns if c.lower() in (*START_FIELDS, *END_FIELDS)]
    claims, certain, without = {}, set(), 0
    for row in rows():
        cell = str(row.get(file_column) or "")
        found, sure = find(cell)
        if not found or (len(found) > 1 and not one_song([paths[i] for i in found])):
            without += 1
            continue
        for i in found:
            if sure and i not in certain:
                claims.pop(i, None)
                certain.add(i)
            if sure or i not in certain:
                said = row_meta(row, text, file_column), {c: row.get(c) for c in times}
                claims.setdefault(i, {}).setdefault(cell, []).append(said)
    return claims, certain, without


def settle_claims(claims: dict, certain: set) -> tuple[dict, int, int]:
    """({number of a file: its metadata}, files with several captions, files that are left alone, because two
    different names could mean them)."""
    matched, twice, unclear = {}, 0, 0
    for i, by_cell in claims.items():
        if len(by_cell) > 1 or (certain and i not in certain and "/" in next(iter(by_cell)).strip("./")):
            unclear += 1
            continue
        of_file = next(iter(by_cell.values()))
        matched[i] = next((meta for meta, _ in of_file if "description" in meta), of_file[0][0])
        if len(of_file) > 1:
            spans = timed_captions([{**times, "text": meta.get("description")} for meta, times in of_file])
            matched[i] |= spans
            twice += not spans
    return matched, twice, unclear


def match_table(path: str, folder: str, names: FileNames, asked: str | None = None,
                everywhere: bool = False) -> tuple[dict, str]:
    """({number of a file: its metadata}, a line that says so) of a table whose files lie below `folder`.

    asked: --caption_column; everywhere: see `FileNames.find`. Errors: ValueError, OSError saying why it is
    not used."""
    # Which column holds text, and which names files
    find = functools.partial(names.find, folder=folder, everywhere=everywhere)
    rows, columns, sample = open_table(path, find)
    text = text_column(sample, asked)
    texts = text if isinstance(text, tuple) else (text,)
    fields = [column for column in columns if column.lower() in FIELDS]
    no_text = (f"which column holds captions? It has {', '.join(columns)[:300]}; choose with --captions FILE "
               "--caption_column NAME")
    if text is None and not fields:
        raise ValueError(no_text)
    file_column = find_file_column(rows, [c for c in columns if c not in texts], find)
    if file_column is None:
        raise ValueError(f"no column names a file; it has {', '.join(columns)[:300]}")
    if text is None and fields == [file_column]:
        raise ValueError(no_text)

    # What it says of each file
    claims, certain, without = claim_files(rows, file_column, text, columns, find, names.paths)
    matched, twice, unclear = settle_claims(claims, certain)

    # What is said of it
    empty = sum("description" not in meta for meta in matched.values()) if text is not None else 0
    shown = "columns of 0 and 1 as tags" if isinstance(text, tuple) else f"column {text}"
    shown = "no column of captions, other fields" if text is None else shown
    unused = [c for c in columns if c not in (file_column, *texts) and c.lower() not in FIELDS]
    line = f"{len(matched)} files by their {file_column}, {shown}"
    for count, what in ((without, "rows name no file that is here, or more than one"),
                        (empty, "files have no text there"),
                        (twice, "files have several captions, of which the first is taken"),
                        (unclear, "files could be meant by two names and are left alone")):
        line += f"; {count} {what}" if count else ""
    return matched, line + (f"; not used: {', '.join(unused)[:200]}" if unused else "")


# ------------------------------------------------------------------------------------------------------------
# the tables of a dataset


def add_tables(rows: list, tables: list, lone: list, root: str, captions: str | None, asked: str | None,
               must_match: bool = True) -> list:
    """Puts what tables say into the rows [(path, key, {.., "meta": .., "from": ..})] -> lines about them.

    lone: gets each .json that turns out to be no table. captions: the table of --captions, which wins; then
    those nearest to a file. asked: --caption_column. must_match: whether these must be of use.
    Errors: ValueError where the table or the column asked for cannot be used."""
    above = os.path.dirname(root)
    tables = [(path, os.path.dirname(path)) for path in sorted(tables, key=lambda p: (-p.count("/"), p))]
    for suffix in TABLE_SUFFIXES:  # metadata.csv above the folder of a split
        if os.path.isdir(root) and os.path.isfile(path := os.path.join(above, f"metadata{suffix}")):
            tables.append((path, above))
    if captions is not None:
        if not os.path.isfile(captions):
            raise ValueError(f"--captions {captions}: no such file")
        if not captions.lower().endswith((*TABLE_SUFFIXES, ".json")):
            raise ValueError(f"--captions {captions}: no table by its name, which ends in "
                             f"{', '.join(TABLE_SUFFIXES)} or .json")
        given = os.path.abspath(captions)
        tables = [(given, root)] + [table for table in tables if table[0] != given]
    if asked is not None and not tables and must_match:
        raise ValueError(f"--caption_column {asked}: there is no table; give it as --captions FILE")
    few = [table for table in tables if not table[0].lower().endswith(".json")]
    if len(tables) - len(few) > MOST_LONE_JSON:  # they are of audio that is not here
        lone += [path for path, _ in tables if path.lower().endswith(".json")]
        tables = few
    if not tables:
        return []
    names, lines, used, reasons = FileNames([row[0] for row in rows]), [], set(), {}
    for path, folder in tables:
        given = captions is not None and path == os.path.abspath(captions)
        try:
            matched, line = match_table(path, folder, names, asked if given or captions is None else None,
                                        everywhere=given)
        except (*READ_ERRORS, RecursionError) as error:
            if given and must_match:
                raise ValueError(f"--captions {captions}: {error}") from None
            if path.lower().endswith(".json"):
                lone.append(path)
                continue
            reasons.setdefault(str(error), []).append(path)
            continue
        kind = os.path.splitext(path.lower().removesuffix(".gz"))[1][1:]
        for i, meta in matched.items():
            if i not in used:
                path_, key, said = rows[i]
                rows[i] = path_, key, {**said, "meta": meta, "from": kind}
        used |= matched.keys()
        lines.append(f"captions of {ascii(os.path.relpath(path, root))}: {line}")
    if asked is not None and not lines and must_match:
        flag = f"--caption_column {asked}: "
        raise ValueError(flag + "; ".join(reason.removeprefix(flag) for reason in reasons))
    for reason, paths in reasons.items():
        shown = ", ".join(ascii(os.path.relpath(path, root)) for path in paths[:3])
        lines.append(f"table {shown}{', ..' if len(paths) > 3 else ''} not used: {reason}")
    return lines
