"""The takes of a visit to the page of generate.py --serve: what is asked for, made, written and shown.

A take is a clip with its json, the same that the command line writes for the same (but for the name of an
upload). Nothing here needs gradio.

Legend: C channels, N samples.
"""

import argparse
import copy
import dataclasses
import math
import re
import tempfile
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from torch import Tensor

import toy
from conditioning import CONDITIONS, clean_text
from evaluate import analyser
from evaluate.listen import find_samples, spectrogram
from evaluate.pictures import can_draw, picture_uri
from support import audio, common
from support.requests import read_continued, request_records

MAX_CLIP_SECONDS = 300                       # of a clip: others wait for it; the command line goes to an hour
MAX_TAKES = 4                                # of a prompt at once
SHOWN_CAPTIONS = 6
WHOLE = ("top_k", "seed")                      # numbers without a fraction
PLACES = 500                                   # of rows of takes on the page
FILE_ROUTE = "gradio_api/file="                # where gradio serves the files of its folder


@dataclass
class Take:
    """A clip of this visit: the path of its wav, the fields that made it, its json, and itself as HTML."""
    path: Path
    asked: dict
    record: dict
    html: str


def page_fields(music, seconds: float | None = None, seed: int = 0) -> dict:
    """The fields of the page for a generate.MusicGenerator and their first values."""
    conditions = {name: None for name in CONDITIONS if name in music.conditions}
    sampling = asdict(music.sampling)
    texts = [name for name in conditions if CONDITIONS[name].is_text]
    if not texts or len(conditions) < 2:
        del sampling["cfg_style"]              # nothing for the text to stand beside
    window_seconds = round(music.window / music.codec.frame_rate, 2)
    return conditions | {"seconds": seconds or window_seconds} | sampling | {"seed": seed}


def check_number(name: str, value) -> float | int:
    """A field's number. Errors: ValueError for an empty one, or a fraction where none makes sense."""
    kind = "whole " if name in WHOLE else ""
    if value is None:
        raise ValueError(f"{name} is empty: give a {kind}number")
    if not isinstance(value, (int, float)) or not math.isfinite(value) or kind and value != int(value):
        raise ValueError(f"{name} {value}: give a {kind}number")
    return int(value) if kind else float(value)


def check_asked(music, asked: dict) -> tuple:
    """(seconds, seed, Sampling) of the fields of `page_fields`. Errors: ValueError."""
    numbers = {name: check_number(name, value) for name, value in asked.items() if name not in CONDITIONS}
    seconds, seed = numbers.pop("seconds"), numbers.pop("seed")
    if not 0 < seconds <= MAX_CLIP_SECONDS:
        raise ValueError(f"seconds {seconds:g}: more than 0, at most {MAX_CLIP_SECONDS}")
    if not 0 <= seed < 2 ** 63:
        raise ValueError(f"seed {seed}: it lies between 0 and 2^63")
    return seconds, seed, dataclasses.replace(music.sampling, **numbers)


def perform(music, asked: dict, progress=None, remark=lambda line: None, hear=None, number: int = 0,
            prompt: Tensor | None = None) -> Tensor:
    """Audio [C, N] of a generate.MusicGenerator for the fields of `page_fields`.

    The same as the command line makes of the same. remark: is called with each line on what the model does
    not follow of it. hear: gets the audio piece by piece while it is generated. number: of the sample;
    prompt: audio [C, N] to continue, counted in the seconds. Errors: ValueError says in one line what is
    wrong."""
    seconds, seed, sampling = check_asked(music, asked)
    values = {}
    for name, condition in music.conditions.items():
        given = asked.get(name)
        if condition.widget == "number" and given is not None:
            given = check_number(name, given)
        try:
            values[name] = None if given in (None, "") else condition.from_user(given, music.codec)
        except ValueError as error:
            file = f"{Path(given).name}: " if condition.widget == "audio" else ""
            raise ValueError(f"{name}: {file}{error}") from None
        for line in [] if values[name] is None else condition.remarks(values[name]):
            remark(line)
    codes = music.codes([values], seconds, seed, sampling, prompt=prompt, first=number, progress=progress,
                        hear=hear)
    return music.decode(codes, seconds, prompt)[0]


# ------------------------------------------------------------------------------------------------------------
# what is asked for


def plan_takes(asked: dict, second: str | None = None, count: int | float = 1) -> list:
    """[(fields, number of the sample)]: as many of the prompt, and of a second one at the same seed.

    Numbers begin with 0 for each prompt, as --n makes them, so that a pair differs in its prompt alone.
    Errors: ValueError."""
    if count not in range(1, MAX_TAKES + 1):
        raise ValueError(f"takes {count}: 1 to {MAX_TAKES}")
    every = [asked]
    if second and clean_text(second):
        every += [asked | {name: second for name in asked if name in CONDITIONS and CONDITIONS[name].is_text}]
    return [(fields, number) for fields in every for number in range(int(count))]


def plan_to_go_on(take: Take) -> list:
    """[(fields, number)] to continue a take by its length again. Errors: ValueError."""
    seconds = 2 * take.asked["seconds"]
    if seconds > MAX_CLIP_SECONDS:
        raise ValueError(f"{seconds:g} s: a clip has at most {MAX_CLIP_SECONDS}")
    if not take.path.is_file():
        raise ValueError(f"{take.path.name}: forgotten; generate it again")
    return [(take.asked | {"seconds": seconds}, take.record["number"])]


def run_folder(run: str) -> Path:
    """The folder of --run, which may be the best.pt in it."""
    return Path(run).parent if Path(run).is_file() else Path(run)


def stored_record(path: Path) -> dict:
    """A json of a run folder; {} where there is none, and a line where it cannot be read."""
    with common.left_out(path):
        if path.is_file():
            return common.read_json(path)
    return {}


def is_toy_run(run: str) -> bool:
    """Whether a run folder says that it learnt toy music."""
    args = stored_record(run_folder(run) / "config.json").get("args")
    return isinstance(args, dict) and args.get("dataset") == "toy"


def example_captions(run: str) -> list:
    """Captions of the kind that a run has learnt: of toy music, or those of its samples; [] where none."""
    if is_toy_run(run):
        return [toy.draw_clip(0, 0, i, "valid")[1] for i in range(SHOWN_CAPTIONS)]
    found = {}
    for samples in find_samples(run_folder(run)).values():
        for path in samples.values():
            prompt = stored_record(path.with_suffix(".json")).get("prompt")
            if isinstance(prompt, str) and clean_text(prompt):
                found[clean_text(prompt)] = None
    return list(found)[:SHOWN_CAPTIONS]


# ------------------------------------------------------------------------------------------------------------
# making one


def make_take(music, args: argparse.Namespace, folder: str, asked: dict, number: int = 0,
              before: Take | None = None, is_toy: bool = False, **calls) -> Take:
    """Generates and writes a take into a folder of its own.

    args: flags of generate.py; before: the take that it continues; calls: progress, remark and hear of
    `perform`. Errors: ValueError, OSError."""
    prompt = None if before is None else read_continued(str(before.path), music.codec)
    wav = perform(music, asked, number=number, prompt=prompt, **calls)
    seconds, seed, sampling = check_asked(music, asked)
    flags = copy.copy(args)
    flags.seed, flags.first, flags.continued = seed, number, before and before.path.name
    request = {}
    for name, condition in CONDITIONS.items():
        given = asked.get(name)
        given = None if given in (None, "") else given
        if given is not None and condition.is_text:
            given = clean_text(given)
        elif given is not None and condition.widget == "audio":
            given = Path(given).name                                   # not where this machine keeps it
        request[name] = given
    record, = request_records(flags, [request], seconds=seconds, codec=music.codec.fingerprint,
                              **asdict(sampling))
    path = Path(tempfile.mkdtemp(dir=folder)) / f"seed{seed}_{number:03}.wav"      # no other request's
    audio.write_clip(path, wav, music.codec.sample_rate, record)
    html = take_html(path, wav, music.codec.sample_rate, record, is_toy)
    return Take(path, asked, record, html)


# ------------------------------------------------------------------------------------------------------------
# showing one


def asked_attributes(text: str) -> dict:
    """{attribute: value} that a text asks of toy music; without those that it does not name, or doubly."""
    found = {}
    for name, values in toy.VALUES.items():
        said = set()
        for value in values:
            words = [rf"\b{re.escape(word)}s?\b" for word in toy.WORDS.get(value, ())]
            if name == "root":                                         # "a" is an article, too
                words = [rf"\b(in|of) {value}( major\b| with|[^\w\s]|$)", rf"(^|\W){value} major\b"]
            if any(re.search(word, text, re.IGNORECASE) for word in words):
                said.add(value)
        if len(said) == 1:
            found[name], = said
    return found


def heard_html(wav: Tensor, sample_rate: int, text: str | None) -> str:
    """A table of what the analyser hears in toy music [C, N] beside what its text asked for."""
    heard, asked = analyser.hear(wav[None], sample_rate)[0], asked_attributes(text or "")
    rows = ""
    for name, value in heard.items():
        mark = "" if name not in asked else " ✓" if asked[name] == value else " ✗"
        rows += (f'<tr><th scope="row">{escape(name)}</th><td>{escape(asked.get(name, "–"))}</td>'
                 f"<td>{escape(value)}{mark}</td></tr>")
    return ('<table><caption>Toy music: what the analyser hears</caption><tr><th></th>'
            f'<th scope="col">asked</th><th scope="col">heard</th></tr>{rows}</table>')


def take_html(path: Path, wav: Tensor, sample_rate: int, record: dict, is_toy: bool = False) -> str:
    """A take [C, N] as HTML: its prompt, spectrogram, player, settings and files."""
    given = [record["prompt"] or "(no text)"]
    given += [f"{name} {record[name]}" for name in CONDITIONS if record.get(name) is not None]
    title = escape(", ".join(given))
    name = f"{title}, seed {record['seed']}, number {record['number']}"
    picture = ""
    if can_draw():
        before = record["seconds"] / 2 if record["continued"] else None
        level = spectrogram(wav, sample_rate, mark_seconds=before)
        picture = f'<img alt="spectrogram of {name}" src="{picture_uri(level)}">'
    settings = f"{record['seconds']:g} s, guidance {record['cfg']:g}, temperature {record['temperature']:g}, "
    settings += f"top-k {record['top_k']}, top-p {record['top_p']:g}"
    if record["cfg_style"] != 1:
        settings += f", guidance of the text {record['cfg_style']:g}"
    settings += f", seed {record['seed']}, number {record['number']}"
    links = " ".join(f'<a download href="{FILE_ROUTE}{escape(str(file))}">{kind}</a>'
                     for kind, file in (("wav", path), ("json", path.with_suffix(".json"))))
    heard = heard_html(wav, sample_rate, record["prompt"]) if is_toy else ""
    source = f"{FILE_ROUTE}{escape(str(path))}"
    player = f'<audio controls preload="metadata" aria-label="{name}" src="{source}"></audio>'
    return (f'<article class="take"><h3>{title}</h3>{picture}{player}'
            f"<p>{settings}<br>Download {links}</p>{heard}"
            f'<button type="button" value="{escape(str(path))}">Go on from this one</button></article>')


def visit_html(rows: list) -> str:
    """Rows of takes, the newest first, as HTML.

    gradio compares the list with what it shows, place by place, and a player stops where its place gets
    another take. Empty places stand before the rows, so that each row keeps its own, counted from the end."""
    shown = ['<section class="row"></section>'] * (PLACES - len(rows))
    for takes in rows:
        each = [take.html if take.path.is_file() else f"<p>{take.path.name}: forgotten after an hour</p>"
                for take in takes]
        shown.append(f'<section class="row">{"".join(each)}</section>')
    return "".join(shown)
