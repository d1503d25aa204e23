"""Codes that were generated and are not yet audio: they lie in the output folder until the audio does.

Generating takes hours, and decoding can fail: for memory, a full disk, Ctrl-C. The same command then goes on
with the codes. Their file's name is a hash of all that decides them, so nothing else takes them for its own.

Legend: B samples, K codebooks, T frames.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from support import common

WEIGHTS_HASHED = 64                            # of each tensor of the model: training changes all of them


def kept_path(folder: Path, music, records: list, values: list, prompt: Tensor | None) -> Path:
    """This process's file for the codes of what a generate.MusicGenerator is asked for.

    Its name begins with a hash of that. records: plain data, the settings of each sample; values: its
    conditions; prompt: audio to continue."""
    digest = hashlib.sha256(json.dumps(records).encode())
    tensors = [x.flatten()[:WEIGHTS_HASHED] for x in music.model.state_dict().values()]
    for value in [prompt, *tensors, *(value for row in values for value in row.values())]:
        is_tensor = isinstance(value, Tensor)
        digest.update(value.float().cpu().numpy().tobytes() if is_tensor else repr(value).encode())
    return folder / f"codes_{digest.hexdigest()[:16]}_{os.getpid()}.pt"


def take_kept(path: Path, music) -> tuple[Tensor, list] | None:
    """(codes [B,K,T], numbers of the samples that are not yet audio) of an earlier call, whose file becomes
    `path`; None where there is none. Of a call that still runs they may be taken, too: it has its own in
    memory, and both write their clips. Errors: ValueError naming the file."""
    for found in sorted(path.parent.glob(f"{path.stem.rsplit('_', 1)[0]}_*.pt")):
        with contextlib.suppress(FileNotFoundError):                 # another took it, or is done with it
            os.replace(found, path)
            break
    else:
        return None
    stored = common.read_torch_dict(path, "codes that were not yet decoded")
    codes, left = stored.get("codes"), stored.get("left")
    codec = music.codec
    if not (isinstance(codes, Tensor) and codes.dim() == 3 and codes.shape[1] == codec.K and codes.numel()
            and 0 <= codes.min() and codes.max() < codec.card and isinstance(left, list) and left
            and all(i in range(len(codes)) for i in left)):
        raise ValueError(f"{path}: damaged: delete it, and its clips are generated again")
    print(f"{path}: {len(left)} clips that an earlier call has generated and not decoded: going on with them",
          file=sys.stderr)
    return codes.long().to(music.model.emb[0].weight.device), left


@contextlib.contextmanager
def keep_codes(path: Path, codes: Tensor, left: list) -> Iterator[None]:
    """Codes [B,K,T] lie at `path` until `left`, from which each sample goes when it is written, is empty."""
    def write() -> None:
        common.write_torch(path, dict(codes=codes.to("cpu", torch.int32), left=left))

    write()
    try:
        yield
        path.unlink(missing_ok=True)
    except BaseException:
        with contextlib.suppress(OSError):     # on a full disk all of them stay
            write()
        print(f"{path}: keeps the codes of {len(left)} clips: the same command makes audio of them",
              file=sys.stderr)
        raise
