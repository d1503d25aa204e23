"""Captions and metadata of a file: from the text and JSON files beside it, or its line of a manifest.

A caption is the text of song.txt or song.mp3.txt, or in song.json the first of the fields TEXT_FIELDS that
holds something, beside song.mp3. The other fields of song.json are those of audiocraft. A bad field is left
out, with its reason, and the rest is used.
"""

import codecs
import functools
import json
import os
import re
import zipfile
import zlib

from support.common import MAX_TEXT

READ_ERRORS = (ValueError, OSError)  # of a file that is skipped; others, such as a full GPU, end the program
LOWER_TEXTS = ("key", "genre", "name", "instrument")  # fields that are written in lower case
LISTS = ("moods", "keywords")
FIELDS = ("title", "artist", "description", *LOWER_TEXTS, *LISTS, "bpm", "date")
TEXT_FIELDS = tuple("description caption captions text prompt tags style".split())
START_FIELDS = ("start", "start_s", "start_time", "start_seconds", "onset")
END_FIELDS = ("end", "end_s", "end_time", "end_seconds", "offset", "stop")
FILE_FIELDS = {"duration", "sample_rate", "weight", "amplitude", "info_path",  # of a line, but not of music
               "meta", "from"}
NO_TEXT = FILE_FIELDS - {"info_path", "meta"}
NO_META = {"description": None}  # shared by all files that have nothing: not to be changed
DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and infinities
CONTROL_CHARACTERS = re.compile(r"[\0-\x08\x0e-\x1b\x7f-\x9f]")


def text_encoding(raw: bytes, whole: bool = True) -> str:
    """The encoding of a text, or of one that begins with `raw`: UTF-8, UTF-16 with its mark, or Windows'."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig" if raw.startswith(codecs.BOM_UTF8) else "utf-8"


def decode_text(raw: bytes) -> str:
    """A caption's text."""
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return raw.decode(text_encoding(raw), "replace")


def parse_object(raw: bytes) -> dict:
    """A JSON object, NaN and infinities as None. Errors: ValueError for anything else, however hostile."""
    try:
        row = DECODER.decode(raw.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def clean_field(name: str, value) -> str | float | list | None:
    """One metadata field as audiocraft reads it: a line of text, a number (bpm), strings (LISTS), or None.

    Errors: ValueError, TypeError, OverflowError for a value of another kind."""
    if value in (None, "", "None") or value != value:  # the last for NaN, which stands for an empty cell
        return None
    if name == "bpm" and not isinstance(value, bool):
        if not 0 < float(value) < 10_000:
            raise ValueError("out of range")
        return float(value)
    if name in LISTS and isinstance(value, str):
        value = value.replace(",", " ").split()
    items = [item for item in value if item is not None] if isinstance(value, list) else [value]
    texts = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ValueError("not a text")
        plain = CONTROL_CHARACTERS.sub("", str(item))
        plain = plain.encode("utf-8", "replace").decode()  # lone surrogates become "?"
        texts.append(" ".join(plain.split()))
    if name in LISTS:
        return [text.lower() for text in texts if text] or None
    text = ", ".join(text for text in texts if text)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{len(text)} characters, {MAX_TEXT} are allowed")
    if name == "key" and "," in text:
        return None  # two keys are none
    if name in LOWER_TEXTS:
        text = text.lower()
    return text or None


def clean_meta(raw: dict) -> tuple[dict, list, list]:
    """audiocraft's metadata fields, cleaned -> (those that hold something, problems, fields not used).

    The description is the first of TEXT_FIELDS that holds a text."""
    fields = {str(name).lower(): value for name, value in raw.items()} if raw.keys() - set(FIELDS) else raw
    meta, problems, taken = {}, [], set()
    for name in ("captions", "segments"):
        if isinstance(value := fields.get(name), list) and value and all(isinstance(x, dict) for x in value):
            meta |= timed_captions(value)
            taken |= {name} if meta else set()
    for name in FIELDS:
        if name in meta or name not in fields and name != "description":
            continue
        sources = TEXT_FIELDS if name == "description" else (name,)
        for source in sources:
            try:
                value = clean_field(name, fields.get(source))
            except (ValueError, TypeError, OverflowError) as error:
                problems.append(f"{source} left out: {error}")
                taken.add(source)
                continue
            if value is not None:
                meta[name] = value
                taken.add(source)
                break
    unused = [name for name, value in fields.items()
              if value not in (None, "", [], {}) and name not in taken and name not in FIELDS]
    return meta, problems, unused


def timed_captions(rows: list) -> dict:
    """Metadata of rows {"start": seconds, "end": seconds, "text": ..}, which are parts of one file.

    "spans" are [start, end, text]; the description is all texts, for whoever asks for no part. Empty where
    the rows have no times, or all the same one: then they are captions of the whole."""
    spans = []
    for row in rows:
        fields = {str(name).lower(): value for name, value in row.items()}
        times = [next((fields[name] for name in names if fields.get(name) not in (None, "")), None)
                 for names in (START_FIELDS, END_FIELDS)]
        meta = clean_meta({name: fields[name] for name in TEXT_FIELDS if name in fields})[0]
        try:
            start, end = map(float, times)
        except (TypeError, ValueError):
            return {}
        if "description" in meta and 0 <= start < end:
            spans.append([start, end, meta["description"]])
    if len({start for start, _, _ in spans}) < 2:
        return {}
    spans.sort()
    return {"description": ". ".join(text.rstrip(".") for _, _, text in spans)[:MAX_TEXT], "spans": spans}


def caption_at(meta: dict, start_seconds: float, seconds: float) -> dict:
    """The metadata of a part of a file. Of captions with times, those stay of which at least half lies in the
    part, and those that fill at least half of it."""
    if "spans" not in meta:
        return meta
    texts = []
    for start, end, text in meta["spans"]:
        overlap = min(end, start_seconds + seconds) - max(start, start_seconds)
        if overlap >= min(end - start, seconds) / 2:
            texts.append(text.rstrip("."))
    return {**meta, "description": ". ".join(texts) or None}


# ------------------------------------------------------------------------------------------------------------
# files beside the audio


def is_sidecar(name: str) -> bool:
    """Whether a file's name is that of captions and not of audio."""
    return name.lower().endswith((".json", ".txt"))


def index_sidecars(names) -> dict:
    """{(name without the suffix, "json" | "txt"): name}; suffixes in any case."""
    return {(name[:name.rindex(".")], name[name.rindex(".") + 1:].lower()): name
            for name in names if is_sidecar(name)}


def find_sidecars(folder: str, name: str, index: dict) -> tuple:
    """Paths of the sidecars of a file out of its folder's index, the most telling first.

    song.mp3.txt says more exactly than song.txt that it belongs to song.mp3."""
    if not index:
        return ()
    stem = os.path.splitext(name)[0]
    keys = (name, "json"), (stem, "json"), (name, "txt"), (stem, "txt")
    return tuple([f"{folder}/{index[key]}" for key in keys if key in index])


@functools.lru_cache(maxsize=8)
def open_zip(path: str) -> zipfile.ZipFile:
    """A zip file of captions, opened once."""
    return zipfile.ZipFile(path)


def split_zip_path(path: str) -> tuple[str, str | None]:
    """FILE.zip:NAME -> (FILE.zip, NAME); any other path -> (path, None)."""
    archive, inside, member = path.partition(".zip:")
    return (archive + ".zip", member) if inside else (path, None)


def read_text_file(path: str) -> bytes:
    """The bytes of a file, or of one in a zip file: FILE.zip:NAME."""
    file_path, member = split_zip_path(path)
    if member is not None:
        try:
            return open_zip(file_path).read(member)
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError,
                RuntimeError) as error:  # the last for an encrypted one
            raise ValueError(f"{path}: {error}") from None
    with open(path, "rb") as file:
        return file.read()


def merge_meta(less: dict, more: dict) -> dict:
    """Metadata of two places, of which `more` wins; a description and its parts with times go together."""
    if "description" in more:
        less = {name: value for name, value in less.items() if name != "spans"}
    return less | more


def read_captions(said: dict, sidecars: tuple) -> tuple[dict | None, str, list, list]:
    """What the sidecars of a file say, else its line of a manifest, else a table.

    said: {"info_path": its JSON by name, "meta": what a table says, "from": that table's kind, ..}, all of
    which may be missing.
    -> (metadata or None, where the description came from, problems, fields not used)."""
    if not sidecars and said.keys() <= NO_TEXT:
        return None, "none", [], []
    meta, caption, problems, unused = {}, "none", [], []
    if isinstance(info := said.get("info_path"), str):
        sidecars = (info, *sidecars)
    elif info is not None:
        problems.append(f"info_path left out: {str(info)[:20]} is not a text")
    for path in sidecars:
        kind = "txt" if path.lower().endswith(".txt") else "json"
        if "description" in meta:
            break
        try:
            raw = read_text_file(path)
            row = parse_object(raw) if kind == "json" else {"description": decode_text(raw)}
        except READ_ERRORS as error:
            problems.append(f"{kind} not used: {error}")
            continue
        found, notes, others = clean_meta(row)
        meta = merge_meta(found, meta)
        problems += notes
        unused += others
        if "description" in found:
            caption = kind

    line = {name: value for name, value in said.items() if name not in FILE_FIELDS}
    if line:
        found, notes, others = clean_meta(line)
        problems += notes
        unused += others
        caption = "manifest" if caption == "none" and "description" in found else caption
        meta = merge_meta(found, meta)
    if "meta" in said:
        caption = said["from"] if caption == "none" and "description" in said["meta"] else caption
        meta = merge_meta(said["meta"], meta)
    return meta, caption, problems, unused
