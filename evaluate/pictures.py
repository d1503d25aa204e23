"""Pictures within a page, as data URIs: the page of a run, and the one that --serve opens."""

import base64
import functools
import io

import torch
from torch import Tensor

from support import common


def data_uri(kind: str, content: bytes) -> str:
    """A file within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(level: Tensor) -> str:
    """Levels [rows, columns] in 0..1 as a PNG of 64 colors, a third as large as one of them all."""
    from matplotlib import colormaps
    from PIL import Image                                # which matplotlib itself needs
    picture, file = Image.fromarray((level * 63).round().to(torch.uint8).numpy(), "L"), io.BytesIO()
    picture.putpalette(colormaps["magma"](range(0, 256, 4), bytes=True)[:, :3].tobytes())
    picture.save(file, "png", optimize=True)
    return data_uri("image/png", file.getvalue())


@functools.lru_cache(maxsize=1)
def can_draw() -> bool:
    """Whether there can be pictures; says so once where not."""
    try:
        import matplotlib.figure                         # noqa: F401 its Figure draws without a screen
    except Exception as error:                           # it is not there, or does not fit numpy
        common.say_once("no pictures on the page: they need matplotlib (pip install matplotlib; "
                        f"{common.describe_error(error)})")
        return False
    return True
