"""The page of a run: index.html in its folder shows curves, figures and samples in a browser.

It is made of what lies in the folder alone (config.json, log.jsonl, samples/), so it can be made again at any
time. What of that cannot be read or drawn is left out, and a line names it. It is one file: sound and
pictures are data URIs. It holds no script and fetches nothing, and its policy forbids both. Every text on it
is escaped: a caption with HTML in it is shown, not run.

Legend: C channels, N samples.
    python -m evaluate.page runs/toy          writes runs/toy/index.html anew
"""

import argparse
import functools
import html
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import soundfile
from torch import Tensor

from evaluate.listen import LUFS, REFERENCE_FOLDER, REFERENCE_KINDS, SAMPLE_KINDS, find_samples, spectrogram
from evaluate.pictures import can_draw, data_uri, picture_uri
from evaluate.reference import reference_curve
from support import audio, common

PAGE_FILE = "index.html"
MAX_EPOCHS = 6                                           # shown, so that the page stays small
MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)     # Hz
EACH_CE, MEAN_CE = "cross-entropy of each codebook (nats)", "cross-entropy (nats)"
LOGARITHMIC = (EACH_CE, MEAN_CE, "gradient norm")        # charts
LARGEST = 1e15                                           # number that is shown


# ------------------------------------------------------------------------------------------------------------
# what lies in the folder


def check_file(path: Path) -> None:
    """Errors: ValueError for a folder, or a pipe, which would be waited for."""
    if not path.is_file():
        raise ValueError("not a file" if os.path.lexists(path) else "missing")


def read_record(path: Path) -> dict:
    """A json file; {} for one that is missing or cannot be read: the page shows what there is."""
    if os.path.lexists(path):
        with common.left_out(path):
            check_file(path)
            return common.read_json(path)
    return {}


def part_of(record: dict, name: str) -> dict:
    """A record within a record; {} where there is none."""
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def numbers_in(record: dict) -> dict:
    """What of a record is a finite number, NaN or, however deep, a record of such."""
    kept = {}
    for name, value in record.items():
        if isinstance(value, dict):
            kept[name] = numbers_in(value)
        elif type(value) in (int, float) and not abs(value) >= LARGEST:
            kept[name] = float(value)
    return kept


def parse_log_line(line: bytes) -> dict:
    """A record with a kind, a stage, an epoch and a step; all else in it are numbers. Errors: ValueError."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    names = {name: record.get(name) for name in ("kind", "stage")}
    counts = {name: record.get(name) for name in ("epoch", "step")}
    if not all(isinstance(name, str) for name in names.values()):
        raise ValueError("no kind or no stage")
    if not all(type(count) is int and 0 <= count < LARGEST for count in counts.values()):
        raise ValueError("no epoch or no step")
    return numbers_in(record) | names | counts


def read_log(path: Path) -> list:
    """The records of log.jsonl; one line names how many lines are none."""
    records, odd = [], []
    with common.left_out(path):
        if os.path.lexists(path):
            check_file(path)
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    records.append(parse_log_line(line))
                except (ValueError, RecursionError) as error:
                    odd.append(f"line {number}: {common.describe_error(error)}")
        if odd:
            raise ValueError(f"{len(odd)} of its lines, the first {odd[0]}")
    return records


def records_of(records: list, stage: str, kind: str = "stage") -> list:
    """The records of one stage, each step once."""
    return list({r["step"]: r for r in records if r.get("kind") == kind and r.get("stage") == stage}.values())


def shown_epochs(names: list, most: int = MAX_EPOCHS) -> list:
    """The first, the last and evenly spaced ones between, of the folders that are not the reference's."""
    names = sorted(n for n in names if n != REFERENCE_FOLDER)
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


# ------------------------------------------------------------------------------------------------------------
# data URIs


def audio_uri(wav: Tensor, sample_rate: int) -> str:
    """Audio [C,N] as MP3, which every browser plays; as 16-bit FLAC at rates that MP3 has not."""
    wav = wav.clamp(-1, 1)
    if sample_rate in MP3_RATES and "MP3" in soundfile.available_formats():
        return data_uri("audio/mpeg", audio.encode_audio(wav, sample_rate, "mp3", "MPEG_LAYER_III"))
    return data_uri("audio/flac", audio.encode_audio(wav, sample_rate, "flac", "PCM_16"))


# ------------------------------------------------------------------------------------------------------------
# curves


@dataclass
class Curve:
    """A line of a chart."""
    label: str | None
    steps: list
    values: list
    style: dict                                          # for matplotlib; "shade" 0..1: a color of a scale


def curve(records: list, key: str, label: str | None = None, **style) -> Curve:
    """The curve of one figure of records; nan where it is missing."""
    return Curve(label, [r["step"] for r in records], [r.get(key, math.nan) for r in records], style)


def charts(records: list, reference: list) -> dict:
    """{title: [Curve]} of what there is to draw."""
    steps, valid = records_of(records, "train", "step"), records_of(records, "valid")

    last = (valid or steps or [{}])[-1]
    codebooks = sorted((k for k in last if re.fullmatch(r"ce_q\d{1,4}", k)), key=lambda k: int(k[4:]))
    each = []
    for i, key in enumerate(codebooks):
        shade = i / max(1, len(codebooks) - 1)
        each.append(curve(steps, key, shade=shade, alpha=0.45, linewidth=1))
        each.append(curve(valid, key, key[3:], shade=shade, marker="."))

    mean = [curve(steps, "ce", "train", shade=0.25, alpha=0.6, linewidth=1),
            curve(valid, "ce", "valid", shade=0.25, marker=".")]
    if others := records_of(reference, "valid"):
        label = "reference run, another codec" if others[0].get("other_codec") else "valid, reference run"
        mean.append(curve(others, "ce", label, color="grey", linestyle="--"))

    distances = []
    evaluated = [{"step": r["step"], **common.flatten_numbers(part_of(r, "distances"))}
                 for r in records_of(records, "evaluate")]
    for i, name in enumerate(("fad_codec", "fad_mel")):
        if evaluated and f"{name}/generated" in evaluated[0]:
            shade = 0.2 + 0.5 * i
            distances.append(curve(evaluated, f"{name}/generated", name, shade=shade, marker="o"))
            for bound, line in (("training", "--"), ("ceiling", ":")):
                if f"{name}/{bound}" in evaluated[-1]:                       # not in older runs
                    distances.append(curve(evaluated, f"{name}/{bound}", f"{name}, {bound}", shade=shade,
                                           marker=".", linestyle=line))

    found = {
        EACH_CE: each,
        MEAN_CE: mean,
        "learning rate": [curve(steps, "lr", shade=0.25)],
        "gradient norm": [curve(steps, "grad_norm", shade=0.25, linewidth=1)],
        "Frechet distance to validation clips": distances,
    }
    return {title: lines for title, lines in found.items() if any(line.steps for line in lines)}


def chart_png(title: str, lines: list) -> bytes:
    """A chart of Curves as PNG, readable at half its size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    figure = Figure(figsize=(4.6, 2.9), dpi=160, layout="constrained")
    axes = figure.subplots()
    for line in lines:
        style = dict(line.style)
        if "shade" in style:
            style["color"] = colormaps["viridis"](0.85 * style.pop("shade"))
        axes.plot(line.steps, line.values, label=line.label, **style)
    if title in LOGARITHMIC and any(value > 0 for line in lines for value in line.values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")            # 2, not 2 x 10^0
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)
    if any(line.label for line in lines):
        axes.legend(fontsize=7, ncols=2 if len(lines) > 6 else 1)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------
# the page


PAGE_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; }
.charts img { width: 100%; background: #fff; border-radius: 4px; }
.clip { border-top: 1px solid #8886; padding: 1rem 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .2rem .5rem; text-align: left; vertical-align: top; font-weight: normal; }
.clip th, .clip figcaption { color: GrayText; }
.beside { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin-bottom: .5rem; }
.clip img { display: block; width: 10rem; height: 4rem; border-radius: 4px 4px 0 0; }
.clip audio { display: block; width: 10rem; height: 2.2rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; } .tables > div { max-width: 100%; }
.figures th, .figures td { padding: 0 .4rem; } .settings td { overflow-wrap: anywhere; }
.figures td, .figures tr:first-child th { text-align: right; font-variant-numeric: tabular-nums; }
.clip th[scope=row] { position: sticky; left: 0; background: Canvas; }
"""
# no script, nothing from outside
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def escape(value) -> str:
    """Text as HTML shows it."""
    return html.escape(str(value))


def charts_html(records: list, reference: list) -> str:
    """The curves, as figures."""
    if not can_draw():
        return ""
    figures = []
    for title, lines in charts(records, reference).items():
        with common.left_out(f"the chart of the {title}"):
            source, title = data_uri("image/png", chart_png(title, lines)), escape(title)
            figures.append(f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="{source}">'
                           "</figure>")
    return f'<h2>Training</h2><div class="charts">{"".join(figures)}</div>'


def table_html(rows: dict) -> str:
    """{row: {column: number}} as a table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(c)}</th>" for c in columns) + "</tr>"]
    for name, row in rows.items():
        line = f"<tr><th>{escape(name)}</th>"
        for column in columns:
            value = row.get(column, "")
            text = f"{value:.3g}" if isinstance(value, (int, float)) else escape(value)
            line += f"<td>{text}</td>"
        lines.append(f"{line}</tr>")
    return f'<div class="scroll"><table class="figures">{"".join(lines)}</table></div>'


def evaluation_html(records: list) -> str:
    """The last evaluation's figures: of the loss, the distances, caption adherence."""
    if not (evaluated := records_of(records, "evaluate")):
        return ""
    last = evaluated[-1]
    adherence = part_of(last, "adherence")
    named = {
        "loss": {k: {"value": v} for k, v in last.items() if k.startswith("ce") and isinstance(v, float)},
        "beside validation clips": part_of(last, "distances"),
        "captions followed, combinations seen in training": part_of(adherence, "valid"),
        "captions followed, combinations held out": part_of(adherence, "heldout"),
    }
    tables = ""
    for title, rows in named.items():
        if rows:
            tables += f"<div><h3>{escape(title)}</h3>{table_html(rows)}</div>"
    return f"<h2>Evaluation after epoch {escape(last['epoch'])}</h2><div class='tables'>{tables}</div>"


@functools.lru_cache(maxsize=512)
def player_html(path: Path, changed: int) -> str:
    """A sample's picture and player. `changed`, its file's time, makes a new one of a file that was written
    again."""
    check_file(path)
    wav, rate = audio.read_audio(path), audio.audio_info(path).sample_rate
    if wav.shape[1] == 0:
        raise ValueError("no audio in it")
    record = numbers_in(read_record(path.with_suffix(".json")))
    picture = ""
    if can_draw():
        level = spectrogram(wav, rate, mark_seconds=record.get("prompt_seconds"))
        picture = f'<img alt="spectrogram" src="{picture_uri(level)}">'
    return f'{picture}<audio controls preload="metadata" src="{audio_uri(wav, rate)}"></audio>'


def clip_html(number: int, samples: dict, epochs: list) -> str:
    """A validation clip: its reference, and a column of samples for each epoch."""
    def player(folder: str, kind: str) -> str:
        path = samples.get(folder, {}).get((number, kind))
        if path is not None:
            with common.left_out(path):
                return player_html(path, path.stat().st_mtime_ns)
        return ""

    paths = [path for found in samples.values() for key, path in found.items() if key[0] == number]
    title = read_record(paths[0].with_suffix(".json")).get("prompt") or "(no caption)"
    beside = ""
    for kind, caption in REFERENCE_KINDS.items():
        if source := player(REFERENCE_FOLDER, kind):
            beside += f"<figure><figcaption>{escape(caption)}</figcaption>{source}</figure>"
    head = "".join(f'<th scope="col">{escape(re.sub("_0*", " ", name))}</th>' for name in epochs)
    rows = f"<tr><th></th>{head}</tr>"
    for kind in SAMPLE_KINDS:
        if any((number, kind) in samples[epoch] for epoch in epochs):
            cells = "".join(f"<td>{player(epoch, kind)}</td>" for epoch in epochs)
            rows += f'<tr><th scope="row">{kind}</th>{cells}</tr>'
    return (f'<section class="clip"><h3>{number}. {escape(title)}</h3><div class="beside">{beside}</div>'
            f'<div class="scroll"><table>{rows}</table></div></section>')


def samples_html(out: Path) -> str:
    """The grid of players: clips down, epochs across."""
    samples = find_samples(out)
    if not samples:
        return ""
    epochs = shown_epochs(list(samples))
    left_out = len([name for name in samples if name != REFERENCE_FOLDER]) - len(epochs)
    note = f" {left_out} more epochs lie in samples/." if left_out else ""
    legend = "; ".join(f"<b>{kind}</b> {escape(what)}" for kind, what in SAMPLE_KINDS.items())
    numbers = sorted({number for found in samples.values() for number, _ in found})
    clips = "".join(clip_html(number, samples, epochs) for number in numbers)
    legend += f". The same seed in every epoch; {LUFS:g} LUFS (ITU-R BS.1770-4).{note}"
    return f"<h2>Listen</h2><p>{legend}</p>{clips}"


def settings_html(config: dict) -> str:
    """Every flag, folded away."""
    rows = dict(part_of(config, "args"), parameters=config.get("parameters"),
                codec=part_of(config, "codec").get("name"), torch=config.get("torch"))
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f'<details><summary>Settings</summary><table class="settings">{body}</table></details>'


def page_html(out: Path) -> str:
    """The page of a run folder."""
    config, records = read_record(out / "config.json"), read_log(out / "log.jsonl")
    args = part_of(config, "args")
    last = records[-1] if records else {}
    state = f"epoch {last.get('epoch', 0)} of {args.get('epochs', '?')}, update {last.get('step', 0)}"
    if losses := [r["ce"] for r in records_of(records, "valid") if math.isfinite(r.get("ce", math.nan))]:
        state += f", best validation cross-entropy {min(losses):.4f}"
    name = escape(out.resolve().name)

    body = f"<h1>{name}</h1><p>{escape(state)}</p>"
    for what, make in (("settings", lambda: settings_html(config)),
                       ("curves", lambda: charts_html(records, reference_curve(config))),
                       ("evaluation", lambda: evaluation_html(records)),
                       ("samples", lambda: samples_html(out))):
        with common.left_out(f"{out / PAGE_FILE}: the part on {what}"):
            body += make()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{PAGE_STYLE}</style></head><body>{body}</body></html>\n")


def write_page(out: Path) -> Path:
    """Writes index.html into a run folder, and returns its path. Errors: OSError."""
    path, content = Path(out) / PAGE_FILE, page_html(Path(out)).encode(errors="replace")
    common.write_atomically(path, lambda file: file.write(content))
    return path


@common.command("evaluate.page")
def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluate.page", allow_abbrev=False,
                                     description="Writes the page of a run folder.")
    parser.add_argument("run", help="run folder")
    args = parser.parse_args(argv)
    if not Path(args.run, "config.json").is_file():
        raise ValueError(f"{args.run}: no config.json there; give the folder of a run")
    print(f"wrote {write_page(Path(args.run))}")


if __name__ == "__main__":
    sys.exit(main())
