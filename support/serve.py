"""A page to try a model in the browser: the conditions that it knows, the settings of sampling, a player.

`perform` is what happens behind the button, and needs no page; gradio draws the page and runs the queue, one
clip at a time; nothing of its API goes past the queue. The page is for this machine alone unless --host says
otherwise. Where ffmpeg is installed, music plays while it is generated. Uploads and results lie in a folder
that goes with the server, each result under a name of its own.

Legend: C channels, N samples.
    pip install "gradio>=6"
    python generate.py --run runs/NAME --serve                       http://127.0.0.1:7860
"""

import argparse
import dataclasses
import math
import os
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from conditioning import CONDITIONS
from support import audio
from support.stream import in_background

MAX_CLIP_SECONDS = 300                       # of a clip: others wait for it; the command line goes to an hour
UPLOAD = "100mb"                               # the largest audio file
WHOLE = ("top_k", "seed")                      # numbers without a fraction
LABELS = dict(seconds="Seconds", cfg="Guidance (1: none)",
              cfg_style="Guidance of the text beside other conditions (1: none)",
              temperature="Temperature (0: the likeliest)", top_k="Top-k (0: all)", top_p="Top-p (0: off)",
              seed="Seed")


def page_fields(music, seconds: float | None = None, seed: int = 0) -> dict:
    """The fields of the page for a generate.MusicGenerator and their first values."""
    conditions = {name: None for name in CONDITIONS if name in music.conditions}
    sampling = dataclasses.asdict(music.sampling)
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


def perform(music, asked: dict, progress=None, remark=lambda line: None, hear=None) -> Tensor:
    """Audio [C, N] of a generate.MusicGenerator for the fields of `page_fields`.

    The same as the command line makes of the same. remark: is called with each line on what the model does
    not follow of it. hear: gets the audio piece by piece while it is generated. Errors: ValueError says in
    one line what is wrong."""
    numbers = {name: check_number(name, value) for name, value in asked.items()
               if name not in CONDITIONS or CONDITIONS[name].widget == "number" and value is not None}
    seconds, seed = numbers.pop("seconds"), numbers.pop("seed")
    if not 0 < seconds <= MAX_CLIP_SECONDS:
        raise ValueError(f"seconds {seconds:g}: more than 0, at most {MAX_CLIP_SECONDS}")
    if not 0 <= seed < 2 ** 63:
        raise ValueError(f"seed {seed}: it lies between 0 and 2^63")
    values = {}
    for name, condition in music.conditions.items():
        given = numbers.pop(name, asked.get(name))
        try:
            values[name] = None if given in (None, "") else condition.from_user(given, music.codec)
        except ValueError as error:
            file = f"{Path(given).name}: " if condition.widget == "audio" else ""
            raise ValueError(f"{name}: {file}{error}") from None
        for line in [] if values[name] is None else condition.remarks(values[name]):
            remark(line)
    sampling = dataclasses.replace(music.sampling, **numbers)
    codes = music.codes([values], seconds, seed, sampling, progress=progress, hear=hear)
    return music.decode(codes, seconds)[0]


def check_serve_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Errors: ValueError for flags of generate.py that the page has no use for."""
    unused = ["prompt", "prompts", "unconditional", "continued", "stride", "first", "n", "out"]
    for name, condition in CONDITIONS.items():
        unused += [] if condition.is_text else [name]
        unused += [flag.name for flag in condition.generate_flags]
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            flag = "continue" if name == "continued" else name
            raise ValueError(f"--{flag} does not go with --serve: the page asks for what it takes")
    if args.seconds is not None and args.seconds > MAX_CLIP_SECONDS:
        raise ValueError(f"--seconds {args.seconds:g} with --serve: at most {MAX_CLIP_SECONDS}")


def import_gradio():
    """The gradio package. Errors: ValueError with the command that gets it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"                 # read when it is imported
    try:
        import gradio
    except ImportError:
        raise ValueError('--serve needs the gradio package: pip install "gradio>=6"') from None
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ValueError(f"--serve needs gradio 6 or later, not {gradio.__version__}: "
                         'pip install -U "gradio>=6"')
    return gradio


def build_page(gradio, music, folder: str, title: str, **first):
    """The page, a gradio.Interface; results are written to a folder, from where gradio takes them.

    first: as `page_fields` takes."""
    fields = page_fields(music, **first)
    is_live = shutil.which("ffmpeg") is not None       # by which gradio makes what browsers stream

    def act(*values, progress=gradio.Progress()):
        def work(put):
            wav = perform(music, dict(zip(fields, values)), lambda done, total: progress((done, total)),
                          gradio.Warning, put if is_live else None)
            path = f"{tempfile.mkdtemp(dir=folder)}/music.wav"         # no other request's
            audio.write_audio(path, wav, music.codec.sample_rate)
            put(path)

        try:
            for found in in_background(work):
                if isinstance(found, Tensor):                          # the next piece
                    samples = audio.to_16_bits(found)
                    yield audio.encode_audio(samples, music.codec.sample_rate, "wav", "PCM_16"), None
                else:
                    yield (None, found) if is_live else found
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def component(name: str, value):
        if name not in CONDITIONS:
            return gradio.Number(value, label=LABELS[name])
        condition = CONDITIONS[name]
        if condition.widget == "text":
            return gradio.Textbox(label=condition.label, lines=2)
        if condition.widget == "audio":
            return gradio.Audio(label=condition.label, type="filepath", sources=["upload", "microphone"],
                                buttons=["download"])
        return gradio.Number(value, label=condition.label)

    players = [gradio.Audio(label="Music", type="filepath", buttons=["download"])]     # no button that shares
    if is_live:
        live = gradio.Audio(label="While it is generated", streaming=True, autoplay=True, buttons=[])
        players.insert(0, live)
    # uploads and results are forgotten after an hour
    page = gradio.Interface(act, [component(*field) for field in fields.items()], players, title=title,
                            submit_btn="Generate", flagging_mode="never", analytics_enabled=False,
                            api_name="generate", delete_cache=(3600, 3600))
    return page.queue(api_open=False)          # a model makes one clip at a time


def serve(gradio, music, host: str, port: int, title: str, **first) -> None:
    """Shows the page until Ctrl-C. first: as `page_fields` takes. Errors: ValueError for the address."""
    if not 0 < port < 1 << 16:
        raise ValueError(f"--port {port}: it lies between 1 and 65535")
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    # fonts of this machine: none is fetched
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with tempfile.TemporaryDirectory(dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder                         # of uploads, and of what it forgets
        page = build_page(gradio, music, folder, title, **first)
        try:
            page.launch(server_name=host, server_port=port, share=False, quiet=True, max_file_size=UPLOAD,
                        ssr_mode=False, footer_links=["api"], prevent_thread_lock=True, theme=theme)
        except OSError:                                              # gradio's message names its own settings
            raise ValueError(f"--host {host} --port {port}: in use, or not of this machine; "
                             "give another") from None
        print(f"serving {title} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
