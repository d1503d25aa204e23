"""What the first bytes of audio files say, and where they lie: kinds by content, mp3 and Ogg that go on.

An mp3 is frames of 1152 samples, each with its own bit rate. Encoders write into the first one how many bytes
of frames follow (a Xing or VBRI header); without that, a reader guesses from the bit rate of the first frame.
An Ogg file is pages of one or several streams, and several may follow each other: it is then "chained".
"""

import functools
import math
import os
import re
from typing import BinaryIO

# How files begin: (place, bytes, usual suffix)
BEGINNINGS = (
    (8, b"WAVE", ".wav"), (0, b"fLaC", ".flac"), (0, b"OggS", ".ogg"), (0, b"ID3", ".mp3"),
    (0, b"FORM", ".aiff"), (0, b"caff", ".caf"), (0, b".snd", ".au"), (0, b"riff\x2e\x91", ".w64"),
    (4, b"ftyp", ".m4a"), (0, b"\x30\x26\xb2\x75", ".wma"), (0, b"\x1a\x45\xdf\xa3", ".webm"),
    (0, b"wvpk", ".wv"), (0, b"MAC ", ".ape"),
    (0, b"MPCK", ".mpc"), (0, b"MP+", ".mpc"), (0, b"TTA1", ".tta"),
    (0, b"DSD ", ".dsf"), (0, b"\xff\xf1", ".aac"), (0, b"\xff\xf9", ".aac"), (0, b"\x0b\x77", ".ac3"))
KBITS = {  # of a frame of layer III, by the version of MPEG
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
FRAME_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz
SAMPLED_PLACES = 12  # of an mp3 without a header, where its bit rate is compared
SAMPLED_PAGES = 5  # of an Ogg file
MOST_PAGE = 65_307  # bytes of an Ogg page


def suffix_by_content(head: bytes) -> str | None:
    """The usual suffix of an audio file that begins with these bytes (12 suffice), or None."""
    for place, magic, suffix in BEGINNINGS:
        if head.startswith(magic, place):
            return suffix
    return ".mp3" if _parse_frame(head) else None


def file_state(path: str) -> tuple[str, int, int]:
    """What changes when a file does: its path, size and time of change."""
    state = os.stat(path)
    return path, state.st_size, state.st_mtime_ns


@functools.lru_cache(maxsize=10_000)
def mp3_share(path: str, size: int, mtime: int) -> float:
    """Bytes of an mp3 that are there, relative to what its header says: 1 where that is true.

    Less: it is cut off. More: another mp3 follows. Infinite: its bit rate changes and it has no header.
    The arguments are those of `file_state`."""
    with open(path, "rb") as file:
        start = _skip_tags(file, 0)
        head = file.read(4096)
        place = _find_frame(head)
        if place is None:
            return 1.0
        frame, start = _parse_frame(head[place:]), start + place
        found = re.compile(rb"Xing|Info|VBRI").search(head, place, place + 200)
        if found is None:
            bit_rates = set()
            for i in range(SAMPLED_PLACES):
                file.seek(start + i * (size - start) // SAMPLED_PLACES)
                piece = file.read(8192)
                if (place := _find_frame(piece, frame[0])) is not None:
                    bit_rates.add(_parse_frame(piece[place:])[1])
            return math.inf if len(bit_rates) > 1 else 1.0
        # Bytes of the stream that the header claims; in Xing only if a flag says so
        field = found.start() + (10 if found[0] == b"VBRI" else 8)
        if found[0] != b"VBRI":
            flags = int.from_bytes(head[field - 4:field], "big")
            if not flags & 2:
                return 1.0
            field += 4 * (flags & 1)
        claimed = int.from_bytes(head[field:field + 4], "big")
        if not claimed:
            return 1.0
        file.seek(start + claimed)
        after = file.read(10)
    goes_on = after.startswith(b"ID3") or _parse_frame(after) is not None
    return (size - start) / claimed if goes_on or size - start < claimed else 1.0


def _skip_tags(file: BinaryIO, start: int) -> int:
    """Where what follows ID3v2 tags begins; the file is there then."""
    while True:
        file.seek(start)
        head = file.read(10)
        if len(head) < 10 or not head.startswith(b"ID3"):
            file.seek(start)
            return start
        length = sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
        start += 10 + length + (10 if head[5] & 16 else 0)          # a footer


def _parse_frame(raw: bytes) -> tuple[tuple, int, int] | None:
    """((version, layer, Hz), kbit/s, bytes) of a frame of layer III that begins here, or None."""
    if len(raw) < 4 or raw[0] != 0xFF or raw[1] & 0xE0 != 0xE0:
        return None
    version, layer, index, rate = raw[1] >> 3 & 3, raw[1] >> 1 & 3, raw[2] >> 4, raw[2] >> 2 & 3
    if version == 1 or layer != 1 or index in (0, 15) or rate == 3:
        return None
    kbits, hertz = KBITS[1 if version == 3 else 2][index - 1], FRAME_RATES[version][rate]
    length = (144 if version == 3 else 72) * kbits * 1000 // hertz + (raw[2] >> 1 & 1)
    return (version, layer, hertz), kbits, length


def _find_frame(raw: bytes, kind: tuple | None = None) -> int | None:
    """Where in these bytes a frame (of a kind) begins which another one of its kind follows."""
    place = raw.find(b"\xff")
    while place >= 0:
        frame = _parse_frame(raw[place:place + 4])
        if frame and kind in (None, frame[0]):
            following = _parse_frame(raw[place + frame[2]:place + frame[2] + 4])
            if following and following[0] == frame[0]:
                return place
        place = raw.find(b"\xff", place + 1)
    return None


@functools.lru_cache(maxsize=10_000)
def is_chained(path: str, size: int, mtime: int) -> bool:
    """Whether other streams follow those that an Ogg file begins with, as far as a few of its pages tell.

    A page has its stream's number, and counts the pages of it. The arguments are those of `file_state`."""
    with open(path, "rb") as file:
        first, place, serials = file.read(2 * MOST_PAGE), 0, []
        while first.startswith(b"OggS\0\2", place):  # a stream begins
            serials.append(first[place + 14:place + 18])
            segments = first[place + 26:place + 27]
            if not segments:
                break
            place += 27 + segments[0] + sum(first[place + 27:place + 27 + segments[0]])
        if size <= SAMPLED_PAGES * MOST_PAGE:
            return count_streams(path) > len(serials)
        counts = []
        for i in range(1, SAMPLED_PAGES + 1):
            file.seek(min(i * size // SAMPLED_PAGES, size - MOST_PAGE))
            piece = file.read(MOST_PAGE)
            place = piece.rfind(b"OggS\0") if i == SAMPLED_PAGES else piece.find(b"OggS\0")
            if place < 0 or len(piece) < place + 22:
                continue
            if piece[place + 14:place + 18] not in serials:
                return bool(serials)
            counts.append(int.from_bytes(piece[place + 18:place + 22], "little"))
    return len(serials) == 1 and counts != sorted(counts)


def count_streams(path: str) -> int:
    """How many streams begin in an Ogg file; reads all of it."""
    with open(path, "rb") as file:
        return file.read().count(b"OggS\0\2")
