"""Every file of a dataset read to its end: `data.py check --decode`.

Headers lie: a download was cut off, two files were joined, a recorder was switched off before it wrote the
length. A length that is too long makes examples of silence, and one that is too short hides the rest.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
from tqdm import tqdm

from support import audio, decode, headers
from support.captions import READ_ERRORS
from support.common import count_cores
from support.scan import Entry, Scan

STEP_SECONDS = 10  # that are decoded at once
LENGTH_TOLERANCE = 0.1  # seconds: encoders' and decoders' delays are less


def decode_file(entry: Entry) -> tuple[float, list[str]]:
    """(seconds that can be decoded, problems) of a file. Errors: ValueError, OSError where it is none."""
    problems, peak, frames = [], 0.0, 0
    try:
        with decode.open_audio(entry.path) as file:
            while True:
                block = file.read(frames, frames + STEP_SECONDS * file.sample_rate)  # [N, C]
                if len(block) == 0:
                    break
                frames += len(block)
                if not np.abs(block).max() <= audio.MAX_PEAK:  # also refuses NaN
                    raise ValueError(f"samples not finite or beyond {audio.MAX_PEAK:g}")
                peak = max(peak, float(np.abs(block).max()))
    except soundfile.SoundFileError as error:
        if frames == 0:
            raise ValueError(f"cannot be decoded: {error}") from None
    if frames == 0:
        raise ValueError("cannot be decoded: nothing in it")
    seconds = frames / file.sample_rate
    if file.problem:
        problems.append(file.problem)
    if abs(seconds - entry.seconds) > LENGTH_TOLERANCE:
        problems.append(f"another length: its header says {entry.seconds:.2f} s, {seconds:.2f} s can be read")
    if isinstance(file, decode.SndfileReader) and file.file.format == "OGG":
        if (count := headers.count_streams(entry.path)) > 1:
            problems.append(f"another length: it holds {count} streams, of which the first is read")
    if peak < audio.SILENT_PEAK:
        problems.append("silent")
    elif (channel := audio.cancelling_channel(entry.path)) is not None:
        problems.append(f"its channels cancel: as mono, channel {channel + 1} is taken")
    return seconds, problems


def decode_dataset(found: Scan) -> None:
    """Reads every file to its end, in parallel, and prints what differs from its header, a line a file.

    The scan then has true lengths; what cannot be decoded is skipped."""
    def decoded(entry: Entry) -> tuple[float, list[str]] | str:
        try:
            return decode_file(entry)
        except READ_ERRORS as error:
            return str(error).removeprefix(f"{entry.path}: ")

    kept = []
    with ThreadPoolExecutor(count_cores()) as pool:
        results = tqdm(pool.map(decoded, found.entries), "decoding", len(found.entries), unit="file",
                       leave=False, disable=not sys.stderr.isatty())
        for entry, result in zip(found.entries, results):
            if isinstance(result, str):
                found.skipped[entry.path], problems = result, [result]
            else:
                entry.seconds, problems = result
                kept.append(entry)
                if problems:
                    found.problems[entry.path] = "; ".join(problems)
            for problem in problems:
                print(f"decoded      {ascii(entry.path)}: {problem}")
    if not kept:
        raise ValueError(f"none of the {len(found.entries)} files can be decoded")
    found.entries[:] = kept
