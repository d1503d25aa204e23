"""What a number may be: of a flag, or of a configuration that somebody else has written. All limits in one
table.

A configuration is compared with it before anything is built: a model of 1e9 layers would be built for ever, a
width of 1e9 takes all memory. The limits lie far beyond what anybody trains, so what is outside is a mistake
or damage. What they allow is then built without storage (on the meta device), and its shapes are compared
with those of the weights in the file.

    check_fields         the fields of a configuration
    check_flag_number    a flag
    check_finite         weights: a NaN in them would be sung
"""

import reprlib

import torch
from torch import Tensor

# name of a field: (least, most). Whole numbers where both are written so, else any; bool: a switch. In a
# list: a list of such.
LIMITS = {
    # the language model (model.ModelConfig)
    "K": (1, 256), "card": (2, 1 << 20), "dim": (4, 1 << 16), "num_layers": (1, 512),
    "num_heads": (1, 1024), "hidden_scale": (1, 64), "dropout": (0.0, 1.0), "emb_std": (0.0, 100.0),
    "cross_attention": bool, "mask_padding": bool, "delays": [(0, 1024)], "flattening": [(0, 255)],
    # its conditions (conditioning.ConditionerConfig, flat)
    "text_vocab": (1, 1 << 20), "text_dim": (1, 1 << 16), "text_layers": (0, 512), "text_heads": (1, 1024),
    "text_head_dim": (1, 4096), "text_hidden": (1, 1 << 18), "text_buckets": (4, 1 << 16),
    "text_max_distance": (2, 1 << 20), "text_max_tokens": (1, 1 << 16), "text_frozen": bool,
    "melody_frames": (1, 1 << 15), "melody_rate": (0.0, 1e4), "melody_argmax": bool,
    "melody_null_bin0": bool, "melody_stems": bool,
    "style_codebooks": (1, 256), "style_card": (2, 1 << 20), "style_dim": (4, 1 << 16),
    "style_layers": (0, 512), "style_heads": (1, 1024), "style_levels": (1, 256),
    "style_bins": (1, 1 << 20), "style_every": (1, 1 << 15), "style_norm": bool,
    "style_frames": (1, 1 << 15),
    # what else best.pt says: of its codec, its window, its sampling (generate.Sampling)
    "levels": (1, 256), "segment_frames": (1, 1 << 20), "cfg": (-100.0, 100.0),
    "temperature": (0.0, 100.0), "top_k": (0, 1 << 20), "top_p": (0.0, 1.0), "cfg_style": (-100.0, 100.0),
    # a codec (tokenizer.build_networks)
    "sample_rate": (100, 1_000_000), "channels": (1, 16), "dimension": (1, 1 << 16), "n_filters": (1, 1024),
    "ratios": [(1, 1024)], "n_residual_layers": (0, 16), "kernel_size": (1, 1024),
    "last_kernel_size": (1, 1024), "residual_kernel_size": (1, 1024), "dilation_base": (1, 64),
    "compress": (1, 1024), "lstm": (0, 16), "causal": bool, "true_skip": bool, "n_q": (1, 256),
    "bins": (2, 1 << 20),
    # a published model's own words
    "kbps": [(0.01, 100_000.0)], "ffn_dim": (1, 1 << 22), "segment_seconds": (0.01, 100_000.0),
}
OPTIONAL = ("emb_std", "delays", "flattening")           # may be None


def check_fields(where, fields: dict, names: dict | None = None) -> None:
    """Compares {name: value} with LIMITS; what has no limit passes. names: what a field is called there.

    Errors: ValueError with the first field that is out of range, its value, and what is allowed."""
    for name, value in fields.items():
        limit = LIMITS.get(name)
        if limit is None or value is None and name in OPTIONAL:
            continue
        of_list = isinstance(limit, list)
        if of_list:
            limit = limit[0]
        values = value if of_list and isinstance(value, (list, tuple)) else [value]
        if of_list and (values is not value or not 1 <= len(values) <= 256) \
                or not all(fits(x, limit) for x in values):
            called = (names or {}).get(name, name)
            raise ValueError(f"{where}: its {called} is {reprlib.repr(value)}, "
                             f"{'a list, each ' if of_list else ''}{describe(limit)} was expected")


def fits(value, limit) -> bool:
    """Whether a value lies in a limit of LIMITS and is of its kind."""
    if limit is bool or isinstance(value, bool):
        return limit is bool and isinstance(value, bool)
    low, high = limit
    kinds = int if isinstance(low, int) else (int, float)
    return isinstance(value, kinds) and low <= value <= high         # NaN is not


def describe(limit) -> str:
    """A limit in words."""
    if limit is bool:
        return "true or false"
    low, high = limit
    kind = "a whole number" if isinstance(low, int) else "a number"
    return f"{kind} from {low:,} to {high:,}"


def shown(value) -> str:
    """A value out of somebody else's file, short enough for a line."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return " ".join(text[:100].split())


def check_flag_number(name: str, value, low, high) -> None:
    """A flag's number. Errors: ValueError naming both; also for NaN."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"--{name} {value}: at least {low}, at most {high:,}")


def check_finite(where, tensors: dict) -> None:
    """Errors: ValueError naming the first of {name: tensor} that holds anything but finite numbers."""
    bad = {}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_floating_point():
            kind = f"{x.dtype} {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{where}: its {shown(name)} holds {kind}, a tensor of floats was expected")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{where}: its {shown(name)} claims {x.numel():,} numbers, the file has less")
        # the extremes of a tensor with a NaN are NaN; they take no memory
        if x.numel() and not all(float(extreme) - float(extreme) == 0 for extreme in x.aminmax()):
            bad[name] = x.numel() - int(x.isfinite().sum())
    if bad:
        name, count = next(iter(bad.items()))
        more = f", and {len(bad) - 1} tensors more" if len(bad) > 1 else ""
        raise ValueError(f"{where}: its weights are not all finite: {name[:100]} has {count:,} of "
                         f"{tensors[name].numel():,} that are NaN or infinite{more}")
