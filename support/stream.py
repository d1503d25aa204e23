"""Music that is heard while it is generated: its codes, frame by frame, become audio piece by piece.

A frame is whole when its last code is there (delay: K-1 steps after its first), and its sound is settled a
few frames later, see support/pieces.py. The pieces, joined, are the clip that decoding at once gives, within
one step of 16 bits.

Legend: K codebooks, T frames, C channels, N samples.
    python generate.py --run runs/NAME --prompt "slow organ" --out - | aplay
"""

import contextlib
import contextvars
import queue
import struct
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from support import audio, common

SOUND_SECONDS = 0.5                            # of a piece: the first is heard when so much is there


class Listener:
    """Takes the T frames of a clip as they come, codes [1,K,t]; `hear` gets its audio [C,n] piece by piece.

    first, stop: the samples of what the codes decode to that are the clip."""

    def __init__(self, codec, T: int, first: int, stop: int, hear: Callable):
        self.decode, self.hear = codec.piece_decoder(), hear
        self.frames = max(1, round(SOUND_SECONDS * codec.frame_rate))          # of a piece
        self.left, self.codes = T, None                                        # frames to decode; those here
        self.first, self.stop, self.samples = first, stop, 0                   # decoded

    @torch.inference_mode(False)                   # who hears may change what is heard, as of any audio
    def __call__(self, codes: Tensor) -> None:
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes], 2)
        while 0 < (count := min(self.frames, self.left)) <= self.codes.shape[2]:
            piece, self.codes = self.codes.tensor_split([count], 2)
            self.left -= count
            wav = self.decode(piece, self.left == 0)
            if wav is None:
                continue
            begin, end = max(0, self.first - self.samples), self.stop - self.samples
            self.samples += wav.shape[-1]
            if begin < min(end, wav.shape[-1]):
                self.hear(wav[0, :, begin:end].cpu())


def in_background(work: Callable[[Callable], None]) -> Iterator:
    """What work(put) puts, one by one. It runs in a thread of its own, so that nothing of how it runs (modes
    of PyTorch, caches) reaches who iterates, from whichever thread. Ends it, too: at its next `put`.

    Errors: those of `work`."""
    found, closed = queue.SimpleQueue(), threading.Event()

    def put(item) -> None:
        if closed.is_set():
            raise GeneratorExit                        # nobody listens any more
        found.put((item, None))

    def run() -> None:
        try:
            work(put)
            found.put((None, StopIteration()))
        except BaseException as error:                 # raised again where the pieces are taken
            found.put((None, error))

    # with the context of who iterates: a page's progress and warnings find their page by it
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while True:
            item, error = found.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()


def check_standard_output(count: int) -> None:
    """Errors: ValueError where --out - cannot take what is asked for, so many clips."""
    if count != 1:
        raise ValueError(f"--out -: it takes one clip, {count} are asked for; name a folder for several")
    if sys.stdout.isatty():
        raise ValueError("--out -: standard output is a terminal: add | aplay, or > clip.wav")


@contextlib.contextmanager
def wav_to_standard_output(sample_rate: int, channels: int, samples: int) -> Iterator[Callable]:
    """Gives what writes the next audio [C,n] of a wav file of 16 bits to standard output, at once.

    The header has the length, which is known before the music is. Who closes the pipe has heard enough: that
    ends it quietly. Errors: ValueError for samples that are not finite, OSError for a full disk."""
    frame, peaks = channels * 2, []                                            # bytes of a sample
    size = samples * frame
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, channels,
                         sample_rate, sample_rate * frame, frame, 16, b"data", size)

    def hear(wav: Tensor) -> None:
        content = audio.to_16_bits(wav).T.contiguous().numpy().tobytes()
        peaks.append(audio.check_samples("standard output", wav))
        try:
            sys.stdout.buffer.write(content if len(peaks) > 1 else header + content)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            common.stdout_problem()
            raise OSError(f"standard output could not be written ({error})") from None

    try:
        yield hear
    except BrokenPipeError:
        common.stdout_problem()
    audio.say_clipped("standard output", max(peaks, default=0.0))
