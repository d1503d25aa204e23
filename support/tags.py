"""Tags: what an audio file says of itself, such as its title and its genre, as metadata.

Every kind of tag has its own names: ID3 (mp3, aiff, wav) "TIT2", MP4 "\xa9nam", ASF (wma) "WM/Genre", Vorbis
comments (flac, ogg, opus) and APE (wv) plain words. mutagen reads them all where it is installed
(`pip install mutagen`); the decoders know some, libsndfile also the INFO chunks of wav.
"""

import re

from support import common
from support.captions import clean_meta

# Metadata -> its tags in lower case; the first one that says something is taken
TAG_NAMES = {
    "title": ("title", "tit2", "\xa9nam"),
    "artist": ("artist", "author", "tpe1", "\xa9art"),
    "description": ("description", "desc", "comment", "comm", "\xa9cmt"),
    "genre": ("genre", "tcon", "\xa9gen", "wm/genre"),
    "bpm": ("bpm", "tempo", "tbpm", "tmpo", "wm/beatsperminute"),
    "key": ("key", "initialkey", "initial_key", "tkey", "wm/initialkey"),
    "moods": ("mood", "moods", "tmoo", "wm/mood"),
    "keywords": ("keywords", "\xa9key"),
    "instrument": ("instrument",),
    "date": ("date", "year", "tdrc", "\xa9day", "wm/year")}
TAGGED = (".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".m4b", ".mp4", ".wma", ".wv", ".ape", ".mpc")
# Comments that programs write: an address, SoX's own
NO_COMMENT = re.compile(r"\s*((https?://|www\.)\S*|Processed by SoX)\s*")
PLAIN_COMMENTS = ("", "comment", "description", "id3v1 comment")  # ID3's other comments are programs' data


def read_tags(path: str, by_decoder: dict) -> tuple[dict, list]:
    """Metadata of a file's own tags, cleaned like a sidecar's -> (meta, problems).

    by_decoder: {name: text} of those that its decoder gives, which knows INFO chunks and webm."""
    try:
        found = _by_mutagen(path) if common.has_package("mutagen") else {}
    except Exception as error:  # of whatever kind: a file's tags may hold anything, and it is used without
        return {}, [f"tags not read: {type(error).__name__}"]
    found = found or {name.lower(): [text] for name, text in by_decoder.items()}
    if not found:
        return {}, []
    raw = {}
    for field, names in TAG_NAMES.items():
        for name in names:
            texts = [text for text in dict.fromkeys(found.get(name, ())) if text.strip()]
            if field == "description":
                texts = [text for text in texts if not NO_COMMENT.fullmatch(text)]
            if field == "bpm":
                texts = [text for text in texts[:1] if text.strip("0. ")]  # 0 is a tagger's word for unknown
            if texts:
                raw[field] = texts if len(texts) > 1 else texts[0]
                break
    return clean_meta(raw)[:2]


def _by_mutagen(path: str) -> dict:
    """{name in lower case: texts} of all tags of a file."""
    import mutagen

    file = mutagen.File(path)
    found = {}
    for name, value in (file.tags or {}).items() if file is not None else ():
        # ID3's "COMM:desc:eng" and "TXXX:MOOD", MP4's "----:com.apple.iTunes:MOOD"
        parts = name.lower().split(":")
        if parts[0] == "comm" and parts[1] not in PLAIN_COMMENTS:
            continue
        name = parts[0] if parts[0] not in ("txxx", "----") else parts[-1]
        if any(name in names for names in TAG_NAMES.values()):
            found.setdefault(name, []).extend(_texts(value))
    return found


def _texts(value) -> list[str]:
    """The texts in a tag of whatever kind."""
    if isinstance(value, bytes):  # free-form tags of MP4
        return [value.decode("utf-8", "replace")]
    for attribute in ("genres", "text", "value"):  # ID3's genre (its numbers spelled), its texts, ASF and APE
        if hasattr(value, attribute):
            return _texts(getattr(value, attribute))
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return str(value).split("\0")
