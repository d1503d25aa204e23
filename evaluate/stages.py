"""The stages of an epoch after training: valid (averaged weights), evaluate and generate (best weights), the page.

Validation clips are encoded once. A stage says what each condition is worth to the loss, how near generated clips are to real ones,
on the toy set how well they follow their captions, and writes samples to listen to.

Legend: B batch, K codebooks, T frames, C channels, N samples.
    python train.py --only valid|evaluate|generate --out runs/toy        a stage alone
"""

import math
import time
from dataclasses import asdict

import torch
from torch import Tensor, nn

import conditioning
import data
from evaluate import adherence, analyser, board, distances, listen
import generate
from interop import load
from evaluate import page
import toy
from support.flags import segment_frames, style_frames
from model import MusicGen
from support.run import Run, attempt, deployment, note_written

PLURALS = dict(text="captions", melody="melodies", style="styles")


def to_codes(run: Run, batch: data.Batch) -> tuple[Tensor, Tensor]:
    """Codes [B,K,T] and frame mask [B,T] of a batch on the device."""
    device = run.ranks.device
    codes = run.codec.encode(batch.wav.to(device)) if batch.codes is None else batch.codes.to(device, torch.long)
    return codes, batch.frame_mask.to(device)


def beside_text(run: Run, examples: list, codes: Tensor, rngs: list) -> tuple[list, list]:
    """(melody and style of each example, (start, stop) of its style excerpt) from codes [B,K,T]. rngs: None is the middle."""
    names, (low, high) = run.model.conditioner.names, style_frames(run.args, run.codec)
    places = [conditioning.excerpt(e.frames, low, high, rng) for e, rng in zip(examples, rngs)]
    given = [{"melody": e.features.get("chroma"), "style": row[:, slice(*place)].clone()}
             for e, row, place in zip(examples, codes, places)]
    return [{name: value for name, value in each.items() if name in names} for each in given], places


def in_full(run: Run, examples: list, codes: Tensor) -> tuple[list, list | None]:
    """(all conditions of each example, nothing dropped, {name: value}; places of style excerpts, the middle of each clip, or None)."""
    given, places = [{} for _ in examples], None
    if run.model.conditioner is not None:
        given, places = beside_text(run, examples, codes, [None] * len(examples))
    return [{"text": conditioning.describe(e.meta), **more} for e, more in zip(examples, given)], places


def without_excerpts(mask: Tensor, places: list) -> Tensor:
    """Frames [B,T] less those of style excerpts [(start, stop)]: the model has read them already, and would learn to copy."""
    frames = torch.arange(mask.shape[1])
    shown = torch.stack([(start <= frames) & (frames < stop) for start, stop in places])
    return mask & ~shown.to(mask.device, non_blocking=True)


def prepare(model: MusicGen, attributes: list, device) -> dict | None:
    """Conditions of a micro-batch as the model takes them."""
    return None if model.conditioner is None else model.conditioner.prepare(attributes, device)


def figures(sums: Tensor, counts: Tensor) -> dict:
    """Summed loss and targets of each codebook -> {"ce", "ppl", "ce_q1", "ppl_q1", ...}."""
    each = (sums / counts.clamp_min(1)).tolist()
    ce = sum(each) / len(each)
    result = dict(ce=ce, ppl=math.exp(min(ce, 80.0)))
    for k, value in enumerate(each, 1):
        result |= {f"ce_q{k}": value, f"ppl_q{k}": math.exp(min(value, 80.0))}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# valid


def valid_source(run: Run):
    """What validation reads: the held-out clips, or the only batch there is."""
    return run.train_set if run.args.overfit_one_batch else run.valid_set


def load_valid(run: Run) -> list:
    """This rank's share of the validation set, encoded once and kept on the host as [(codes, mask, what counts, attributes)].

    A style excerpt is the middle of its clip, and does not count in the loss, whatever conditions are then given. Which segments
    it has depends on the flags alone: --valid_samples, rounded up to whole batches."""
    if run.valid_batches is None:
        args, ranks = run.args, run.ranks
        run.valid_batches = []
        for examples in data.batches(valid_source(run), 0, 0, math.ceil(args.valid_samples / args.batch_size), args.batch_size,
                                     rank=ranks.rank, world_size=ranks.world_size, workers=args.workers):
            for i in range(0, len(examples), args.micro_batch_size):
                part = examples[i:i + args.micro_batch_size]
                codes, mask = (x.cpu() for x in to_codes(run, data.collate(part)))
                attributes, places = in_full(run, part, codes)
                counted = without_excerpts(mask, places) if places and "style" in run.model.conditioner.names else mask
                run.valid_batches.append((codes, mask, counted, attributes))
    return run.valid_batches


@torch.no_grad()
def mean_loss(run: Run, model: MusicGen, change=lambda attributes: attributes) -> dict:
    """Figures of a model over the validation set; `change` may alter the list of all its conditions."""
    model.eval()
    totals = torch.zeros(2, model.config.K, device=run.ranks.device, dtype=torch.float64)
    batches = load_valid(run)
    attributes = iter(run.ranks.apply_to_gathered([a for *_, part in batches for a in part], run.args.batch_size, change))
    for codes, mask, counted, part in batches:
        codes, mask, counted = (x.to(run.ranks.device) for x in (codes, mask, counted))
        with run.autocast():
            sums = model(codes, mask, prepare(model, [next(attributes) for _ in part], run.ranks.device), None, counted)
        totals += torch.stack([sums, model.count_targets(counted)])
    return figures(*run.ranks.sum(totals))


def valid_stage(run: Run) -> dict:
    """Cross-entropy of the averaged weights on the validation set."""
    began = time.perf_counter()
    return mean_loss(run, run.ema.model) | dict(seconds=time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate


def best_music(run: Run) -> generate.MusicGenerator:
    """The best weights as a whole model on every rank, with the run's sampling settings. All ranks call it."""
    content = deployment(run)
    return generate.MusicGenerator(load.build_model(content).to(run.ranks.device), run.codec, content["segment_frames"],
                                   generate.Sampling(**content["sampling"]), run.dtype)


def evaluate_stage(run: Run) -> dict:
    """What each condition is worth to the loss; how near generated clips are to real ones; on the toy set, how well they follow their
    captions."""
    began, music = time.perf_counter(), best_music(run)
    model, result = music.model, mean_loss(run, music.model)
    names = model.conditioner.names if model.conditioner is not None else []
    for name in names:
        without = mean_loss(run, model, lambda a: [{**x, name: None} for x in a])["ce"]
        others = mean_loss(run, model, lambda a: [{**x, name: y[name]} for x, y in zip(a, a[1:] + a[:1])])["ce"]
        result |= {f"ce_no_{name}": without, f"ce_shuffled_{name}": others}
        run.ranks.print(f"evaluate: ce {result['ce']:.4f} with {PLURALS[name]}, {without:.4f} without, "
                        f"{others:.4f} with those of other clips")
    if len(names) > 1:
        result["ce_no_conditions"] = mean_loss(run, model, lambda a: [dict.fromkeys(x) for x in a])["ce"]
        run.ranks.print(f"evaluate: ce {result['ce_no_conditions']:.4f} without any condition")
    if run.args.dataset == "toy" and "text" in names:
        result["adherence"] = toy_adherence(run, music)
    if run.args.dataset == "toy" and set(names) - {"text"}:
        result["given"] = adherence.measure_conditions(music, run.args.eval_samples, run.args.seed, ranks=run.ranks)
        run.ranks.print(adherence.rows_table(result["given"], f"{run.args.eval_samples} clips, given"))
    result["distances"] = held_out_distances(run, music)
    return result | dict(seconds=time.perf_counter() - began)


def toy_adherence(run: Run, music: generate.MusicGenerator) -> dict:
    """Caption adherence on combinations of values seen in training and on those held out; prints both tables."""
    args, result = run.args, {}
    for split, title in (("valid", "combinations seen in training"), ("heldout", "combinations held out")):
        table = adherence.measure_adherence(music, split, args.eval_samples, args.seed, ranks=run.ranks)
        run.ranks.print(adherence.adherence_table(table, f"{args.eval_samples} clips, {title}"))
        result[split] = table
    return result


def held_out(run: Run, music: generate.MusicGenerator, first: int, stop: int) -> tuple[list, list]:
    """Validation clips first..stop-1: the audio [C,N] of each, without padding, and its conditions {name: value}.

    A token cache has no audio: then it is what the codec makes of its codes. Errors: ValueError where one cannot be read."""
    examples = data.load_examples(valid_source(run), 0, stop - first, first)
    if isinstance(examples, ValueError):
        raise examples
    codes, _ = to_codes(run, data.collate(examples))
    wavs = run.codec.decode(codes).cpu() if examples[0].wav is None else [torch.from_numpy(e.wav) for e in examples]
    names = music.model.conditioner.names if music.model.conditioner is not None else []
    conditions = [{name: a[name] for name in names} for a in in_full(run, examples, codes)[0]]
    return [wav[:, :e.frames * run.codec.hop] for wav, e in zip(wavs, examples)], conditions


def held_out_distances(run: Run, music: generate.MusicGenerator) -> dict:
    """Distances of clips generated for the conditions of validation clips from these; prints them. All ranks call it."""
    args, n = run.args, run.args.eval_samples

    def make(first: int, stop: int) -> tuple[list, list]:
        real, conditions = held_out(run, music, first, stop)
        wavs = run.codec.decode(music.codes(conditions, args.segment_seconds, seed=args.seed + first)).cpu()
        return real, [wav[:, :x.shape[1]] for wav, x in zip(wavs, real)]

    heard = args.dataset == "toy" and args.cache is None and args.segment_seconds * toy.SAMPLE_RATE >= analyser.MIN_SAMPLES
    names = music.model.conditioner.names if music.model.conditioner is not None else []
    found = distances.against_reference(make, n, run.codec, ranks=run.ranks, labels=heard, tunes="melody" in names)
    run.ranks.print(distances.distances_table(found, f"{n} clips beside validation clips"))
    if args.cache is not None:
        run.ranks.print("(a cache has no audio: validation clips are as the codec decodes them, and the ceiling counts it twice)")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# generate


def generate_stage(run: Run, folder: str) -> dict:
    """Writes samples for the conditions of fixed validation clips, wav and json, under samples/FOLDER: see listen.py. Once, under
    samples/reference, the clips themselves."""
    args, began = run.args, time.perf_counter()
    if not run.ranks.is_main or args.generate_samples == 0:
        deployment(run, keep=False)                                  # lends its shards to rank 0
        return {}
    music = best_music(run)
    real, conditions = held_out(run, music, 0, args.generate_samples)
    record = dict(seed=args.seed, epoch=run.step // args.updates_per_epoch, step=run.step, seconds=args.segment_seconds,
                  **asdict(music.sampling))
    sets = references(run, real) | make_samples(run, music, real, conditions)
    note_written(run, "samples", attempt(write_samples, run, folder, sets, conditions, record), shared=False)
    return dict(samples=sum(map(len, sets.values())), folder=str(run.out / "samples" / folder), seconds=time.perf_counter() - began)


def make_samples(run: Run, music: generate.MusicGenerator, real: list, conditions: list) -> dict:
    """{kind: audio [B,C,N]} for the conditions of clips, the same seed for all: see listen.SAMPLE_KINDS."""
    args, quarter = run.args, segment_frames(run.args, run.codec) // 4 * run.codec.hop                   # samples
    asked = {"unprompted": dict(attributes=conditions)} if any(conditions) else {}
    if quarter:
        begun = [nn.functional.pad(wav[:, :quarter], (0, max(0, quarter - wav.shape[1]))) for wav in real]
        asked["prompted"] = dict(attributes=conditions, prompt=torch.stack(begun))
    asked["unconditional"] = dict(attributes=[dict.fromkeys(c) for c in conditions])
    return {kind: run.codec.decode(music.codes(seconds=args.segment_seconds, seed=args.seed, **how)).cpu() for kind, how in asked.items()}


def references(run: Run, real: list) -> dict:
    """Clips as they are, and through the codec."""
    return {"reference": real, "codec": [distances.reconstruction(wav, run.codec) for wav in real]}


def write_samples(run: Run, folder: str, sets: dict, conditions: list, record: dict) -> None:
    """{kind: audio} with its settings as NNN_KIND.wav and .json; `given` names the conditions it had. A reference is written once."""
    samples = run.out / "samples"
    for i, clip in enumerate(conditions):
        for kind, wavs in sets.items():
            once, name = kind in ("reference", "codec"), f"{i:03d}_{kind}"
            if once and (samples / "reference" / f"{name}.json").is_file():
                continue
            made = {} if once else dict(record, given=[k for k, v in clip.items() if v is not None and kind != "unconditional"])
            if kind == "prompted":
                made["prompt_seconds"] = segment_frames(run.args, run.codec) // 4 / run.codec.frame_rate
            place = samples / ("reference" if once else folder)
            listen.write_sample(place, name, wavs[i], run.codec.sample_rate, dict(prompt=clip.get("text"), kind=kind, **made))
            if run.board is not None:
                board.show_sample(run.board, name, place / f"{name}.wav", run.step)
        kinds = ",".join(k for k in sets if k not in ("reference", "codec"))
        print(f"wrote {samples / folder / f'{i:03d}'}_{{{kinds}}}.wav: {clip.get('text')}", flush=True)


def draw_page(run: Run, final: bool) -> None:
    """Writes index.html, on rank 0. Epochs so short that it would take over a twentieth of the time share one; the last has its own."""
    if not run.ranks.is_main or not final and time.monotonic() - run.drawn_at < 20 * run.drawing_seconds:
        return
    began = time.monotonic()
    note_written(run, page.PAGE_FILE, attempt(page.write_page, run.out), shared=False)
    run.drawn_at = time.monotonic()
    run.drawing_seconds = run.drawn_at - began
