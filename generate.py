"""Music from a trained model: sampling with classifier-free guidance, continuation, lengths past the training window.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.2 and 3.1. The pattern is walked step by step; each step's codes are sampled
from the K heads and written into the cells that are still open. Guided and unguided rows go through in one batch:

    logits = unguided + cfg * (guided - unguided)            (Ho & Salimans 2022; cfg 1 needs no unguided half)

A text beside a style (or a melody) is drowned by it, which says more. Double guidance (Rouard et al. 2024, arXiv:2407.12563,
sec. 3) pushes the text further: with rows for everything, for all but the text, and for nothing,

    logits = nothing + cfg * (style + cfg_style * (text and style - style) - nothing)        (cfg_style 1 is the line above)

Longer than the training window: a first window, then windows whose beginning is the end of the one before. A melody is read on
in each from where it begins, and begins again after its end.

    |------- window -------|
              |-- prompt --|-- stride --|
                           |-- prompt --|-- stride --|

Legend: B batch, K codebooks, T frames, S sequence steps, C channels, N samples.
    python generate.py --run runs/NAME --prompt "a slow organ tune" --seconds 8 --n 4
    python generate.py --run runs/NAME --serve                                   a page in the browser, see demo.py
    python generate.py --run runs/NAME --prompt "fast bells" --melody tune.wav --style track.wav --cfg_style 3
    from generate import MusicGenerator
    music = MusicGenerator.load("runs/NAME")
    wav = music.generate(["a slow organ tune", "fast bells"], seconds=4)         # [2, C, N] at music.codec.sample_rate
"""

import argparse
import contextlib
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support import audio, chroma, common
import tokenizer
from conditioning import clean_text, excerpt, melody_window
from interop.load import build_model, read_model
from model import Conditions, MusicGen
from support.compiled import compile_step
from support.kernels import packed_weights


@dataclass
class Sampling:
    """How codes are drawn. temperature 0: the most likely code. top_p (if over 0) goes before top_k (if over 0)."""
    cfg: float = 3.0
    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    cfg_style: float = 1.0                                           # of the text beside a style or melody; 1 is none

    def __post_init__(self):
        for name, value, low, high in (("cfg", self.cfg, -100, 100), ("temperature", self.temperature, 0, 100),
                                       ("top_k", self.top_k, 0, 1 << 20), ("top_p", self.top_p, 0, 1),
                                       ("cfg_style", self.cfg_style, -100, 100)):
            if not low <= value <= high:                             # also refuses NaN
                raise ValueError(f"{name} {value}: it lies between {low} and {high}")


def sample_codes(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """logits [...,card] -> codes [...]. The draw is argmax(p / exponential noise): no trip to the host."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, codes = logits.float() / sampling.temperature, None
    if sampling.top_p > 0:
        probs, codes = logits.softmax(-1).sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs > sampling.top_p, 0)      # the first always stays
    elif sampling.top_k > 0:
        top, codes = logits.topk(min(sampling.top_k, logits.shape[-1]), -1)          # exactly k, ties or not
        probs = top.softmax(-1)
    else:
        probs = logits.softmax(-1)
    drawn = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
    return drawn if codes is None else codes.gather(-1, drawn[..., None])[..., 0]


@torch.inference_mode()
def generate_codes(model: MusicGen, attributes: list, T: int, sampling: Sampling, generator: torch.Generator | None = None,
                   prompt: Tensor | None = None, progress=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes [B,K,T] for a list of B conditions ({name: value or None}).

    prompt [B,K,T'] with T' < T is kept as it is and continued; progress(done, total) is called after every step;
    dtype: of autocast and of the key-value cache. The model is put into eval mode for the while."""
    device, K, B = model.emb[0].weight.device, model.config.K, len(attributes)
    T_prompt = 0 if prompt is None else prompt.shape[2]
    assert T_prompt < T, f"a prompt of {T_prompt} frames leaves nothing to generate in {T}"
    pattern = model.config.layout(T).to(device)
    codes = torch.full((B, K, T), model.special, device=device)
    if prompt is not None:
        codes[..., :T_prompt] = prompt
    seq = pattern.build(codes, model.special, valid_only=False)                                         # [B, K, S]
    is_open = pattern.frame >= T_prompt                                                                 # [K, S]
    heads = [row.nonzero()[:, 0].tolist() for row in is_open.T.cpu()]                                   # of every step

    was_training = model.training
    model.eval()
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with autocast:
        guided, beta = guidance(attributes, sampling, device)
        rows = 1 + guided + (beta is not None)                       # of each sample
        conditions = encode_conditions(model, attributes, guided, beta is not None)
        P = 0 if conditions.prefix is None else conditions.prefix.shape[1]
        cache = model.cache_class(model.config, B * rows, P + pattern.S, device, dtype)
    packing = packed_weights(0 if model.compiled else B * rows)  # a compiled step packs its weights itself
    with autocast, packing:
        first = pattern.first_step(T_prompt)
        for s in range(first, pattern.S):
            which = heads[s] if 0 < len(heads[s]) < K else None      # None: all
            if s == first:
                x = model.hidden(seq[..., :s].repeat(rows, 1, 1), conditions, cache)                    # [rows*B, s, D]
                logits = model.heads(x[:, -1:], which)  # [rows*B, k, 1, card]
            else:
                logits = model.decode_step(seq[..., s - 1:s].repeat(rows, 1, 1), cache, which)
            if heads[s]:
                logits = logits[:, :, 0].float()
                full, *others = logits.chunk(rows)
                if beta is not None:
                    style = others.pop(0)
                    full = style + beta * (full - style)
                null = others[0] if guided else full
                logits = null + sampling.cfg * (full - null) if guided else full
                seq[:, slice(None) if which is None else which, s] = sample_codes(logits, sampling, generator)
            if progress is not None:
                progress(s - first + 1, pattern.S - first)
    model.train(was_training)
    codes, found = pattern.revert(seq, -1)
    assert found.all() and codes.max() < model.config.card, "some codes were not generated"
    return codes                                                                                        # [B, K, T]


def guidance(attributes: list, sampling: Sampling, device) -> tuple[bool, Tensor | None]:
    """(whether unguided rows are needed, the second coefficient [B,1,1] or None): it is 1 where text stands alone, or is missing."""
    guided = sampling.cfg != 1 and any(v is not None for a in attributes for v in a.values())
    both = [a.get("text") is not None and any(v is not None for k, v in a.items() if k != "text") for a in attributes]
    if sampling.cfg_style == 1 or not any(both):
        return guided, None
    return guided, torch.tensor([sampling.cfg_style if x else 1.0 for x in both], device=device)[:, None, None]


def encode_conditions(model: MusicGen, attributes: list, guided: bool, double: bool = False) -> Conditions:
    """Conditions of the batch; if `double`, then as many without their texts; if `guided`, then as many null ones."""
    if model.conditioner is None:
        return Conditions()
    textless = [{**a, "text": None} for a in attributes] if double else []
    nulls = [dict.fromkeys(a) for a in attributes] if guided else []
    return model.conditioner(model.conditioner.prepare(attributes + textless + nulls, model.emb[0].weight.device))


def at_window(model: MusicGen, attributes: list, start: int) -> list:
    """The conditions of a window that begins at a code frame: melodies from there on, as long as a training segment."""
    if model.conditioner is None or "melody" not in model.conditioner.names:
        return attributes
    c = model.conditioner.config
    return [a if a.get("melody") is None else
            {**a, "melody": melody_window(torch.as_tensor(a["melody"]), round(start * c.melody_rate), c.melody_frames)}
            for a in attributes]


def generate_long(model: MusicGen, attributes: list, T: int, sampling: Sampling, window: int, stride: int,
                  generator: torch.Generator | None = None, prompt: Tensor | None = None, progress=None,
                  dtype: torch.dtype = torch.float32, began: int = 0) -> Tensor:
    """As `generate_codes`, for any T: windows of `window` frames, each after the first advancing by `stride`.

    The prompt counts in T; melodies are read from frame `began` on. Errors: ValueError if the stride does not leave a prompt, or
    the prompt fills a window."""
    if not 0 < stride < window:
        raise ValueError(f"stride {stride} frames: it lies between 1 and the window of {window} frames less 1")
    if prompt is not None and T > window and prompt.shape[2] > window - stride:
        prompt, early = prompt[..., -(window - stride):], prompt[..., :-(window - stride)]
        rest = generate_long(model, attributes, T - early.shape[2], sampling, window, stride, generator, prompt, progress,
                             dtype, early.shape[2])
        return torch.cat([early.to(rest.device), rest], 2)
    codes, done, total = prompt, 0, T if prompt is None else T - prompt.shape[2]
    while done < total:
        kept = codes if done == 0 else codes[..., -(window - stride):]
        frames = min(window, (0 if kept is None else kept.shape[2]) + total - done)

        def report(step, steps, done=done, new=frames - (0 if kept is None else kept.shape[2])):
            progress(done + new * step // steps, total)

        start = began if done == 0 else began + codes.shape[2] - kept.shape[2]
        part = generate_codes(model, at_window(model, attributes, start), frames, sampling, generator, kept,
                              report if progress else None, dtype)
        new = part[..., 0 if kept is None else kept.shape[2]:]
        codes = new if codes is None else torch.cat([codes.to(new.device), new], 2)
        done += new.shape[2]
    return codes                                                                                        # [B, K, T]


class MusicGenerator:
    """A trained model with its codec: `generate` gives audio, `codes` the codes behind it."""

    def __init__(self, model: MusicGen, codec, window: int, sampling: Sampling, dtype: torch.dtype = torch.float32):
        self.model, self.codec, self.window, self.sampling, self.dtype = model, codec, window, sampling, dtype

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu", codec: str | None = None, dtype: torch.dtype = torch.float32):
        """From a run folder, a best.pt, or a folder with published weights. codec: where its codec lies now, if not where it was in
        training."""
        data = read_model(run)
        try:
            model, window, sampling = build_model(data), data["segment_frames"], Sampling(**data["sampling"])
            stored = dict(channels=1, levels=data["codec"]["K"]) | data["codec"]         # older files: mono
            name, levels, channels, fingerprint = (stored[key] for key in ("name", "levels", "channels", "fingerprint"))
            assert window > 0, f"a window of {window} frames"
        except Exception as error:                                   # a foreign file can fail in any way
            raise ValueError(f"{run}: not {common.MODEL_FILE}, or damaged ({common.describe_error(error)})") from None
        loaded = tokenizer.load_codec(codec or name, levels, device, channels)
        if loaded.fingerprint != fingerprint:
            raise ValueError(f"codec {codec or name} has fingerprint {loaded.fingerprint[:12]}, the model was trained on codes "
                             f"of {fingerprint[:12]}: give that codec by --codec")
        if (model.config.K, model.config.card) != (loaded.K, loaded.card):
            raise ValueError(f"{run}: makes {model.config.K} x {model.config.card} codes, its codec has "
                             f"{loaded.K} x {loaded.card}: the file is damaged")
        return cls(model.to(device), loaded, window, sampling, dtype)

    def codes(self, attributes: list, seconds: float, seed: int = 0, sampling: Sampling | None = None,
              stride_seconds: float | None = None, prompt: Tensor | None = None, progress=None) -> Tensor:
        """Codes [B,K,T] for conditions as `attributes` gives them; prompt: audio [C,N] or [B,C,N] to continue, counted in
        `seconds`; stride: how far each window past the training length advances (default 60 % of it)."""
        T = max(1, round(seconds * self.codec.frame_rate))
        device = self.model.emb[0].weight.device
        if prompt is not None:
            prompt = prompt if prompt.dim() == 3 else prompt[None].expand(len(attributes), -1, -1)
            prompt = self.codec.encode(prompt.to(device))
            if prompt.shape[2] >= T:
                raise ValueError(f"the audio to continue lasts {prompt.shape[2] / self.codec.frame_rate:.2f} s, so "
                                 f"--seconds must be longer than that, not {seconds:g}")
        window_seconds = self.window / self.codec.frame_rate
        if stride_seconds is not None and not 0 < stride_seconds < window_seconds:
            raise ValueError(f"--stride {stride_seconds:g}: more than 0, less than the window of {window_seconds:g} s")
        stride = 0.6 * self.window if stride_seconds is None else round(stride_seconds * self.codec.frame_rate)
        stride = max(1, min(int(stride), self.window - 1))           # frames
        generator = torch.Generator(device).manual_seed(seed)
        return generate_long(self.model, attributes, T, sampling or self.sampling, self.window, stride, generator, prompt,
                             progress, self.dtype)

    def attributes(self, prompts: list, melody=None, style=None) -> list:
        """Conditions [{name: value or None}] of texts (None: without). melody, style: audio [C,N] at the codec's rate for all, or
        a list of such and None. Errors: ValueError for what the model was not trained on, or what holds no melody."""
        given = dict(text=prompts, melody=melody, style=style)
        given = {k: v if isinstance(v, (list, tuple)) else [v] * len(prompts) for k, v in given.items()}
        names = self.model.conditioner.names if self.model.conditioner is not None else []
        for name, values in given.items():
            if len(values) != len(prompts):
                raise ValueError(f"{len(values)} of {name} for {len(prompts)} of text: give one for all, or as many")
            if name not in names and any(v is not None for v in values):
                raise ValueError(f"this model was trained without {name}" + (": use --unconditional" if name == "text" else ""))
        made = {(name, id(v)): f(v) for name, f in (("melody", self.tune), ("style", self.excerpt))
                for v in {id(v): v for v in given[name] if v is not None}.values()}
        return [{name: values[i] if name == "text" else made.get((name, id(values[i]))) for name, values in given.items()}
                for i in range(len(prompts))]

    def tune(self, wav: Tensor) -> Tensor:
        """The chroma [F,12] of a melody's audio [C,N]. Errors: ValueError if it is too short or silent."""
        rate = self.codec.sample_rate
        if wav.shape[-1] < 4 * chroma.hop_length(rate):
            raise ValueError(f"a melody lasts at least {4 * chroma.HOP_SECONDS:g} s, this has {wav.shape[-1] / rate:.2f} s")
        found = chroma.melody_chroma(wav.cpu(), rate, self.model.conditioner.config.melody_stems)
        if not found.any():
            raise ValueError("it is silent: no melody in it")
        return found

    def excerpt(self, wav: Tensor) -> Tensor:
        """The codes [K,T'] of the middle of a track [C,N]: a style. Errors: ValueError if it is too short."""
        config, hop = self.model.conditioner.config, self.codec.hop
        if (frames := wav.shape[-1] // hop) < config.style_every:
            raise ValueError(f"a style lasts at least {config.style_every / self.codec.frame_rate:g} s, this has "
                             f"{wav.shape[-1] / self.codec.sample_rate:.2f} s")
        around = config.style_frames + 2 * math.ceil(self.codec.frame_rate)               # a second on both sides, for the codec
        start, stop = excerpt(frames, around, around)
        codes = self.codec.encode(wav[None, :, start * hop:stop * hop].to(self.model.emb[0].weight.device))[0]
        start, stop = excerpt(codes.shape[1], config.style_frames, config.style_frames)
        return codes[:, start:stop]

    def generate(self, prompts: list, seconds: float, seed: int = 0, sampling: Sampling | None = None, melody=None, style=None,
                 **kwargs) -> Tensor:
        """Audio [B,C,N] for texts (None: without), melodies and styles as in `attributes`; further arguments as in `codes`."""
        codes = self.codes(self.attributes(prompts, melody, style), seconds, seed, sampling, **kwargs)
        return self.codec.decode(codes).cpu()


def free_name(folder: Path) -> int:
    """The first number under which neither wav nor json exists in a folder, so that nothing is overwritten."""
    taken = [int(p.stem) for p in folder.glob("*.*") if p.stem.isdecimal()]
    return max(taken, default=-1) + 1


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate music with a trained model.", allow_abbrev=False)
    parser.add_argument("--run", "--model", dest="run", required=True,
                        help="run folder (or its best.pt), or a folder with published weights, Hugging Face's or audiocraft's")
    parser.add_argument("--prompt", action="append", default=[], help="text; repeat it for several in one batch")
    parser.add_argument("--prompts", metavar="FILE", help="text file, one prompt a line")
    parser.add_argument("--unconditional", action="store_true", help="no text at all")
    parser.add_argument("--melody", nargs="+", default=[], metavar="AUDIO", help="whose melody to follow: one for all, or as many as texts")
    parser.add_argument("--melody_stems", action="store_true",
                        help="without its drums and bass (needs demucs; as trained, if trained so)")
    parser.add_argument("--style", nargs="+", default=[], metavar="AUDIO", help="whose style to take: one for all, or as many as texts")
    parser.add_argument("--continue", dest="continued", metavar="AUDIO", help="audio file to continue; it is part of --seconds")
    parser.add_argument("--seconds", type=float, default=None, help="length of the result (default: the training window)")
    parser.add_argument("--stride", type=float, default=None, help="seconds each window past the first advances")
    parser.add_argument("--n", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--cfg", type=float, default=None, help="guidance coefficient; 1 is none (default: the run's own)")
    parser.add_argument("--cfg_style", type=float, default=None,
                        help="double guidance, of the text beside a style or melody; 1 is none (default: the run's own)")
    parser.add_argument("--top_k", type=int, default=None, help="draw from the k likeliest codes; 0 is all")
    parser.add_argument("--top_p", type=float, default=None, help="draw from the likeliest codes of this mass; 0 is off")
    parser.add_argument("--temperature", type=float, default=None, help="0 takes the likeliest code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default=None, help="where the codec lies, if it has moved since training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step: a minute or two at first, then faster")
    parser.add_argument("--out", default="generated", help="folder for wav and json files; existing files are kept")
    parser.add_argument("--serve", action="store_true", help="instead: a page to try the model in the browser (needs gradio)")
    parser.add_argument("--host", default="127.0.0.1", help="of --serve; the default is for this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="of --serve")
    args = parser.parse_args(argv)
    try:
        if args.serve:
            serve(args)
        else:
            run(args)
    except (ValueError, OSError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


def read_prompts(args: argparse.Namespace) -> list:
    """The texts of the command line; None for unconditional. Errors: ValueError."""
    prompts = [clean_text(text) for text in args.prompt]
    if not all(prompts):
        raise ValueError(f"--prompt {args.prompt[prompts.index('')][:20]!r}: holds no text; for music without, --unconditional")
    if args.prompts:
        try:
            found = [text for line in Path(args.prompts).read_text("utf-8").splitlines() if (text := clean_text(line))]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {args.prompts}: {error}") from None
        if not found:
            raise ValueError(f"--prompts {args.prompts}: holds no text; write one prompt a line")
        prompts += found
    if args.unconditional or not prompts and (args.melody or args.style):
        prompts.append(None)
    if not prompts:
        raise ValueError('nothing to generate: give --prompt "...", --prompts FILE, --melody, --style or --unconditional')
    if args.n < 1:
        raise ValueError(f"--n {args.n}: at least 1")
    return prompts


def read_requests(args: argparse.Namespace) -> list:
    """What the command line asks for, one dict of text, melody and style (names of files) a sample, each `n` times.

    Errors: ValueError where their numbers do not fit."""
    given = dict(text=read_prompts(args), melody=args.melody or [None], style=args.style or [None])
    count = max(map(len, given.values()))
    for name, values in given.items():
        if len(values) not in (1, count):
            raise ValueError(f"{len(values)} of {name}, {count} samples: give one for all, or as many")
    rows = [{name: values[i % len(values)] for name, values in given.items()} for i in range(count)]
    return [row for row in rows for _ in range(args.n)]


def read_conditions(music: MusicGenerator, requests: list) -> list:
    """The conditions of the samples asked for; every file is read once. Errors: ValueError names the flag and the file."""
    read, codec = {}, music.codec
    for name, use in (("melody", music.tune), ("style", music.excerpt)):
        for path in dict.fromkeys(r[name] for r in requests if r[name] is not None):
            if music.model.conditioner is None or name not in music.model.conditioner.names:
                raise ValueError(f"--{name} {path}: this model was trained without {name}")
            if not Path(path).is_file():
                raise ValueError(f"--{name} {path}: no such file")
            try:
                read[name, path] = use(audio.read_audio(path, sample_rate=codec.sample_rate, channels=codec.channels))
            except ValueError as error:
                raise ValueError(f"--{name} {path}: {str(error).removeprefix(f'{path}: ')}") from None
    return [{"text": r["text"], **{name: read.get((name, r[name])) for name in ("melody", "style")}} for r in requests]


def chosen_sampling(args: argparse.Namespace, music: MusicGenerator) -> Sampling:
    """The run's own settings, but for those that the command line gives. Errors: ValueError, also for its seconds and seed."""
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds {args.seconds:g}: more than 0, at most 3600")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: it lies between 0 and 2^63")
    return replace(music.sampling, **{k: v for k in asdict(music.sampling) if (v := getattr(args, k)) is not None})


def serve(args: argparse.Namespace) -> None:
    """Shows the page in which the settings of the command line are the first. Errors: ValueError, also for flags it has no use for."""
    from tools import demo                                                      # nothing else needs it
    for name in ("prompt", "prompts", "unconditional", "melody", "melody_stems", "style", "continued", "stride"):
        if getattr(args, name):
            raise ValueError(f"--{'continue' if name == 'continued' else name} does not go with --serve: the page asks for what it takes")
    if args.seconds is not None and args.seconds > demo.MOST_SECONDS:
        raise ValueError(f"--seconds {args.seconds:g} with --serve: at most {demo.MOST_SECONDS}")
    gradio = demo.find_gradio()                                      # before the model is read
    music = MusicGenerator.load(args.run, args.device, args.codec)
    music.sampling = chosen_sampling(args, music)
    if args.compile:
        compile_step(music.model)
    demo.serve(gradio, music, args.host, args.port, args.run, seconds=args.seconds, seed=args.seed)


def run(args: argparse.Namespace) -> None:
    """Generates and writes what the command line asks for."""
    requests = read_requests(args)
    music = MusicGenerator.load(args.run, args.device, args.codec)
    music.attributes([r["text"] for r in requests])                  # refuses texts where none were trained on
    codec, sampling = music.codec, chosen_sampling(args, music)
    seconds = music.window / codec.frame_rate if args.seconds is None else args.seconds
    if args.continued and not Path(args.continued).is_file():
        raise ValueError(f"--continue {args.continued}: no such file")
    prompt = args.continued and audio.read_audio(args.continued, sample_rate=codec.sample_rate, channels=codec.channels)
    if args.continued and not prompt.shape[1]:
        raise ValueError(f"--continue {args.continued}: holds no audio")
    if args.melody and args.melody_stems:
        chroma.load_separator()
        music.model.conditioner.config.melody_stems = True
    attributes = read_conditions(music, requests)
    if args.compile:
        compile_step(music.model)
    out = common.output_folder(args.out)  # before the work, not after it
    bar = tqdm(total=100, unit="%", disable=not sys.stderr.isatty())
    codes = music.codes(attributes, seconds, args.seed, sampling, args.stride,
                        prompt if args.continued else None, lambda done, total: bar.update(100 * done // total - bar.n))
    bar.close()
    first = free_name(out)
    for i, asked in enumerate(requests):                             # decoded one by one: audio is larger than codes
        path = out / f"{first + i:03d}.wav"
        audio.write_audio(path, codec.decode(codes[i:i + 1])[0].cpu(), codec.sample_rate)
        record = dict(prompt=asked["text"], melody=asked["melody"], style=asked["style"], seconds=seconds, seed=args.seed,
                      index_in_batch=i, batch=len(requests), run=str(args.run), melody_stems=args.melody_stems,
                      continued=args.continued, stride=args.stride, compile=args.compile, codec=codec.fingerprint, **asdict(sampling))
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        shown = ", ".join(v if k == "text" else f"{k} {v}" for k, v in asked.items() if v is not None)
        print(f"wrote {path}: {shown or '(unconditional)'}")


if __name__ == "__main__":
    sys.exit(main())
