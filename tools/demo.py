"""A page to try a model in the browser: the conditions that it knows, the settings of sampling, a player.

`perform` is what happens behind the button, and needs no page; gradio draws the page and runs the queue (one clip at a time).
The page is for this machine alone unless --host says otherwise; results lie in a folder that goes with the server.

Legend: C channels, N samples.
    pip install "gradio>=6"
    python generate.py --run runs/NAME --serve                       http://127.0.0.1:7860
"""

import dataclasses
import math
import os
import tempfile
from pathlib import Path

from torch import Tensor

from support import audio
from conditioning import clean_text

MOST_SECONDS = 300                                                   # of a clip: others wait for it; the command line goes to an hour
UPLOAD = "100mb"                                                     # the largest melody or style file
WHOLE = ("top_k", "seed")                                            # numbers without a fraction
LABELS = dict(text="Prompt (empty: none)", melody="Melody to follow", style="Style to take", seconds="Seconds",
              cfg="Guidance (1: none)", cfg_style="Guidance of the text beside melody or style (1: none)",
              temperature="Temperature (0: the likeliest)", top_k="Top-k (0: all)", top_p="Top-p (0: off)", seed="Seed")


def settings(music, seconds: float | None = None, seed: int = 0) -> dict:
    """The fields of the page for a generate.MusicGenerator and what they hold at first: its conditions, then numbers."""
    names = music.model.conditioner.names if music.model.conditioner is not None else []
    conditions = {name: None for name in ("text", "melody", "style") if name in names}
    sampling = dataclasses.asdict(music.sampling)
    if "text" not in names or len(names) < 2:
        del sampling["cfg_style"]                                    # nothing for the text to stand beside
    return conditions | {"seconds": seconds or round(music.window / music.codec.frame_rate, 2)} | sampling | {"seed": seed}


def number(name: str, value) -> float | int:
    """A field's number. Errors: ValueError for an empty one, or a fraction where none makes sense."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or name in WHOLE and value != int(value):
        raise ValueError(f"{name} {'is empty' if value is None else value}: give a {'whole ' if name in WHOLE else ''}number")
    return int(value) if name in WHOLE else float(value)


def perform(music, asked: dict, progress=None) -> Tensor:
    """Audio [C,N] of a generate.MusicGenerator for the fields of `settings`: a text, paths of audio files, numbers.

    The same as the command line makes of the same. Errors: ValueError says in one line what is wrong."""
    values = {name: number(name, value) for name, value in asked.items() if name not in ("text", "melody", "style")}
    seconds, seed = values.pop("seconds"), values.pop("seed")
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"seconds {seconds:g}: more than 0, at most {MOST_SECONDS}")
    if not 0 <= seed < 2 ** 63:
        raise ValueError(f"seed {seed}: it lies between 0 and 2^63")
    sampling, codec, given = dataclasses.replace(music.sampling, **values), music.codec, {}
    for name in ("melody", "style"):
        if path := asked.get(name):
            try:
                given[name] = audio.read_audio(path, sample_rate=codec.sample_rate, channels=codec.channels)
                music.attributes([None], **{name: given[name]})      # refuses what holds none
            except ValueError as error:
                raise ValueError(f"{name}: {str(error).replace(path, Path(path).name)}") from None
    return music.generate([clean_text(asked.get("text")) or None], seconds, seed, sampling, progress=progress, **given)[0]


def find_gradio():
    """The gradio package. Errors: ValueError with the command that gets it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"                 # read when it is imported
    try:
        import gradio
    except ImportError:
        raise ValueError('--serve needs the gradio package: pip install "gradio>=6"') from None
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ValueError(f'--serve needs gradio 6 or later, not {gradio.__version__}: pip install -U "gradio>=6"')
    return gradio


def build(gradio, music, folder: str, title: str, **first):
    """The page, a gradio.Interface; the newest result is written to a folder, from where gradio takes it. first: as `settings` takes."""
    fields = settings(music, **first)

    def act(*values, progress=gradio.Progress()):
        try:
            wav = perform(music, dict(zip(fields, values)), lambda done, total: progress((done, total)))
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        audio.write_audio(path := f"{folder}/music.wav", wav, music.codec.sample_rate)
        return path

    def component(name: str, value):
        if name == "text":
            return gradio.Textbox(label=LABELS[name], lines=2)
        if name in ("melody", "style"):
            return gradio.Audio(label=LABELS[name], type="filepath", sources=["upload", "microphone"], buttons=["download"])
        return gradio.Number(value, label=LABELS[name])

    player = gradio.Audio(label="Music", type="filepath", buttons=["download"])                          # no button that shares
    return gradio.Interface(act, [component(*field) for field in fields.items()], player, title=title, submit_btn="Generate",
                            flagging_mode="never", analytics_enabled=False, api_name="generate",
                            delete_cache=(3600, 3600))               # uploads and results are forgotten after an hour (seconds)


def serve(gradio, music, host: str, port: int, title: str, **first) -> None:
    """Shows the page until Ctrl-C. first: as `settings` takes. Errors: ValueError where the address cannot be had."""
    if not 0 < port < 1 << 16:
        raise ValueError(f"--port {port}: it lies between 1 and 65535")
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    with tempfile.TemporaryDirectory() as folder:
        page = build(gradio, music, folder, title, **first)
        try:
            page.launch(server_name=host, server_port=port, share=False, quiet=True, max_file_size=UPLOAD, ssr_mode=False,
                        footer_links=["api"], prevent_thread_lock=True,
                        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]))  # none from elsewhere
        except OSError:                                              # gradio's names its own settings
            raise ValueError(f"--host {host} --port {port}: in use, or not of this machine; give another") from None
        print(f"serving {title} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        page.block_thread()
