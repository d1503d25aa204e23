"""What one looks at and listens to: samples on the disk, and index.html in the run folder, which shows a run in a browser.

The page is made of what lies in the folder alone (config.json, log.jsonl, samples/), so that it can be made again at any time. It is one
file: sound and pictures are data URIs. It holds no script, fetches nothing (its policy forbids both), and every text on it is escaped:
a caption with HTML in it is shown, not run.

    run/samples/epoch_0003/000_unprompted.wav      from the conditions of validation clip 0 alone
                           000_prompted.wav        the same, continuing the first quarter of that clip
                           000_unconditional.wav   from nothing
                reference/000_reference.wav        clip 0 itself; 000_codec.wav: through the codec and back, the best a model can do

Samples are as loud as each other: -14 LUFS by ITU-R BS.1770-4, less where a peak would pass -1 dB of full scale.

Legend: C channels, N samples.
    python -m evaluate.page runs/toy          writes runs/toy/index.html anew
"""

import argparse
import base64
import functools
import html
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from support import audio, quality

REFERENCE_RUN = Path(__file__).parent.parent / "assets" / "reference_run.jsonl"
KINDS = dict(unprompted="from the conditions of the clip", prompted="the same, continuing the clip's first quarter (up to the line)",
             unconditional="from nothing")
NAME = "index.html"
REFERENCES = dict(reference="reference", codec="reference through the codec")
LUFS, PEAK_DB = -14.0, -1.0                                          # target loudness (as the reference system); highest peak
LOUDNESS_SECONDS = 0.4                                               # a block of BS.1770: what is shorter has no loudness
COLUMNS = 6                                                          # epochs shown at most, so that the page stays small
MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


# ---------------------------------------------------------------------------------------------------------------------
# samples


def normalise(wav: Tensor, sample_rate: int) -> tuple[Tensor, float]:
    """wav [C,N] at -14 LUFS (ITU-R BS.1770-4), quieter where its peak would pass -1 dB; and the gain in dB.

    What is shorter than 0.4 s or silent has no loudness, and is left alone."""
    peak = float(wav.abs().max()) if wav.numel() else 0.0
    if wav.shape[1] < LOUDNESS_SECONDS * sample_rate or peak < 1e-4:
        return wav, 0.0
    loudness = float(torchaudio.functional.loudness(wav.float(), sample_rate))
    if not loudness > -70:                                           # the gate of the standard; nan where it let nothing through
        return wav, 0.0
    gain = min(LUFS - loudness, PEAK_DB - 20 * math.log10(peak))
    return wav * 10 ** (gain / 20), gain


def write_sample(folder: Path, name: str, wav: Tensor, sample_rate: int, record: dict) -> None:
    """A sample [C,N] as NAME.wav, loudness-normalised, and what is known of it as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    wav, gain = normalise(wav, sample_rate)
    audio.write_audio(folder / f"{name}.wav", wav, sample_rate)
    record = dict(record, loudness=f"{LUFS:g} LUFS (ITU-R BS.1770-4), peak at most {PEAK_DB:g} dB", gain_db=round(gain, 2))
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def read_samples(out: Path) -> dict:
    """{folder name: {(clip number, kind): path of its wav}} of a run's samples."""
    found = {}
    for path in sorted(out.glob("samples/*/*.wav")):
        if match := re.fullmatch(r"(\d+)_(\w+)", path.stem):
            found.setdefault(path.parent.name, {})[int(match[1]), match[2]] = path
    return found


def shown_epochs(names: list, most: int = COLUMNS) -> list:
    """The first, the last and evenly spaced ones between, of the folders that are not the reference's."""
    names = sorted(n for n in names if n != "reference")
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def spectrogram(wav: Tensor, sample_rate: int, columns: int = 160, mark_seconds: float | None = None) -> Tensor:
    """Levels [64, columns] in 0..1 of 64 mel bands (the highest on top) over the 60 dB below full scale; a line at `mark_seconds`."""
    mono = torch.nn.functional.pad(wav.float().mean(0), (0, max(0, 1024 - wav.shape[1])))
    level = (1 + quality.MelSpectrum(sample_rate, 1024, 64)(mono[None]).clamp(1e-3, 1).log10() / 3)   # [1, 64, F]
    level = torch.nn.functional.interpolate(level, columns, mode="linear")[0].flip(0)                   # [64, columns]
    if mark_seconds:
        level[:, min(columns - 1, int(columns * mark_seconds * sample_rate / wav.shape[1]))] = 1
    return level


# ---------------------------------------------------------------------------------------------------------------------
# data URIs


def uri(kind: str, content: bytes) -> str:
    """A file within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def audio_uri(wav: Tensor, sample_rate: int) -> str:
    """Audio [C,N] as MP3, which every browser plays; as 16-bit FLAC at rates that MP3 has not."""
    file, samples = io.BytesIO(), wav.clamp(-1, 1).T.numpy()
    if sample_rate in MP3_RATES and "MP3" in soundfile.available_formats():
        soundfile.write(file, samples, sample_rate, format="MP3", subtype="MPEG_LAYER_III")
        return uri("audio/mpeg", file.getvalue())
    soundfile.write(file, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return uri("audio/flac", file.getvalue())


def picture_uri(level: Tensor) -> str:
    """Levels [rows, columns] in 0..1 as a PNG of 64 colours, a third as large as one of them all."""
    from matplotlib import colormaps
    from PIL import Image                                            # which matplotlib itself needs
    picture, file = Image.fromarray((level * 63).round().to(torch.uint8).numpy(), "L"), io.BytesIO()
    picture.putpalette(colormaps["magma"](range(0, 256, 4), bytes=True)[:, :3].tobytes())
    picture.save(file, "png", optimize=True)
    return uri("image/png", file.getvalue())


@functools.lru_cache(maxsize=512)
def player(path: Path, changed: int) -> str:
    """A sample's picture and player; `changed` (its file's time) makes a new one of a file that was written again."""
    wav, rate = audio.read_audio(path), audio.audio_info(path).sample_rate
    record = read_json(path.with_suffix(".json"))
    picture = ""
    if pictures():
        level = spectrogram(wav, rate, mark_seconds=record.get("prompt_seconds"))
        picture = f'<img alt="spectrogram" src="{picture_uri(level)}">'
    return f'{picture}<audio controls preload="metadata" src="{audio_uri(wav, rate)}"></audio>'


@functools.lru_cache(maxsize=1)
def pictures() -> bool:
    """Whether there can be pictures; says so once where not."""
    try:
        import matplotlib.figure                                     # noqa: F401 its Figure draws without a screen
    except ImportError:
        print("index.html has no pictures: they need matplotlib (pip install matplotlib)", file=sys.stderr, flush=True)
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# curves


def reference_curve(args: dict, path: Path = REFERENCE_RUN) -> list:
    """Records of the reference run's stages, if it had the same flags as a run's `args` in all that matters; else []."""
    if not path.is_file():
        return []
    header, *records = (json.loads(line) for line in path.read_text().splitlines())
    plain = dict(channels=1, num_codebooks=None, conditions=["text"], no_text=False, init_from=None)
    same = all(args.get(k) == v for k, v in (plain | header["args"]).items())
    return [r for r in records if r["kind"] == "stage"] if same else []


def stage(records: list, name: str, kind: str = "stage") -> list:
    """The records of one stage, each step once."""
    return list({r["step"]: r for r in records if r.get("kind") == kind and r.get("stage") == name}.values())


def flat(record: dict, prefix: str = "") -> dict:
    """Every number of a record, however deep, as {"a/b": number}."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def curves(records: list, reference: list) -> dict:
    """{title: [(label, steps, values, style)]} of what there is to draw."""
    steps, valid, evaluated = stage(records, "train", "step"), stage(records, "valid"), stage(records, "evaluate")
    books = sorted((k for k in (valid or steps or [{}])[-1] if k.startswith("ce_q")), key=lambda k: int(k[4:]))
    lines = {"cross-entropy of each codebook (nats)": [], "cross-entropy (nats)": [], "learning rate": [], "gradient norm": [],
             "Frechet distance to validation clips": []}
    for i, key in enumerate(books):
        colour = i / max(1, len(books) - 1)
        lines["cross-entropy of each codebook (nats)"] += [
            (None, xs(steps), ys(steps, key), dict(colour=colour, alpha=0.45, linewidth=1)),
            (key[3:], xs(valid), ys(valid, key), dict(colour=colour, marker="."))]
    lines["cross-entropy (nats)"] += [("train", xs(steps), ys(steps, "ce"), dict(colour=0.25, alpha=0.6, linewidth=1)),
                                      ("valid", xs(valid), ys(valid, "ce"), dict(colour=0.25, marker="."))]
    if others := stage(reference, "valid"):
        lines["cross-entropy (nats)"].append(("valid, reference run", xs(others), ys(others, "ce"), dict(color="grey", linestyle="--")))
    lines["learning rate"].append((None, xs(steps), ys(steps, "lr"), dict(colour=0.25)))
    lines["gradient norm"].append((None, xs(steps), ys(steps, "grad_norm"), dict(colour=0.25, linewidth=1)))
    numbers = [{"step": r["step"], **flat(r.get("distances", {}))} for r in evaluated]
    for i, name in enumerate(("fad_codec", "fad_mel")):
        if numbers and f"{name}/generated" in numbers[0]:
            lines["Frechet distance to validation clips"] += [
                (name, xs(numbers), ys(numbers, f"{name}/generated"), dict(colour=0.2 + 0.5 * i, marker="o")),
                (f"{name}, ceiling", xs(numbers), ys(numbers, f"{name}/ceiling"), dict(colour=0.2 + 0.5 * i, linestyle=":", marker="."))]
    return {title: each for title, each in lines.items() if any(x for _, x, *_ in each)}


def xs(records: list) -> list:
    """Their steps."""
    return [r["step"] for r in records]


def ys(records: list, key: str) -> list:
    """One of their figures; nan where it is missing."""
    return [r.get(key, math.nan) for r in records]


LOGARITHMIC = ("cross-entropy of each codebook (nats)", "cross-entropy (nats)", "gradient norm")


def draw(title: str, lines: list) -> bytes:
    """A chart as PNG, readable at half its size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    figure = Figure(figsize=(4.6, 2.9), dpi=160, layout="constrained")
    axes = figure.subplots()
    for label, x, y, style in lines:
        style = dict(style)
        if "colour" in style:
            style["color"] = colormaps["viridis"](0.85 * style.pop("colour"))
        axes.plot(x, y, label=label, **style)
    positive = any(v > 0 for _, _, y, _ in lines for v in y)
    if title in LOGARITHMIC and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")                       # 2, not 2 x 10^0
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)
    if any(label for label, *_ in lines):
        axes.legend(fontsize=7, ncols=2 if len(lines) > 6 else 1)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# the page


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; } .charts img { width: 100%; background: #fff; border-radius: 4px; }
.clip { border-top: 1px solid #8886; padding: 1rem 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .2rem .5rem; text-align: left; vertical-align: top; font-weight: normal; }
.clip th, .clip figcaption { color: GrayText; } .beside { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin-bottom: .5rem; }
.clip img { display: block; width: 10rem; height: 4rem; border-radius: 4px 4px 0 0; }
.clip audio { display: block; width: 10rem; height: 2.2rem; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; } .tables > div { max-width: 100%; }
.figures th, .figures td { padding: 0 .4rem; }
.figures td, .figures tr:first-child th { text-align: right; font-variant-numeric: tabular-nums; } .settings td { overflow-wrap: anywhere; }
.clip th[scope=row] { position: sticky; left: 0; background: Canvas; }
"""
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"        # no script, nothing from outside


def escape(value) -> str:
    """Text as HTML shows it."""
    return html.escape(str(value))


def read_json(path: Path) -> dict:
    """A json file; {} for one that is missing or damaged: the page shows what there is."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_log(path: Path) -> list:
    """The records of log.jsonl but for a line that is cut."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in records if isinstance(r, dict) and "step" in r]


def charts(records: list, reference: list) -> str:
    """The curves, as figures."""
    if not pictures():
        return ""
    figures = [f'<figure><figcaption>{escape(title)}</figcaption><img alt="{escape(title)}" src="{uri("image/png", draw(title, lines))}">'
               "</figure>" for title, lines in curves(records, reference).items()]
    return f'<div class="charts">{"".join(figures)}</div>'


def figures_table(rows: dict) -> str:
    """{name: {column: number}} as a table."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    show = lambda value: f"{value:.3g}" if isinstance(value, (int, float)) else escape(value)
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{show(row.get(c, str()))}</td>' for c in columns)}</tr>"
                   for name, row in rows.items())
    return f'<div class="scroll"><table class="figures"><tr><th></th>{head}</tr>{body}</table></div>'


def evaluation(records: list) -> str:
    """The last evaluation's figures: of the loss, the distances, caption adherence."""
    if not (found := stage(records, "evaluate")):
        return ""
    last = found[-1]
    named = {"loss": {k: {"value": v} for k, v in last.items() if k.startswith("ce") and isinstance(v, float)},
             "beside validation clips": last.get("distances", {})}
    adherence = last.get("adherence", {})
    named |= {f"captions followed, combinations {title}": adherence[split]
              for split, title in (("valid", "seen in training"), ("heldout", "held out")) if split in adherence}
    tables = [f"<div><h3>{escape(title)}</h3>{figures_table(rows)}</div>" for title, rows in named.items() if rows]
    return f"<h2>Evaluation after epoch {escape(last['epoch'])}</h2><div class='tables'>{''.join(tables)}</div>"


def clip_section(number: int, samples: dict, epochs: list) -> str:
    """A validation clip: its reference, and a column of samples for each epoch."""
    known = next((read_json(found[key].with_suffix(".json")) for found in samples.values() for key in found if key[0] == number), {})

    def cell(folder: str, kind: str) -> str:
        path = samples.get(folder, {}).get((number, kind))
        return player(path, path.stat().st_mtime_ns) if path is not None else ""

    beside = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{cell('reference', kind)}</figure>"
                     for kind, title in REFERENCES.items() if cell("reference", kind))
    head = "".join(f'<th scope="col">{escape(re.sub("_0*", " ", name))}</th>' for name in epochs)
    rows = [f'<tr><th scope="row">{kind}</th>{"".join(f"<td>{cell(e, kind)}</td>" for e in epochs)}</tr>'
            for kind in KINDS if any((number, kind) in samples[e] for e in epochs)]
    title = known.get("prompt") or "(no caption)"
    return (f'<section class="clip"><h3>{number}. {escape(title)}</h3><div class="beside">{beside}</div><div class="scroll"><table>'
            f"<tr><th></th>{head}</tr>{''.join(rows)}</table></div></section>")


def listening(out: Path) -> str:
    """The grid of players: clips down, epochs across."""
    samples = read_samples(out)
    if not samples:
        return ""
    epochs = shown_epochs(list(samples))
    left_out = len([n for n in samples if n != "reference"]) - len(epochs)
    legend = "; ".join(f"<b>{kind}</b> {escape(what)}" for kind, what in KINDS.items())
    note = f" {left_out} more epochs lie in samples/." if left_out else ""
    numbers = sorted({number for found in samples.values() for number, _ in found})
    return (f"<h2>Listen</h2><p>{legend}. The same seed in every epoch; {LUFS:g} LUFS (ITU-R BS.1770-4).{note}</p>"
            + "".join(clip_section(n, samples, epochs) for n in numbers))


def settings(config: dict) -> str:
    """Every flag, folded away."""
    rows = dict(config.get("args", {}), parameters=config.get("parameters"), codec=config.get("codec", {}).get("name"),
                torch=config.get("torch"))
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f'<details><summary>Settings</summary><table class="settings">{body}</table></details>'


def render(out: Path) -> str:
    """The page of a run folder. Errors: OSError, ValueError where a sample cannot be read."""
    config, records = read_json(out / "config.json"), read_log(out / "log.jsonl")
    args = config.get("args", {})
    done = records[-1] if records else {}
    best = min((r["ce"] for r in stage(records, "valid")), default=None)
    state = f"epoch {done.get('epoch', 0)} of {args.get('epochs', '?')}, update {done.get('step', 0)}"
    state += f", best validation cross-entropy {best:.4f}" if best is not None else ""
    name = escape(out.resolve().name)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title><style>{STYLE}</style></head>'
            f"<body><h1>{name}</h1><p>{escape(state)}</p>{settings(config)}<h2>Training</h2>"
            f"{charts(records, reference_curve(args))}{evaluation(records)}{listening(out)}</body></html>\n")


def write(out: Path) -> Path:
    """Writes index.html into a run folder -> its path. Errors: OSError, ValueError."""
    path = Path(out) / NAME
    path.with_suffix(".tmp").write_text(render(Path(out)), "utf-8")
    os.replace(path.with_suffix(".tmp"), path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def open_board(out: Path, step: int):
    """A TensorBoard writer below a run folder; what a killed run wrote after `step` is hidden. Errors: ValueError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the tensorboard package: pip install tensorboard (or leave the flag out)") from None
    return SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else None)


def show_record(board, record: dict) -> None:
    """A record's numbers under the names that log.jsonl has: "step/train/ce_q1", "stage/evaluate/distances/fad_mel/generated"."""
    for name, value in flat(record).items():
        if name not in ("epoch", "step"):
            board.add_scalar(f"{record['kind']}/{record['stage']}/{name}", value, record["step"])
    board.flush()


def show_sample(board, name: str, path: Path, step: int) -> None:
    """A sample's sound and spectrogram."""
    wav, rate = audio.read_audio(path, channels=1), audio.audio_info(path).sample_rate
    board.add_audio(name, wav, step, rate)
    board.add_image(name, spectrogram(wav, rate)[None], step)


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the page of a run folder.", allow_abbrev=False)
    parser.add_argument("run", help="run folder")
    args = parser.parse_args(argv)
    try:
        if not Path(args.run, "config.json").is_file():
            raise ValueError(f"{args.run}: no config.json there; give the folder of a run")
        print(f"wrote {write(Path(args.run))}")
    except (ValueError, OSError) as error:
        print(f"page.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
