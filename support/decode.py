"""Which library decodes an audio file: libsndfile, and PyAV (FFmpeg's libraries) for what that cannot read.

    wav, flac, ogg, opus, mp3, aiff ..        libsndfile: fast, and finds a place in a file by itself
    m4a, aac, wma, webm, wv ..                PyAV, by what is in them, whatever they are called
    ogg or opus of several streams            PyAV: libsndfile reads the first one
    mp3 longer than its header says           PyAV: libsndfile stops where the header says
    flac or wav without a length              PyAV: libsndfile finds nothing, or fails at their end

PyAV is optional (`pip install av`). A reader gives the same samples wherever reading begins.
Legend: C channels, N samples.
"""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator

import numpy as np
import soundfile

from support import common, headers

SNDFILE_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".mp3", ".opus", ".oga", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".au", ".mp2",
    ".snd", ".wave", ".bwf", ".rf64", ".voc")
AV_SUFFIXES = (
    ".m4a", ".m4b", ".mp4", ".mov", ".aac", ".wma", ".asf", ".webm", ".weba", ".mka", ".mkv", ".wv", ".ape",
    ".mpc", ".tta", ".ac3", ".dsf", ".spx")
AUDIO_SUFFIXES = SNDFILE_SUFFIXES + AV_SUFFIXES
NEEDS_AV = "audio that needs `pip install av`"
NO_LENGTH = 2 ** 62  # frames: of a file of unknown length, libsndfile claims more
# What is decoded right after a seek is wrong: frames lean on those before them
LEADS = {"MPEG_LAYER_III": 16 * 1152, "MPEG_LAYER_II": 16 * 1152, "OPUS": 3840}  # samples
BLOCK_SAMPLES = 1024  # of a damaged file that are tried at once
GUESSED = ("mp3", "aac", "ogg", "ac3")  # formats whose length FFmpeg guesses from the bit rate


@contextlib.contextmanager
def open_sndfile(*args, **settings) -> Iterator[soundfile.SoundFile]:
    """soundfile.SoundFile(..), which is closed once, whatever happens.

    Where a signal raises at the end of `close`, the file is closed but not marked so, and its finalizer
    closes it again: libsndfile then frees its memory twice (soundfile 0.14.0)."""
    file = soundfile.SoundFile(*args, **settings)
    try:
        yield file
    finally:
        try:
            file.close()
        except BaseException:
            file._file = None  # marked as closed
            raise


@contextlib.contextmanager
def open_audio(path) -> Iterator:
    """A reader of a file: sample_rate (Hz), channels, frames (samples, as far as its header tells), problem
    (None, or what is wrong with it), tags() -> {name: text}, and read(first, last) -> [N, C] float32, fewer
    at the end.

    Errors: ValueError saying what is missing; OSError, and soundfile.SoundFileError for what is no audio."""
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    with open(path, "rb", buffering=0) as file:
        kind = headers.suffix_by_content(file.read(12))
    if kind in AV_SUFFIXES:
        yield open_by_av(path, suffix if suffix in AV_SUFFIXES else f"{kind} under the name {suffix}")
        return
    with quiet_decoder(), contextlib.ExitStack() as stack:
        try:
            name = os.fsencode(path) if os.name == "posix" else path  # a name need not be text
            file = stack.enter_context(open_sndfile(name))
        except soundfile.SoundFileError:
            if suffix not in (*AV_SUFFIXES, ".oga", ".ogg"):  # such as FLAC in Ogg
                raise
            yield open_by_av(path, suffix)
            return
        unread = what_is_unread(path, file)
        if unread and (common.has_package("av") or not 0 < file.frames < NO_LENGTH):
            yield open_by_av(path, unread)
            return
        yield SndfileReader(path, file, unread)


def what_is_unread(path: str, file: soundfile.SoundFile) -> str | None:
    """Why libsndfile does not read a file to its end; None where it does."""
    if file.format == "OGG" and (
            file.frames >= NO_LENGTH or headers.is_chained(*headers.file_state(path))):
        return "another stream follows the first"
    if file.frames >= NO_LENGTH:
        return "no length in its header (it was piped)"
    if file.format == "WAV" and file.frames == 0 and os.path.getsize(path) > 100:
        return "data of length 0 in its header"
    if file.format == "MP3" and headers.mp3_share(*headers.file_state(path)) > 1:
        return "longer than its header says"
    return None


class SndfileReader:
    """Reads a file by libsndfile, see `open_audio`."""
    def __init__(self, path: str, file: soundfile.SoundFile, unread: str | None):
        self.file, self.problem = file, unread and f"{unread}, `pip install av` reads all of it"
        self.sample_rate, self.channels, self.frames = file.samplerate, file.channels, file.frames
        self.lead = LEADS.get(file.subtype, 0)
        share = headers.mp3_share(*headers.file_state(path)) if file.format == "MP3" else 1.0
        if share < 0.99:
            self.frames = int(share * file.frames)
            whole, there = (frames / file.samplerate for frames in (file.frames, self.frames))
            self.problem = f"cut off: {whole:.2f} s in its header, about {there:.2f} s are there"

    def tags(self) -> dict:
        """Those that libsndfile knows."""
        return self.file.copy_metadata() if hasattr(self.file, "copy_metadata") else {}  # since 0.13

    def read(self, first: int, last: int | None = None) -> np.ndarray:
        """Samples first..last-1 (None: to the end) as [N, C]; where it is damaged, those before that."""
        first = min(first, self.file.frames)
        last = self.file.frames if last is None else last
        lead = min(first, self.lead)
        try:
            self.file.seek(first - lead)
            return self.file.read(lead + last - first, dtype="float32", always_2d=True)[lead:]
        except soundfile.SoundFileError as error:
            blocks, end = [], 0
            # Damaged: no place in it can be found any more, and it must be opened again
            with contextlib.suppress(soundfile.SoundFileError), open_sndfile(self.file.name) as file:
                while end < last:
                    block = file.read(min(last - end, BLOCK_SAMPLES), dtype="float32", always_2d=True)
                    if not len(block):
                        break
                    end += len(block)
                    if end > first:
                        blocks.append(block[max(0, len(block) - (end - first)):])
            if not blocks:
                raise error
            return np.concatenate(blocks)


def open_by_av(path: str, why: str):
    """An AvReader of a file, for this reason. Errors: ValueError, where PyAV is missing with the command."""
    if not common.has_package("av"):
        raise ValueError(f"{path}: {NEEDS_AV}: {why}")
    # The last one goes on where it was, because it cannot seek; but not in another thread or process
    owner = os.getpid(), headers.file_state(path)
    if getattr(_LAST, "owner", None) != owner:
        _LAST.reader, _LAST.owner = AvReader(path), owner
    return _LAST.reader


_LAST = threading.local()


class AvReader:
    """Reads a file by PyAV, see `open_audio`.

    Times in these files are rounded and decoders remember what came before, so that only what is decoded from
    the beginning on is the same every time. Reading on from the last place costs nothing."""
    def __init__(self, path: str):
        self.path, self.problem = path, None
        self._rewind()
        self.channels = self.kept[0].shape[0]

    def _rewind(self) -> None:
        import av
        try:
            self.container = av.open(self.path, metadata_errors="replace")  # a tag may be no text
            if not self.container.streams.audio:
                raise ValueError(f"{self.path}: no audio in it")
            self.arrays, self.kept, self.start, self.end = self._decode(), [], 0, 0
            self.kept = [next(self.arrays)]  # [C, N] each, from sample `start` to `end`
        except av.FFmpegError as error:
            raise ValueError(f"{self.path}: not readable as audio ({error.strerror})") from None
        except StopIteration:
            raise ValueError(f"{self.path}: not readable as audio (nothing in it can be decoded)") from None
        self.end = self.kept[0].shape[1]

    def _decode(self) -> Iterator[np.ndarray]:
        """[C, N] of each frame; what of a damaged file cannot be decoded is left out."""
        import av
        self.sample_rate, shape = None, None
        packets = self.container.demux(audio=0)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.FFmpegError):  # damaged from here on
                return
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                samples = frame.to_ndarray()
                channels = frame.layout.nb_channels
                if not frame.format.is_planar:
                    samples = samples.reshape(-1, channels).T
                if samples.dtype.kind != "f":
                    full = 2 ** (8 * samples.dtype.itemsize - 1)
                    samples = (samples - (full if samples.dtype.kind == "u" else 0.0)) / full
                if shape not in (None, (frame.sample_rate, channels)):
                    raise ValueError(f"{self.path}: its sample rate or its channels change on the way")
                shape, self.sample_rate = (frame.sample_rate, channels), frame.sample_rate
                yield samples.astype(np.float32, copy=False)

    def tags(self) -> dict:
        """Those of the file and of its audio."""
        return self.container.metadata | self.container.streams.audio[0].metadata

    @functools.cached_property
    def frames(self) -> int:
        """Samples, as far as the header tells; where it tells nothing, of every packet, without decoding."""
        import av
        with av.open(self.path, metadata_errors="replace") as container:
            stream, seconds = container.streams.audio[0], (container.duration or 0) / av.time_base
            if seconds <= 0 or container.format.name in GUESSED:
                with contextlib.suppress(av.FFmpegError):
                    seconds = 0.0
                    for packet in container.demux(stream):
                        seconds += float((packet.duration or 0) * packet.time_base)
        return round(seconds * self.sample_rate)

    def read(self, first: int, last: int | None = None) -> np.ndarray:
        """Samples first..last-1 (None: to the end) as [N, C], fewer at the end."""
        if first < self.start:
            self._rewind()
        while last is None or self.end < last:
            array = next(self.arrays, None)
            if array is None:
                break
            self.kept.append(array)
            self.end += array.shape[1]
            if self.end <= first:  # not wanted, and soon far behind
                self.kept, self.start = [], self.end
        wav = np.concatenate(self.kept or [np.zeros((self.channels, 0), np.float32)], 1)
        begin = min(max(first, self.start), self.end)
        wav, self.start = wav[:, begin - self.start:], begin
        self.kept = [wav]
        return wav[:, :None if last is None else max(0, last - begin)].T.copy()


# ------------------------------------------------------------------------------------------------------------
# libmpg123 writes warnings, without the file's name


_QUIET = threading.Lock()
_quiet = {"users": 0, "stderr": None}


@functools.cache
def c_stderr() -> tuple:
    """(the C library's stderr, a stream to nowhere) as pointers; (None, None) where there is no such name."""
    try:
        library = ctypes.CDLL(None)
        library.fopen.restype = ctypes.c_void_p
        nowhere = library.fopen(os.devnull.encode(), b"w")
        return ctypes.c_void_p.in_dll(library, "stderr"), nowhere
    except (OSError, TypeError, ValueError, AttributeError):  # of other systems than Linux
        return None, None


@contextlib.contextmanager
def quiet_decoder():
    """Keeps what libraries in C write to standard error from there; what Python writes goes on.

    libmpg123 complains of damaged files without saying which, and libsndfile has no setting that keeps it
    quiet. What is wrong with a file is found and said by what we read of it."""
    stderr, nowhere = c_stderr()
    with _QUIET:
        _quiet["users"] += 1
        if _quiet["users"] == 1 and nowhere:
            _quiet["stderr"], stderr.value = stderr.value, nowhere
    try:
        yield
    finally:
        with _QUIET:
            _quiet["users"] -= 1
            if _quiet["users"] == 0 and nowhere:
                stderr.value = _quiet["stderr"]
