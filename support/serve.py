"""A page to try a model in the browser: the conditions that it knows, the settings of sampling, its takes.

support/takes.py is what happens behind the buttons, and needs no page; gradio draws the page and runs the
queue, one clip at a time; nothing of its API goes past the queue. The page is for this machine alone unless
--host says otherwise. Where ffmpeg is installed, music plays while it is generated. Uploads and results lie
in a folder that goes with the server, each result under a name of its own; a visitor's list of takes is
that visitor's alone.

    pip install "gradio>=6"
    python generate.py --run runs/NAME --serve                       http://127.0.0.1:7860
"""

import argparse
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from html import escape

from torch import Tensor

from conditioning import CONDITIONS
from support import audio
from support.stream import in_background
from support.takes import (MAX_CLIP_SECONDS, MAX_TAKES, Take, example_captions, is_toy_run, make_take,
                           page_fields, plan_takes, plan_to_go_on, visit_html)

UPLOAD = "100mb"                               # the largest audio file
NEW_SEEDS = 1 << 31                            # that "Again" draws from: JavaScript keeps them exactly
LABELS = dict(seconds="Seconds", cfg="Guidance (1: none)",
              cfg_style="Guidance of the text beside other conditions (1: none)",
              temperature="Temperature (0: the likeliest)", top_k="Top-k (0: all)", top_p="Top-p (0: off)",
              seed="Seed")
# the page is one column on a phone; its colors are the theme's, light or dark
STYLE = """
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 1rem;
       margin-bottom: 1rem }
.row:empty { display: none }
.take { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem; min-width: 0 }
.take h3 { margin: 0 0 .4rem; overflow-wrap: anywhere; font-size: 1rem }
.take img { width: 100%; height: 7rem; border-radius: 4px; display: block }
.take audio { width: 100%; margin: .5rem 0 }
.take p { margin: .2rem 0; overflow-wrap: anywhere }
.take a { padding: .3rem }
.take button { width: 100%; margin-top: .5rem; padding: .4rem; border-radius: 6px; cursor: pointer;
               background: var(--button-secondary-background-fill);
               color: var(--button-secondary-text-color) }
.take table { width: auto; margin-top: .4rem; font-size: .875rem }
.take caption { text-align: left; padding-bottom: .2rem }
.take table :is(th, td) { padding: .15rem .4rem; border-color: var(--border-color-primary) }
"""
# of the takes: a button says of which it is; the player of what is being made, which begins by itself, stays
# silent while a take plays, unless the pointer or the keyboard is there
SCRIPT = """
element.addEventListener('click', event => {
    const button = event.target.closest('button')
    if (button) trigger('click', {path: button.value})
})
document.addEventListener('play', event => {
    const takes = [...element.querySelectorAll('audio')]
    if (!takes.includes(event.target) && takes.some(take => !take.paused) &&
        !event.target.matches(':hover, :focus')) event.target.pause()
}, true)
"""


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


def slider_ranges(music, fields: dict) -> dict:
    """{name: (lowest, highest, step)} of the sliders, wide enough for the first values of `fields`.

    A narrower range than Sampling allows, where music is; of the seconds, twenty windows or a minute."""
    window_seconds = music.window / music.codec.frame_rate
    ranges = dict(seconds=(0.1, min(MAX_CLIP_SECONDS, max(60, 20 * round(window_seconds))), 0.1),
                  cfg=(0, 10, 0.1), cfg_style=(0, 10, 0.1), temperature=(0, 2, 0.05),
                  top_k=(0, music.codec.card, 1), top_p=(0, 1, 0.01))
    return {name: (min(low, fields[name]), max(high, fields[name]), step)
            for name, (low, high, step) in ranges.items() if name in fields}


def make_field(gradio, name: str, value, ranges: dict):
    """The component of a field of `page_fields`: a slider where `ranges` has one, else of its kind."""
    if name in ranges:
        low, high, step = ranges[name]
        return gradio.Slider(low, high, value, step=step, label=LABELS[name])
    if name not in CONDITIONS:
        return gradio.Number(value, label=LABELS[name])
    condition = CONDITIONS[name]
    if condition.widget == "text":
        return gradio.Textbox(label=condition.label, lines=1, max_lines=4)
    if condition.widget == "audio":
        return gradio.Audio(label=condition.label, type="filepath", sources=["upload", "microphone"],
                            buttons=["download"])
    return gradio.Number(value, label=condition.label)


class Performer:
    """Makes the takes that a page asks for, and says what its outputs show."""

    def __init__(self, gradio, music, args: argparse.Namespace, folder: str):
        """args: flags of generate.py; folder: where results are written."""
        self.gradio, self.music, self.args, self.folder = gradio, music, args, folder
        self.is_toy = is_toy_run(args.run)
        self.is_live = shutil.which("ffmpeg") is not None       # by which gradio makes what browsers stream
        self.written = set()                                    # results, which gradio shall forget

    def perform(self, plan: Callable, visit: list, progress, before: Take | None = None) -> Iterator:
        """What the outputs show: pieces while it is generated, each take when it is done.

        plan: gives what is asked for, as `plan_takes` does; visit: the takes so far; before: what goes on.
        Errors: gradio's, of which the page shows one line."""
        try:
            yield from self.produce(plan(), visit, progress, before)
        except (ValueError, OSError) as error:
            raise self.gradio.Error(str(error), print_exception=False) from None

    def produce(self, plan: list, visit: list, progress, before: Take | None) -> Iterator:
        """As `perform`. Errors: ValueError, OSError."""
        gradio, takes = self.gradio, []

        def work(put: Callable) -> None:
            for i, (asked, number) in enumerate(plan):
                def report(done, total, i=i):
                    progress((i * total + done, len(plan) * total))

                put(make_take(self.music, self.args, self.folder, asked, number, before, self.is_toy,
                              progress=report, remark=gradio.Warning if i == 0 else lambda line: None,
                              hear=put if self.is_live else None))

        for found in in_background(work):
            if isinstance(found, Tensor):                              # the next piece
                wav, rate = audio.to_16_bits(found), self.music.codec.sample_rate
                yield audio.encode_audio(wav, rate, "wav", "PCM_16"), *[gradio.skip()] * 3
                continue
            takes.append(found)
            files = [str(path) for take in takes for path in (take.path, take.path.with_suffix(".json"))]
            self.written.update(files)
            outputs = [f"{len(takes)} of {len(plan)} done", [takes, *visit], files]
            yield [gradio.skip(), *outputs] if self.is_live else outputs


def build_page(gradio, music, args: argparse.Namespace, folder: str):
    """The page, a gradio.Blocks; results are written to a folder, from where gradio takes them.

    args: flags of generate.py, whose run, seconds and seed it begins with."""
    fields = page_fields(music, args.seconds, args.seed)
    ranges, captions = slider_ranges(music, fields), example_captions(args.run)
    performer = Performer(gradio, music, args, folder)
    is_live = performer.is_live

    def act(*values, progress=gradio.Progress()):
        *values, second, count, visit = values
        plan = partial(plan_takes, dict(zip(fields, values)), second, count)
        yield from performer.perform(plan, visit, progress)

    # uploads and results are forgotten after an hour; gradio must be told which files are results
    page = gradio.Blocks(title=args.run, analytics_enabled=False, delete_cache=(3600, 3600))
    page.temp_file_sets.append(performer.written)
    with page:
        visit = gradio.State([])                                       # rows of takes, the newest first
        gradio.HTML(f"<h1>Music from {escape(args.run)}</h1>")
        with gradio.Row():
            with gradio.Column():
                inputs = {name: make_field(gradio, name, value, ranges) for name, value in fields.items()
                          if name in CONDITIONS}
                texts = [box for name, box in inputs.items() if CONDITIONS[name].is_text]
                second = gradio.Textbox("", label="A second prompt to compare, at the same seed",
                                        lines=1, max_lines=4, visible=bool(texts))
                if texts and captions:
                    gradio.Examples([[text] for text in captions], texts, label="For example",
                                    api_visibility="private")
            with gradio.Column():
                inputs |= {name: make_field(gradio, name, value, ranges) for name, value in fields.items()
                           if name not in inputs}
                count = gradio.Slider(1, MAX_TAKES, 1, step=1, label="Takes of each prompt, side by side")
        with gradio.Row():
            generate = gradio.Button("Generate", variant="primary")
            again = gradio.Button("Again, with a new seed")
        live = gradio.Audio(label="While it is generated", streaming=True, autoplay=True, buttons=[],
                            visible=is_live)
        status = gradio.Markdown("", label="Status", min_height=60)
        # what the API returns
        files = gradio.File(file_count="multiple", visible=False)

        outputs = [live, status, visit, files] if is_live else [status, visit, files]
        # one at a time, whichever button asks
        calls = dict(outputs=outputs, concurrency_id="model", concurrency_limit=1, show_progress_on=[status])
        asked = [*inputs.values(), second, count, visit]
        generate.click(act, asked, api_name="generate", **calls)
        for box in (*texts, second):
            box.submit(act, asked, api_visibility="private", **calls)
        drawn = again.click(lambda: secrets.randbelow(NEW_SEEDS), None, inputs["seed"],
                            api_visibility="private")
        drawn.then(act, asked, api_visibility="private", **calls)

        def go_on(visit, event: gradio.EventData, progress=gradio.Progress()):
            take = next(take for row in visit for take in row if str(take.path) == event.path)
            yield from performer.perform(partial(plan_to_go_on, take), visit, progress, take)

        shown = gradio.HTML(visit_html([]), js_on_load=SCRIPT)
        visit.change(visit_html, visit, shown, show_progress="hidden", api_visibility="private")
        shown.click(go_on, [visit], api_visibility="private", **calls)
    return page.queue(api_open=False)          # a model makes one clip at a time


def serve(gradio, music, args: argparse.Namespace) -> None:
    """Shows the page until Ctrl-C. args: flags of generate.py. Errors: ValueError for the address."""
    host, port = args.host or "127.0.0.1", 7860 if args.port is None else args.port
    if not 0 < port < 1 << 16:
        raise ValueError(f"--port {port}: it lies between 1 and 65535")
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    # fonts of this machine: none is fetched
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with tempfile.TemporaryDirectory(dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder                         # of uploads, and of what it forgets
        page = build_page(gradio, music, args, folder)
        try:
            page.launch(server_name=host, server_port=port, share=False, quiet=True, max_file_size=UPLOAD,
                        ssr_mode=False, footer_links=["api"], prevent_thread_lock=True, theme=theme,
                        css=STYLE)
        except OSError:                                              # gradio's message names its own settings
            raise ValueError(f"--host {host} --port {port}: in use, or not of this machine; "
                             "give another") from None
        print(f"serving {args.run} at http://{host}:{port} (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
