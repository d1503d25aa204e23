"""Captions and metadata: from the text and JSON files beside the audio, cleaned.

A caption is the text of song.txt, or the "description" in song.json, beside song.mp3. The fields of song.json
are those of audiocraft. A bad field is left out, with its reason, and the rest is used.
"""

import json
import re
from pathlib import Path

from support.common import MAX_TEXT

READ_ERRORS = (ValueError, OSError)  # of a file that is skipped; others, such as a full GPU, end the program
LOWER_TEXTS = ("key", "genre", "name", "instrument")  # fields that are written in lower case
LISTS = ("moods", "keywords")
FIELDS = ("title", "artist", "description", *LOWER_TEXTS, *LISTS, "bpm")
CONTROL_CHARACTERS = re.compile(r"[\0-\x08\x0e-\x1b\x7f-\x9f]")


def parse_object(raw: bytes) -> dict:
    """A JSON object, NaN and infinities as None. Errors: ValueError for anything else, however hostile."""
    try:
        row = json.loads(raw.decode("utf-8-sig"), parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def clean_field(name: str, value) -> str | float | list | None:
    """One metadata field as audiocraft reads it: a line of text, a number (bpm), strings (LISTS), or None.

    Errors: ValueError, TypeError, OverflowError for a value of another kind."""
    if value in (None, "", "None"):
        return None
    if name == "bpm" and not isinstance(value, bool):
        if not 0 < float(value) < 10_000:
            raise ValueError("out of range")
        return float(value)
    if name in LISTS and isinstance(value, str):
        value = value.replace(",", " ").split()
    items = value if isinstance(value, list) else [value]
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


def clean_meta(raw: dict) -> tuple[dict, list]:
    """audiocraft's metadata fields, cleaned -> (those that hold something, problems)."""
    meta, problems = {}, []
    for name in FIELDS:
        try:
            value = clean_field(name, raw.get(name))
        except (ValueError, TypeError, OverflowError) as error:
            problems.append(f"{name} left out: {error}")
            continue
        if value is not None:
            meta[name] = value
    return meta, problems


def read_sidecar(path: str) -> tuple[dict, str, list]:
    """Metadata of song.json, else the caption of song.txt -> (meta, "json" | "txt" | "none", problems)."""
    meta, source, problems = {"description": None}, "none", []
    for kind in ("json", "txt"):
        sidecar = Path(path).with_suffix(f".{kind}")
        if meta["description"] or not sidecar.is_file():
            continue
        try:
            raw = sidecar.read_bytes()
            row = parse_object(raw) if kind == "json" else {"description": raw.decode("utf-8-sig", "replace")}
        except READ_ERRORS as error:
            problems.append(f"{kind} not used: {error}")
            continue
        found, notes = clean_meta(row)
        meta |= found
        problems += notes
        if meta["description"]:
            source = kind
    return meta, source, problems
