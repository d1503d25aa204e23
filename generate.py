"""Music from a trained model: sampling with guidance, continuation, lengths past the training window.

Copet et al. 2023 (arXiv:2306.05284), sec. 2.2 and 2.3. The pattern is walked step by step; each step's codes
are sampled from the K heads and written into the cells that are still open (no prompt fills them). Rows with
and without conditions go through in one batch (Ho & Salimans 2022; with cfg 1 those without are left out):

    logits = uncond + cfg * (cond - uncond)

A style or a melody says more than a text and drowns it. Double guidance (Rouard et al. 2024,
arXiv:2407.12563, sec. 3) pushes the text further, with rows for all but the text as well:

    logits = uncond + cfg * (cond_without_text + cfg_style * (cond - cond_without_text) - uncond)

Longer than the training window: a first window, then windows whose beginning is the end of the one before. A
melody is read on in each from where it begins, and begins again after its end.

    |------- window -------|
    |-- stride --|- prompt |--- new ---|
                 |-- stride --|- prompt |--- new ---|

Legend: B batch, K codebooks, T frames, S sequence steps, C channels, N samples.
    python generate.py --run runs/NAME --prompt "a slow organ tune" --seconds 8 --n 4
    python generate.py --run runs/NAME --prompt "slow organ" --out - | aplay     heard while it is generated
    python generate.py --run runs/NAME --serve                  a page in the browser, see support/serve.py
    python generate.py --run runs/NAME --prompt "fast bells" --melody tune.wav --style track.wav --cfg_style 3
    from generate import MusicGenerator
    music = MusicGenerator.load("runs/NAME")
    wav = music.generate(["slow organ", "fast bells"], seconds=4)      # [2, C, N] at music.codec.sample_rate
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import tokenizer
from conditioning import CONDITIONS
from interop import load
from model import MusicGen
from support import audio, common
from support.compiled import compile_step
from support.kernels import packed_weights
from support.kept_codes import keep_codes, kept_path, take_kept
from support.per_sample import Noise, encode_conditions
from support.quantize import STORED_AS, store_weights
from support.requests import check_sampling, read_continued, read_requests, read_values, request_records
from support.stream import Listener, check_standard_output, in_background, wav_to_standard_output


@dataclass
class Sampling:
    """How codes are drawn. Temperature 0 takes the likeliest. A top_p over 0 goes before a top_k over 0."""
    cfg: float = 3.0
    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    cfg_style: float = 1.0                                   # of the text beside a style or melody; 1 is none

    def __post_init__(self):
        ranges = dict(cfg=(-100, 100), temperature=(0, 100), top_k=(0, 1 << 20), top_p=(0, 1),
                      cfg_style=(-100, 100))
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:                             # also refuses NaN
                raise ValueError(f"{name} {value}: it lies between {low} and {high}")


def sample_codes(logits: Tensor, sampling: Sampling, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """logits [B,k,card] -> codes [B,k]. The draw is argmax(p / exponential noise), an exponential race, as
    torch.multinomial's: no trip to the host. noise: of candidates [B,k,n], see per_sample.Noise."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, card = logits.float() / sampling.temperature, logits.shape[-1]
    if sampling.top_p > 0:
        probs, codes = logits.softmax(-1).sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs > sampling.top_p, 0)      # the first always stays
    else:
        top, codes = logits.topk(min(sampling.top_k or card, card), -1)              # exactly k, ties or not
        probs = top.softmax(-1)
    drawn = (probs / noise(codes)).argmax(-1, keepdim=True)                                    # [B, k, 1]
    return codes.gather(-1, drawn)[..., 0]


@torch.inference_mode()
def generate_codes(model: MusicGen, values: list, T: int, sampling: Sampling, *,
                   noise: Noise | None = None, prompt: Tensor | None = None,
                   dtype: torch.dtype = torch.float32, hear=None) -> Tensor:
    """Codes [B, K, T] for the conditions of B samples, each {name: value or None}.

    noise: of these samples (default: of seed 0); prompt [B, K, T'] with T' < T is kept as it is and
    continued; dtype: of autocast, and of the keys and values where the model has no `kv_dtype`; hear(t, codes
    [B, K, 1]) is called for each frame after the prompt as soon as it is whole. The model is in eval mode."""
    device, K, B = model.emb[0].weight.device, model.config.K, len(values)
    noise = noise or Noise(0, range(B), device)
    T_prompt = 0 if prompt is None else prompt.shape[2]
    assert T_prompt < T, f"a prompt of {T_prompt} frames leaves nothing to generate in {T}"

    # the sequence: special tokens where nothing is known yet
    pattern = model.config.layout(T)                         # on the host, where reading it waits for no GPU
    codes = torch.full((B, K, T), model.special, device=device)
    if prompt is not None:
        codes[..., :T_prompt] = prompt
    seq = pattern.build(codes, model.special, valid_only=False)                                 # [B, K, S]
    is_open = pattern.frame >= T_prompt                                                         # [K, S]
    # of every step, a range: under any pattern they are neighbors, and a list would be copied to a GPU
    open_heads = [range(row.argmax(), row.argmax() + row.sum()) for row in is_open.T.numpy()]
    last_step = pattern.step[-1].tolist()                            # of every frame: its last codebook's
    whole = T_prompt                                                 # frames of which all codes are there
    cells = pattern.to(device).frame * K + torch.arange(K, device=device)[:, None]              # [K, S]

    # rows of the batch: each sample; for double guidance without its text; for guidance without anything
    guided = sampling.cfg != 1 and any(v is not None for sample in values for v in sample.values())
    coefficient = guidance_coefficient(values, sampling, device)                                # [B, 1, 1]
    rows = 1 + guided + (coefficient is not None)

    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    packing = packed_weights(0 if model.compiled else B * rows)     # a compiled step packs its weights itself
    with contextlib.ExitStack() as stack, autocast, packing:
        stack.callback(model.train, model.training)                  # whatever ends this, also a listener
        model.eval()
        conditions = encode_conditions(model, values, guided, coefficient is not None)
        P = 0 if conditions.prefix is None else conditions.prefix.shape[1]
        cache = model.cache_class(model.config, B * rows, P + pattern.S, device, model.kv_dtype or dtype)
        first = pattern.first_step(T_prompt)
        for s in range(first, pattern.S):
            # logits of the codebooks that are open at this step; None asks for all
            which = open_heads[s] if 0 < len(open_heads[s]) < K else None
            if s == first:
                x = model.hidden(seq[..., :s].repeat(rows, 1, 1), conditions, cache)          # [rows*B, s, D]
                logits = model.heads(x[:, -1:], which)                                  # [rows*B, k, 1, card]
            else:
                logits = model.decode_step(seq[..., s - 1:s].repeat(rows, 1, 1), cache, which)
            if open_heads[s]:
                # guidance
                logits = logits[:, :, 0].float()                                           # [rows*B, k, card]
                cond, *others = logits.chunk(rows)
                if coefficient is not None:
                    cond_without_text = others.pop(0)
                    cond = cond_without_text + coefficient * (cond - cond_without_text)
                if guided:
                    uncond = others[0]
                    cond = uncond + sampling.cfg * (cond - uncond)
                # sampling
                heads = slice(open_heads[s].start, open_heads[s].stop)
                seq[:, heads, s] = sample_codes(cond, sampling, partial(noise, cells[heads, s]))
            while hear is not None and whole < T and last_step[whole] <= s:
                hear(whole, seq.gather(2, pattern.to(device).step[:, whole, None].expand(B, -1, -1)))
                whole += 1

    codes, found = pattern.revert(seq, -1)
    assert found.all() and codes.max() < model.config.card, "some codes were not generated"
    return codes                                                                                # [B, K, T]


def guidance_coefficient(values: list, sampling: Sampling, device) -> Tensor | None:
    """Double guidance's second coefficient of each sample [B, 1, 1]; 1 for a text alone, or none.

    None where no sample needs it."""
    both = []
    for sample in values:
        given = [name for name, value in sample.items() if value is not None]
        texts = [name for name in given if CONDITIONS[name].is_text]
        both.append(0 < len(texts) < len(given))
    if sampling.cfg_style == 1 or not any(both):
        return None
    return torch.tensor([sampling.cfg_style if x else 1.0 for x in both], device=device)[:, None, None]


def values_at(model: MusicGen, values: list, start: int) -> list:
    """The conditions of a window that begins at a code frame: a melody, for one, is read on from there."""
    if model.conditioner is None:
        return values
    parts = model.conditioner.parts
    return [{name: value if value is None or name not in parts else parts[name].at_window(value, start)
             for name, value in sample.items()} for sample in values]


def generate_long(model: MusicGen, values: list, T: int, sampling: Sampling, *, window: int, stride: int,
                  noise: Noise | None = None, prompt: Tensor | None = None,
                  dtype: torch.dtype = torch.float32, hear=None) -> Tensor:
    """As `generate_codes`, for any T: windows of `window` frames, each begins `stride` after the one before.

    The first hears all of the prompt, of a long one as much as leaves two frames. The prompt counts in T. A
    training segment ends in its last frame, and the codec codes that frame as an ending: where the music goes
    on, the next window draws it again. hear(codes [B, K, t]) is called with the prompt and then with frame
    after frame. Errors: ValueError if the stride leaves no frame to go on from."""
    if T > window and not 0 < stride < window - 1:
        raise ValueError(f"stride {stride} in windows of {window} frames: no frame is left to go on from")
    codes, noise = prompt, noise or Noise(0, range(len(values)), model.emb[0].weight.device)
    if prompt is None:
        codes = torch.empty(len(values), model.config.K, 0, dtype=torch.long)
    given = codes.shape[2]
    if hear is not None and given:
        hear(codes)
    start = 0 if T <= window else max(0, given - (window - 2))       # of the window
    while codes.shape[2] < T:
        kept, frames = codes[..., start:], min(window, T - start)
        stop = frames if start + frames == T else frames - 1         # of what is kept

        def hear_frame(t, frame, stop=stop):
            if t < stop:
                hear(frame)

        part = generate_codes(model, values_at(model, values, start), frames, sampling, prompt=kept,
                              noise=noise.from_cell(start * model.config.K), dtype=dtype,
                              hear=hear_frame if hear else None)
        codes = torch.cat([codes.to(part.device), part[..., kept.shape[2]:stop]], 2)
        start += stride
    return codes                                                                                # [B, K, T]


# --------------------------------------------------------------------------------------------------
# the API


class MusicGenerator:
    """A trained model with its codec: `generate` gives audio, `stream` gives it while it grows, `codes` the
    codes behind it."""

    def __init__(self, model: MusicGen, codec, window: int, sampling: Sampling, dtype=torch.float32):
        """window: frames of a training segment; dtype: see `generate_codes`."""
        self.model, self.codec, self.window, self.sampling, self.dtype = model, codec, window, sampling, dtype

    @classmethod
    def load(cls, run: str | Path, device: str = "cpu", codec: str | None = None, dtype=torch.float32,
             weights: str = "float32"):
        """From a run folder, a best.pt, or a folder with published weights.

        codec: where its codec lies now, if not where it was in training. weights: what matrices are held as,
        see support/quantize.py. Errors: ValueError."""
        content = load.read_model(run)
        try:
            model, window = load.build_model(content), content["segment_frames"]
            sampling, stored = Sampling(**content["sampling"]), content["codec"]
            stored = dict(channels=1, levels=stored["K"]) | stored   # older files: mono
            name, fingerprint = codec or stored["name"], stored["fingerprint"]
            levels, channels = stored["levels"], stored["channels"]
            assert window > 0, f"a window of {window} frames"
            content.clear()                                          # the model alone holds its weights now
        except Exception as error:                                   # a foreign file can fail in any way
            problem = common.describe_error(error)
            raise ValueError(f"{run}: not {common.MODEL_FILE}, or damaged ({problem})") from None
        found = tokenizer.load_codec(name, levels, device, channels)
        if found.fingerprint != fingerprint:
            raise ValueError(f"codec {name} has fingerprint {found.fingerprint[:12]}, the model was trained "
                             f"on codes of {fingerprint[:12]}: give that codec by --codec")
        if (model.config.K, model.config.card) != (found.K, found.card):
            raise ValueError(f"{run}: makes {model.config.K} x {model.config.card} codes, its codec has "
                             f"{found.K} x {found.card}: the file is damaged")
        return cls(store_weights(model.to(device), weights), found, window, sampling, dtype)

    @property
    def conditions(self) -> dict:
        """{name: Condition} that the model was trained on."""
        return {} if self.model.conditioner is None else dict(self.model.conditioner.parts.items())

    def span(self, seconds: float, prompt: Tensor | None) -> tuple[int, int]:
        """(first, stop) samples of the result in what `codes` decode to.

        The prompt's last frame is whole, so its first one may begin with silence, `first` samples."""
        first = 0 if prompt is None else -prompt.shape[-1] % self.codec.hop
        return first, first + max(1, round(seconds * self.codec.sample_rate))

    def codes(self, values: list, seconds: float, seed: int = 0, sampling: Sampling | None = None, *,
              stride_seconds: float | None = None, prompt: Tensor | None = None, progress=None,
              first: int = 0, hear=None) -> Tensor:
        """Codes [B, K, T] for conditions as `condition_values` gives them; `decode` makes audio of them.

        prompt: audio [C, N] or [B, C, N] to continue, counted in `seconds`; stride_seconds: how far each
        window past the training length advances (default 60 % of it); first: number of the first sample,
        whose noise depends on the seed and its number alone; hear(audio [C, n]) is called with piece after
        piece of a single sample; progress(frames, of T) as they are there. Errors: ValueError for lengths
        that do not fit."""
        frame_rate, device = self.codec.frame_rate, self.model.emb[0].weight.device
        silence, stop = self.span(seconds, prompt)
        T, unheard = math.ceil(stop / self.codec.hop), None
        assert hear is None or len(values) == 1, f"{len(values)} samples cannot be heard at once"
        listener = None if hear is None else Listener(self.codec, T, silence, stop, hear)
        if prompt is not None:
            if prompt.shape[-1] >= stop - silence:
                lasts = prompt.shape[-1] / self.codec.sample_rate
                raise ValueError(f"the audio to continue lasts {lasts:.2f} s, so "
                                 f"--seconds must be longer than that, not {seconds:g}")
            prompt = prompt if prompt.dim() == 3 else prompt[None].expand(len(values), -1, -1)
            prompt = self.codec.encode(F.pad(prompt.to(device), (silence, 0)))                  # [B, K, T']
            unheard, prompt = prompt.tensor_split([1 if silence else 0], 2)   # only real audio is continued
            T -= unheard.shape[2]
            if listener is not None and unheard.shape[2]:
                listener(unheard)
        stride = 0.6 * self.window if stride_seconds is None else stride_seconds * frame_rate       # frames
        if stride_seconds is not None and not 0 < stride < self.window - 1.5:
            raise ValueError(f"--stride {stride_seconds:g}: more than 0, and two frames of "
                             f"{1 / frame_rate:g} s less than the window of {self.window / frame_rate:g} s")
        stride = max(1, int(stride) if stride_seconds is None else round(stride))
        noise = Noise(seed, range(first, first + len(values)), device)
        done = 0

        def hear_frames(frames: Tensor) -> None:
            nonlocal done
            done += frames.shape[2]
            if listener is not None:
                listener(frames)
            if progress is not None:
                progress(done, T)

        codes = generate_long(self.model, values, T, sampling or self.sampling, window=self.window,
                              stride=stride, noise=noise, prompt=prompt, dtype=self.dtype,
                              hear=None if hear is None and progress is None else hear_frames)
        return codes if unheard is None else torch.cat([unheard, codes], 2)

    def decode(self, codes: Tensor, seconds: float, prompt: Tensor | None = None) -> Tensor:
        """Audio [B, C, N] of what `codes` gave for these seconds and prompt: exactly as long as asked."""
        first, stop = self.span(seconds, prompt)
        return self.codec.decode(codes)[..., first:stop].cpu()

    def condition_values(self, texts: list, **given) -> list:
        """[{name: value or None}] of texts (None: without) and of what is given for others by name.

        Each is one for all, or a list with one or None for each text; see `Condition.from_user` for what it
        may be. Errors: ValueError for what the model was not trained on, or what holds no such condition."""
        columns = {}
        for name, condition in CONDITIONS.items():
            column = texts if condition.is_text else given.pop(name, None)
            columns[name] = column if isinstance(column, (list, tuple)) else [column] * len(texts)
        if given:
            raise ValueError(f"condition {next(iter(given))!r}: choose from {', '.join(CONDITIONS)}")
        values = [{} for _ in texts]
        for name, column in columns.items():
            if len(column) != len(texts):
                raise ValueError(f"{len(column)} of {name} for {len(texts)} of text: give one for all, "
                                 "or as many")
            if name not in self.conditions and any(item is not None for item in column):
                hint = ": use --unconditional" if CONDITIONS[name].is_text else ""
                raise ValueError(f"this model was trained without {name}{hint}")
            known = {}                                               # what several samples share is read once
            for row, item in zip(values, column):
                if item is not None and id(item) not in known:
                    known[id(item)] = self.conditions[name].from_user(item, self.codec)
                row[name] = None if item is None else known[id(item)]
        return values

    def generate(self, texts: list, seconds: float, seed: int = 0, sampling: Sampling | None = None, *,
                 stride_seconds: float | None = None, prompt: Tensor | None = None, progress=None,
                 first: int = 0, **given) -> Tensor:
        """Audio [B, C, N] for texts (None: without), with other conditions by name as in `condition_values`.

        The rest is as in `codes`."""
        values = self.condition_values(texts, **given)
        codes = self.codes(values, seconds, seed, sampling, stride_seconds=stride_seconds, prompt=prompt,
                           progress=progress, first=first)
        return self.decode(codes, seconds, prompt)

    def stream(self, text: str | None, seconds: float, seed: int = 0, sampling: Sampling | None = None, *,
               stride_seconds: float | None = None, prompt: Tensor | None = None, first: int = 0,
               **given) -> Iterator[Tensor]:
        """`generate` for one text, while it goes on: audio [C, n] of half a second and a rest.

        Joined it is what `generate` gives, within one step of 16 bits."""
        values = self.condition_values([text], **given)
        return in_background(lambda hear: self.codes(
            values, seconds, seed, sampling, stride_seconds=stride_seconds, prompt=prompt, first=first,
            hear=hear))


# --------------------------------------------------------------------------------------------------
# the command


def build_generate_parser() -> argparse.ArgumentParser:
    """The flags. Each condition but the text has one of its own."""
    parser = argparse.ArgumentParser(description="Generate music with a trained model.", allow_abbrev=False)
    new = parser.add_argument
    new("--run", "--model", dest="run", required=True,
        help="run folder (or its best.pt), or a folder with published weights")
    new("--prompt", action="append", default=[], help="text; repeat it for several in one batch")
    new("--prompts", metavar="FILE", help="text file, one prompt a line")
    new("--unconditional", action="store_true", help="no text at all")
    for name, condition in CONDITIONS.items():
        if not condition.is_text:
            new(f"--{name}", nargs="+", default=[], metavar=condition.metavar,
                help=f"{condition.label}: one for all, or as many as texts")
        for flag in condition.generate_flags:
            flag.add_to(parser)
    new("--continue", dest="continued", metavar="AUDIO",
        help="audio file to continue; a part of --seconds, heard as far back as a training window reaches")
    new("--seconds", type=float, help="length of the result (default: the training window)")
    new("--stride", type=float, help="seconds each window past the first advances")
    new("--n", type=int, default=1, help="samples of each prompt")
    new("--cfg", type=float, help="guidance coefficient; 1 is none (default: the run's own)")
    new("--cfg_style", type=float,
        help="double guidance: pushes the text beside another condition; 1 is none (default: none)")
    new("--top_k", type=int, help="draw from the k likeliest codes; 0 is all (default: the run's own)")
    new("--top_p", type=float, help="draw from the likeliest codes of this mass; 0 is off (likewise)")
    new("--temperature", type=float, help="0 takes the likeliest code (default: the run's own)")
    new("--seed", type=int, default=0, help="of the draws (default 0)")
    new("--first", type=int, default=0,
        help="number of the first sample, to make one of a larger batch again (default 0)")
    new("--codec", help="where the codec lies, if it has moved since training")
    new("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 or mps")
    new("--weights", default="float32", choices=STORED_AS,
        help="what matrices are held as: int8 is the fastest and a third of the memory, nearly as good")
    new("--compile", action="store_true",
        help="torch.compile the step: a minute or more at first, pays from two minutes of music on")
    new("--out", type=common.output_name, default="generated",
        help="folder for wav and json files, existing files are kept; or -: one clip as wav to standard "
             "output, while it is generated, for a player such as aplay")
    new("--serve", action="store_true", help="instead: a page to try the model in the browser (needs gradio)")
    new("--host", help="of --serve (default 127.0.0.1: for this machine alone)")
    new("--port", type=int, help="of --serve (default 7860)")
    return parser


def choose_sampling(args: argparse.Namespace, music: MusicGenerator) -> Sampling:
    """The run's own settings, but for those given. Errors: ValueError, also for seconds, seed and first."""
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds {args.seconds:g}: more than 0, at most 3600")
    for name in ("seed", "first"):
        if not 0 <= getattr(args, name) < 2 ** 63:
            raise ValueError(f"--{name} {getattr(args, name)}: it lies between 0 and 2^63")
    given = {name: getattr(args, name) for name in asdict(music.sampling)}
    return replace(music.sampling, **{name: value for name, value in given.items() if value is not None})


def serve_page(args: argparse.Namespace) -> None:
    """--serve: the page; it begins with the settings given. Errors: ValueError, also for flags of no use."""
    from support import serve                                        # nothing else needs it
    serve.check_serve_flags(args, build_generate_parser())
    gradio = serve.import_gradio()                                   # before the model is read
    music = MusicGenerator.load(args.run, args.device, args.codec, weights=args.weights)
    music.sampling = choose_sampling(args, music)
    if args.compile:
        compile_step(music.model)
    serve.serve(gradio, music, args)


@common.command("generate.py", "--n or --seconds")
def main(argv: list | None = None) -> None:
    """Generates and writes what the command line asks for."""
    args = build_generate_parser().parse_args(argv)
    if args.serve:
        serve_page(args)
        return

    # what is asked for
    requests = read_requests(args)
    if args.out == "-":
        check_standard_output(len(requests))
    music = MusicGenerator.load(args.run, args.device, args.codec, weights=args.weights)
    codec, sampling = music.codec, choose_sampling(args, music)
    check_sampling(args, sampling)
    window = music.window / codec.frame_rate
    seconds = window if args.seconds is None else args.seconds
    if args.stride is not None and seconds <= window:
        raise ValueError(f"--stride {args.stride:g}: {seconds:g} s are within one window of {window:g} s")
    prompt = read_continued(args.continued, codec)                                              # [C, N]
    for condition in music.conditions.values():
        condition.use_flags(args)
    values = read_values(music, requests)
    if args.compile:
        compile_step(music.model)

    def generate(hear=None) -> Tensor:
        with tqdm(total=100, unit="%", disable=not sys.stderr.isatty()) as bar:
            codes = music.codes(values, seconds, args.seed, sampling, stride_seconds=args.stride,
                                prompt=prompt, first=args.first, hear=hear,
                                progress=lambda done, total: bar.update(100 * done // total - bar.n))
        for name, condition in music.conditions.items():             # what it does not follow, said once
            for value in dict.fromkeys(row[name] for row in values):
                for line in [] if value is None else condition.remarks(value):
                    print(f"generate.py: {line}", file=sys.stderr)
        return codes

    if args.out == "-":
        first, stop = music.span(seconds, prompt)
        with wav_to_standard_output(codec.sample_rate, codec.channels, stop - first) as hear:
            generate(hear)
        return

    # the codes, of all samples at once
    out = common.output_folder(args.out)                             # before the work, not after it
    records = request_records(args, requests, seconds=seconds, codec=codec.fingerprint, **asdict(sampling))
    kept = kept_path(out, music, records, values, prompt)
    codes, left = take_kept(kept, music) or (generate(), list(range(len(requests))))

    # the audio, decoded one by one because it is larger than codes
    with keep_codes(kept, codes, left), common.numbered_names(out, len(left)) as names:
        for path in (name.with_suffix(".wav") for name in names):
            i = left[0]
            wav = music.decode(codes[i:i + 1], seconds, prompt)[0]                              # [C, N]
            audio.write_clip(path, wav, codec.sample_rate, records[i])
            left.remove(i)
            shown = [x if CONDITIONS[name].is_text else f"{name} {x}" for name, x in requests[i].items() if x]
            print(f"wrote {path}: {', '.join(shown) or '(unconditional)'}")


if __name__ == "__main__":
    sys.exit(main())
