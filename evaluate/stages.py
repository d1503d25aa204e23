"""The stages of an epoch after training: valid (averaged weights), evaluate, generate (best ones), the page.

valid: the loss on held-out clips, which are encoded once. evaluate: what each condition is worth to the loss,
how near generated clips are to real ones, and on the toy set how well they follow their captions. generate:
samples to listen to.

Legend: B batch, K codebooks, T frames, C channels, N samples.
    python train.py --only valid|evaluate|generate --out runs/toy        a stage alone
"""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import data
import generate
import toy
from conditioning import text_of
from evaluate import adherence, analyser, board, distances, listen, page
from evaluate.reference import reference_curve
from interop import load
from model import MusicGen
from support import common, resume
from support.flags import segment_frames
from support.log import describe_run, loss_metrics
from support.quantize import store_weights


# --------------------------------------------------------------------------------------------------
# valid


class ValidBatch(NamedTuple):
    """A micro-batch of validation, on the host."""
    codes: Tensor                              # [B, K, T]
    frame_mask: Tensor                         # [B, T]
    loss_mask: Tensor                          # [B, T] what counts
    values: list                               # conditions of each clip, {name: value}


def valid_source(run):
    """What validation reads: the held-out clips, or the only batch there is."""
    return run.train_set if run.args.overfit_one_batch else run.valid_set


def all_conditions(run, examples: list, codes: Tensor, frame_mask: Tensor) -> tuple[list, Tensor]:
    """(conditions [{name: value}] of examples, nothing dropped, frames that count in the loss [B, T])."""
    conditioner = run.model.conditioner
    if conditioner is None:
        return [{} for _ in examples], frame_mask
    return conditioner.example_values(examples, codes, frame_mask, run.args, run.codec, step=None)


def valid_examples(args, ranks, source):
    """This rank's examples of validation, in lists: --valid_samples, rounded up to whole batches.

    Errors: ValueError where too many cannot be read."""
    updates = math.ceil(args.valid_samples / args.batch_size)
    try:
        yield from data.batches(source, 0, 0, updates, args.batch_size, rank=ranks.rank,
                                world_size=ranks.world_size, workers=args.workers)
    except ValueError as error:
        raise ValueError(f"validation: {error}") from None


def read_valid(args, ranks, train_set, valid_set) -> None:
    """Reads what validation will, for a dry run. Errors: ValueError where it cannot be read."""
    for _ in valid_examples(args, ranks, train_set if args.overfit_one_batch else valid_set):
        pass


def load_valid(run) -> list:
    """This rank's share of the validation set as [ValidBatch], encoded once. All ranks call it.

    Which segments it has depends on the flags alone. Errors: ValueError on every rank where it cannot be
    read, or has nothing that counts in the loss."""
    if run.valid_batches is not None:
        return run.valid_batches
    args, ranks, batches, problem = run.args, run.ranks, [], None
    counts = torch.zeros(run.model.config.K)
    try:
        for examples in valid_examples(args, ranks, valid_source(run)):
            for i in range(0, len(examples), args.micro_batch_size):
                part = examples[i:i + args.micro_batch_size]
                codes, frame_mask = (x.cpu() for x in data.collate(part).encode(run.codec, ranks.device))
                values, loss_mask = all_conditions(run, part, codes, frame_mask)
                batches.append(ValidBatch(codes, frame_mask, loss_mask, values))
                counts += run.model.count_targets(loss_mask)
    except ValueError as error:
        problem = str(error)
    if problem := next(filter(None, ranks.gather(problem)), None):
        raise ValueError(problem)
    if (empty := (ranks.sum(counts) == 0).tolist()) and any(empty):
        raise ValueError(f"validation: no frame of any clip counts in the loss of codebook "
                         f"{empty.index(True) + 1}: give longer clips by --valid or --segment_seconds")
    run.valid_batches = batches
    return batches


@torch.no_grad()
def mean_loss(run, model: MusicGen, change=lambda values: values) -> dict:
    """The loss of a model over the validation set; `change` may alter the list of all its conditions."""
    model.eval()
    device = run.ranks.device
    totals = torch.zeros(2, model.config.K, device=device, dtype=torch.float64)
    batches = load_valid(run)
    mine = [values for batch in batches for values in batch.values]
    changed = iter(run.ranks.apply_to_gathered(mine, run.args.batch_size, change))
    for batch in batches:
        codes, frame_mask, loss_mask = (x.to(device) for x in batch[:3])
        values, inputs = [next(changed) for _ in batch.values], None
        if model.conditioner is not None:
            inputs = model.conditioner.prepare(values, device)
        with run.autocast():
            sums = model(codes, frame_mask, inputs, None, loss_mask)
        totals += torch.stack([sums, model.count_targets(loss_mask)])
    return loss_metrics(*run.ranks.sum(totals))


def valid_stage(run) -> dict:
    """Cross-entropy of the averaged weights on the validation set."""
    began = time.perf_counter()
    model = run.ema.model if run.args.weights == "float32" else best_music(run).model
    return mean_loss(run, model) | dict(seconds=time.perf_counter() - began)


# --------------------------------------------------------------------------------------------------
# evaluate


def best_music(run) -> generate.MusicGenerator:
    """The best weights as a whole model on every rank, with the run's sampling. All ranks call it."""
    content = resume.export_best(run)
    model = store_weights(load.build_model(content).to(run.ranks.device), run.args.weights)
    sampling = generate.Sampling(**content["sampling"])
    return generate.MusicGenerator(model, run.codec, content["segment_frames"], sampling, run.dtype)


def evaluate_stage(run) -> dict:
    """What conditions are worth to the loss; how near clips are to real ones; what toy clips follow."""
    began, music = time.perf_counter(), best_music(run)
    args, ranks, model = run.args, run.ranks, music.model
    result = mean_loss(run, model)
    conditions = model.conditioner.parts if model.conditioner is not None else {}

    # the loss without each condition, and with that of another clip
    for name, condition in conditions.items():
        mine = [values[name] for batch in load_valid(run) for values in batch.values]
        if not ranks.any(any(value is not None for value in mine))[0]:
            ranks.print(f"evaluate: no clip of validation has {condition.plural}: nothing to compare")
            continue
        without = mean_loss(run, model, lambda values: [{**v, name: None} for v in values])["ce"]
        others = mean_loss(run, model, lambda values: [
            {**mine, name: next_one[name]} for mine, next_one in zip(values, values[1:] + values[:1])])["ce"]
        result |= {f"ce_no_{name}": without, f"ce_shuffled_{name}": others}
        ranks.print(f"evaluate: ce {result['ce']:.4f} with {condition.plural}, {without:.4f} without, "
                    f"{others:.4f} with those of other clips")
    if len(conditions) > 1:
        nothing = mean_loss(run, model, lambda values: [dict.fromkeys(v) for v in values])["ce"]
        result["ce_no_conditions"] = nothing
        ranks.print(f"evaluate: ce {nothing:.4f} without any condition")

    # toy clips: captions followed, and other conditions
    if args.dataset == "toy":
        if any(c.is_text for c in conditions.values()):
            result["adherence"] = toy_adherence(run, music)
        if not all(c.is_text for c in conditions.values()):
            result["given"] = adherence.measure_conditions(music, args.eval_samples, args.seed, ranks=ranks)
            ranks.print(adherence.rows_table(result["given"], f"{args.eval_samples} clips, given"))
    result["distances"] = valid_distances(run, music)
    return result | dict(seconds=time.perf_counter() - began)


def toy_adherence(run, music: generate.MusicGenerator) -> dict:
    """Caption adherence on combinations of values seen in training and on others; prints both tables."""
    args, result = run.args, {}
    for split, title in (("valid", "combinations seen in training"), ("heldout", "combinations held out")):
        table = adherence.measure_adherence(music, split, args.eval_samples, args.seed, ranks=run.ranks)
        run.ranks.print(adherence.adherence_table(table, f"{args.eval_samples} clips, {title}"))
        result[split] = table
    return result


def load_clips(source, first: int, stop: int) -> list:
    """Examples first..stop-1 of a data set. Errors: ValueError where one cannot be read."""
    examples = data.load_examples(source, 0, stop - first, first)
    if isinstance(examples, ValueError):
        raise examples
    return examples


def clip_audio(run, examples: list) -> list:
    """The audio [C, N] of examples without padding; of a token cache, what the codec makes of its codes."""
    if examples[0].wav is None:
        codes, _ = data.collate(examples).encode(run.codec, run.ranks.device)
        wavs = run.codec.decode(codes).cpu()
    else:
        wavs = [torch.from_numpy(e.wav) for e in examples]
    return [wav[:, :e.frames * run.codec.hop] for wav, e in zip(wavs, examples)]


def valid_clips(run, first: int, stop: int) -> tuple[list, list]:
    """Validation clips first..stop-1: their audio, see `clip_audio`, and their conditions {name: value}."""
    examples = load_clips(valid_source(run), first, stop)
    conditions, _ = all_conditions(run, examples, *data.collate(examples).encode(run.codec, run.ranks.device))
    return clip_audio(run, examples), conditions


def valid_distances(run, music: generate.MusicGenerator) -> dict:
    """Distances from validation clips: of clips generated for their conditions, and of training clips.

    All ranks call it."""
    args, n, seconds = run.args, run.args.eval_samples, run.args.segment_seconds

    def make(first: int, stop: int) -> tuple[list, list, list]:
        real, conditions = valid_clips(run, first, stop)
        training = clip_audio(run, load_clips(run.train_set, first, stop))
        wavs = music.decode(music.codes(conditions, seconds, args.seed, first=first), seconds)
        return real, [wav[:, :x.shape[1]] for wav, x in zip(wavs, real)], training

    is_toy = args.dataset == "toy" and args.cache is None
    long_enough = args.segment_seconds * toy.SAMPLE_RATE >= analyser.MIN_SAMPLES
    conditions = music.model.conditioner.parts.values() if music.model.conditioner is not None else []
    found = distances.against_reference(make, n, run.codec, ranks=run.ranks, labels=is_toy and long_enough,
                                      tunes=any(c.sounds_like_chroma for c in conditions))
    run.ranks.print(distances.distances_table(found, f"{n} clips beside validation clips"))
    if args.cache is not None:
        run.ranks.print("(a cache has no audio: its clips are as the codec decodes them, "
                        "and the ceiling counts it twice)")
    return found


# --------------------------------------------------------------------------------------------------
# generate


def generate_stage(run, folder: str) -> dict:
    """Writes samples for the conditions of fixed validation clips under samples/FOLDER: see listen.py.

    Once, under samples/reference, it writes the clips themselves, and what the codec leaves of them."""
    args, began = run.args, time.perf_counter()
    resume.check_folder(run)
    if not run.ranks.is_main or args.generate_samples == 0:
        resume.export_best(run, keep=False)                          # lends its shards to rank 0
        return {}
    music = best_music(run)
    real, conditions = valid_clips(run, 0, args.generate_samples)
    sets = {"reference": real, "codec": [distances.reconstruction(wav, run.codec) for wav in real]}
    sets |= make_samples(run, music, real, conditions)
    record = dict(seed=args.seed, epoch=run.step // args.updates_per_epoch, step=run.step,
                  seconds=args.segment_seconds, **asdict(music.sampling))
    problem = resume.try_to_write(write_samples, run, folder, sets, conditions, record)
    resume.note_written(run, "samples", problem, shared=False)
    return dict(samples=sum(map(len, sets.values())), folder=str(run.out / "samples" / folder),
                seconds=time.perf_counter() - began)


def make_samples(run, music: generate.MusicGenerator, real: list, conditions: list) -> dict:
    """{kind: audio [B, C, N]} for the conditions of clips, the same seed for all: see listen.SAMPLE_KINDS."""
    args, quarter = run.args, segment_frames(run.args, run.codec) // 4 * run.codec.hop          # samples
    asked = {}
    if any(conditions):
        asked["unprompted"] = dict(values=conditions)
    if quarter:
        begun = [nn.functional.pad(wav[:, :quarter], (0, max(0, quarter - wav.shape[1]))) for wav in real]
        asked["prompted"] = dict(values=conditions, prompt=torch.stack(begun))
    asked["unconditional"] = dict(values=[dict.fromkeys(c) for c in conditions])
    samples = {}
    for kind, how in asked.items():
        codes = music.codes(seconds=args.segment_seconds, seed=args.seed, **how)
        samples[kind] = music.decode(codes, args.segment_seconds, how.get("prompt"))
    return samples


def write_samples(run, folder: str, sets: dict, conditions: list, record: dict) -> None:
    """{kind: audio} as NNN_KIND.wav, each with a .json of its settings. A reference is written once."""
    samples = run.out / "samples"
    for i, clip in enumerate(conditions):
        text = text_of(clip)
        for kind, wavs in sets.items():
            name = f"{i:03d}_{kind}"
            if kind in ("reference", "codec"):
                place, settings = samples / "reference", {}
                if (place / f"{name}.json").is_file():
                    continue
            else:
                given = [k for k, v in clip.items() if v is not None and kind != "unconditional"]
                place, settings = samples / folder, dict(record, given=given)
            if kind == "prompted":
                settings["prompt_seconds"] = segment_frames(run.args, run.codec) // 4 / run.codec.frame_rate
            settings = dict(prompt=text, kind=kind, **settings)
            listen.write_sample(place, name, wavs[i], run.codec.sample_rate, settings)
            if run.board is not None:
                board.show_sample(run.board, name, place / f"{name}.wav", run.step)
        kinds = ",".join(kind for kind in sets if kind not in ("reference", "codec"))
        run.ranks.print(f"wrote {samples / folder / f'{i:03d}'}_{{{kinds}}}.wav: {text}")


def compare_with_reference(run) -> None:
    """Prints how far the validation loss is from the reference run's at the same number of updates."""
    reference = reference_curve(describe_run(run))
    theirs = {record["step"]: record for record in reference if record["stage"] == "valid"}
    mine = {record["step"]: record for record in run.history if record["stage"] == "valid"}
    if not theirs.keys() & mine.keys():
        return
    step = max(theirs.keys() & mine.keys())
    here, there = mine[step], theirs[step]
    apart = [f"{name[3:]} {here[name] - there[name]:+.4f}" for name in here if name.startswith("ce_q")]
    run.ranks.print(f"beside the reference run at step {step}: ce {here['ce']:.4f} here, {there['ce']:.4f} "
                    f"there; {', '.join(apart)}" +
                    ("; its codec is another, and so are its losses" if there["other_codec"] else ""))


def draw_page(run, final: bool) -> None:
    """Writes index.html, on rank 0.

    Epochs so short that drawing takes over a twentieth of the time share one; the last has its own."""
    if not run.ranks.is_main or not final and time.monotonic() - run.drawn_at < 20 * run.drawing_seconds:
        return
    began = time.monotonic()
    with common.left_out(page.PAGE_FILE):
        problem = resume.try_to_write(page.write_page, Path(run.out))
        resume.note_written(run, page.PAGE_FILE, problem, shared=False)
    run.drawn_at = time.monotonic()
    run.drawing_seconds = run.drawn_at - began
