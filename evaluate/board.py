"""TensorBoard beside log.jsonl: the same numbers under the same names, and the samples' sound and pictures.

Only --tensorboard needs the tensorboard package.
"""

from pathlib import Path

from evaluate.listen import spectrogram
from support import audio, common


def open_board(out: Path, step: int):
    """A TensorBoard writer below a run folder; what a killed run wrote after `step` is hidden. Errors:
    ValueError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the tensorboard package: pip install tensorboard "
                         "(or leave the flag out)") from None
    return SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else None)


def show_record(board, record: dict) -> None:
    """Shows a record's numbers, named such as "step/train/ce_q1" or
    "stage/evaluate/distances/fad_mel/generated"."""
    with common.left_out("a record of TensorBoard's"):
        for name, value in common.flatten_numbers(record).items():
            if name not in ("epoch", "step"):
                board.add_scalar(f"{record['kind']}/{record['stage']}/{name}", value, record["step"])
        board.flush()


def show_sample(board, name: str, path: Path, step: int) -> None:
    """Shows the sound and the spectrogram of a sample's wav."""
    with common.left_out(f"{path}, for TensorBoard,"):
        wav, rate = audio.read_audio(path, channels=1), audio.audio_info(path).sample_rate
        board.add_audio(name, wav, step, rate)
        board.add_image(name, spectrogram(wav, rate)[None], step)
