"""What the command line of generate.py asks for: text, melody and so on of each sample, and their values."""

import argparse
from pathlib import Path

from torch import Tensor

from conditioning import CONDITIONS, clean_text
from support import audio
from support.bounds import check_flag_number


def read_prompts(args: argparse.Namespace) -> list:
    """The texts of the command line; None for unconditional. Errors: ValueError."""
    prompts = [clean_text(text) for text in args.prompt]
    if not all(prompts):
        empty = args.prompt[prompts.index("")][:20]
        raise ValueError(f"--prompt {empty!r}: holds no text; for music without, --unconditional")
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {args.prompts}: {error}") from None
        found = [text for text in map(clean_text, lines) if text]
        if not found:
            raise ValueError(f"--prompts {args.prompts}: holds no text; write one prompt a line")
        prompts += found
    others = [name for name, condition in CONDITIONS.items() if not condition.is_text]
    if args.unconditional or not prompts and any(getattr(args, name) for name in others):
        prompts.append(None)
    if not prompts:
        flags = ", ".join(f"--{name}" for name in others)
        raise ValueError('nothing to generate: give --prompt "...", --prompts FILE, '
                         f"{flags} or --unconditional")
    return prompts


def read_requests(args: argparse.Namespace) -> list:
    """What the command line asks for, {name of a condition: string or None} of each sample, each `n` times.

    Errors: ValueError where their numbers do not fit."""
    check_flag_number("n", args.n, 1, 10_000)
    for name, condition in CONDITIONS.items():
        for flag in condition.generate_flags:
            if getattr(args, flag.name) and not getattr(args, name):
                raise ValueError(f"--{flag.name}: it changes --{name}, which is not given")
    columns = {name: read_prompts(args) if condition.is_text else getattr(args, name) or [None]
               for name, condition in CONDITIONS.items()}
    count = max(map(len, columns.values()))
    for name, column in columns.items():
        if len(column) not in (1, count):
            raise ValueError(f"{len(column)} of {name}, {count} samples: give one for all, or as many")
    rows = [{name: column[i % len(column)] for name, column in columns.items()} for i in range(count)]
    check_effect(args, rows)
    return [row for row in rows for _ in range(args.n)]


def check_effect(args: argparse.Namespace, rows: list) -> None:
    """Errors: ValueError for flags that nothing reads, or that change nothing in any of these samples."""
    for name in ("host", "port"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} {getattr(args, name)}: of the page; give --serve with it")
    counts = [(sum(value is not None and CONDITIONS[name].is_text for name, value in row.items()),
               sum(value is not None for value in row.values())) for row in rows]        # texts, conditions
    if args.cfg not in (None, 1) and not any(given for _, given in counts):
        raise ValueError(f"--cfg {args.cfg:g}: there is no text or other condition to guide; leave it out")
    if args.cfg_style not in (None, 1) and not any(0 < texts < given for texts, given in counts):
        raise ValueError(f"--cfg_style {args.cfg_style:g}: it pushes a text beside another condition, "
                         "of which both must be given")


def check_sampling(args: argparse.Namespace, sampling) -> None:
    """Errors: ValueError for a --top_k or --top_p that the settings in force do not read.

    sampling: a generate.Sampling, the flags given and the run's own for the rest."""
    if sampling.temperature == 0 and (args.top_k or args.top_p):
        own = "" if args.temperature == 0 else ", the run's own,"
        raise ValueError(f"--temperature 0{own} takes the likeliest code: leave --top_k and --top_p out, "
                         "or give another --temperature")
    if args.top_k and sampling.top_p:
        own, way_out = ("", "give one of both") if args.top_p else (", the run's own,", "give --top_p 0, too")
        raise ValueError(f"--top_k {args.top_k}: --top_p {sampling.top_p:g}{own} goes before it; {way_out}")


def read_values(music, requests: list) -> list:
    """The conditions of the samples for a generate.MusicGenerator; every file is read once.

    Errors: ValueError names flag and file."""
    known = {}
    for request in requests:
        for name, given in request.items():
            if given is None or (name, given) in known:
                continue
            flag = "prompt" if CONDITIONS[name].is_text else name
            if name not in music.conditions:
                hint = ": use --unconditional" if CONDITIONS[name].is_text else ""
                raise ValueError(f"--{flag} {given}: this model was trained without {name}{hint}")
            try:
                known[name, given] = music.conditions[name].from_user(given, music.codec)
            except ValueError as error:
                raise ValueError(f"--{flag} {given}: {error}") from None
    return [{name: known.get((name, given)) for name, given in request.items()} for request in requests]


def read_continued(path: str | None, codec) -> Tensor | None:
    """The audio [C, N] of --continue as a codec takes it. Errors: ValueError."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"--continue {path}: no such file")
    wav = audio.read_audio(path, sample_rate=codec.sample_rate, channels=codec.channels)
    if not wav.shape[1]:
        raise ValueError(f"--continue {path}: holds no audio")
    return wav


def request_records(args: argparse.Namespace, requests: list, **settings) -> list:
    """What the .json of each sample says: all that was asked for, and the settings."""
    flags = [flag.name for condition in CONDITIONS.values() for flag in condition.generate_flags]
    own = dict(seed=args.seed, run=str(args.run), continued=args.continued, stride=args.stride,
               compile=args.compile, weights=args.weights, **settings,
               **{name: getattr(args, name) for name in flags})
    records = []
    for i, request in enumerate(requests):
        asked = {"prompt" if CONDITIONS[name].is_text else name: given for name, given in request.items()}
        records.append(asked | dict(number=args.first + i) | own)
    return records
