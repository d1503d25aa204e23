"""What the evaluate stage computes, between chance and the ceiling: how near generated clips are to real ones, and how well toy
clips follow their captions.

    ceiling     clips rendered as the caption says, through the codec and back: what the analyser can hear at best
    generated   what it hears in the model's clips
    shuffled    the same clips against the captions of other clips: chance, or the metric is broken
    none        share of clips that are "none of these"
    reach       (generated - chance) / (ceiling - chance)

The accuracy of every attribute comes from toy.py's analyser, which knows nothing of the model.
Legend: B clips, C channels, N samples.
    python -m evaluate.metrics --run runs/toy --cfg 1 3 --temperature 0 1     adherence at several sampling settings, as a table
    python -m evaluate.metrics --codec toy                                    the analyser on clean clips and after a codec
    python -m evaluate.metrics --reference DIR --generated DIR                two folders of audio: Frechet distance and more (distances.py)
    python -m evaluate.metrics --generated DIR --clap_text --clap FOLDER      how near clips are to their prompts (in json files)
    python -m evaluate.metrics --codec toy --fit_analyser                     fits the analyser's heads again (assets/)
    python -m evaluate.metrics --run runs/toy --conditions                    given text, melody, style, or some of them: what follows what
    python -m evaluate.metrics --run runs/toy --table    real, codec, trained, untrained, shuffled captions side by side
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

from support import audio, chroma
from evaluate import analyser, distances
import generate
import tokenizer
import toy
from conditioning import Conditioner
from model import MusicGen


def hear(wav: Tensor, sample_rate: int) -> list:
    """What the analyser hears in clips [B,C,N]: a list of {attribute: value}."""
    mono = torchaudio.functional.resample(wav.float().cpu().mean(1), sample_rate, toy.SAMPLE_RATE)       # [B, N]
    return analyser.Analyser()(mono)


def rendered(clips: list, codec) -> Tensor:
    """Toy clips as a codec takes them: [B,C,N] at its rate."""
    wav = torch.from_numpy(np.stack([toy.pan(toy.render(c), c, codec.channels) for c in clips]))
    return torchaudio.functional.resample(wav, toy.SAMPLE_RATE, codec.sample_rate)


def round_trip(clips: list, codec) -> Tensor:
    """Toy clips as rendered, through the codec and back: [B,C,N] at the codec's rate."""
    device = next(codec.parameters()).device
    return torch.cat([codec.decode(codec.encode(rendered(clips[i:i + 16], codec).to(device))).cpu() for i in range(0, len(clips), 16)])


def adherence(heard: list, clips: list, codec, seed: int = 0) -> dict:
    """Caption adherence, from what was heard in clips asked to be `clips`: {attribute: {generated, ceiling, shuffled,
    chance, none, reach}}, with the list of what was heard under "heard"."""
    assert len(heard) == len(clips), f"{len(heard)} clips generated, {len(clips)} asked"
    asked = [c.attributes() for c in clips]
    order = np.random.default_rng(seed).permutation(len(asked))
    generated, shuffled = analyser.accuracy(heard, asked), analyser.accuracy(heard, [asked[i] for i in order])
    ceiling = analyser.accuracy(hear(round_trip(clips, codec), codec.sample_rate), asked)
    return {name: dict(generated=generated[name], ceiling=ceiling[name], chance=analyser.CHANCE[name], shuffled=shuffled[name],
                       none=float(np.mean([h[name] == analyser.NONE for h in heard])),
                       reach=reach(generated[name], ceiling[name], analyser.CHANCE[name]))
            for name in toy.VALUES} | {"heard": heard}


def reach(generated: float, ceiling: float, chance: float) -> float:
    """How far from chance (0) to the ceiling (1); nan where the codec leaves nothing to hear."""
    return (generated - chance) / (ceiling - chance) if ceiling > chance else float("nan")


def adherence_table(result: dict, title: str) -> str:
    """The figures of `adherence` as lines to print."""
    columns = ("generated", "ceiling", "chance", "shuffled", "none", "reach")
    lines = [f"{title:<34}" + "".join(f"{c:>11}" for c in columns)]
    for name in toy.VALUES:
        lines.append(f"  {name:<32}" + "".join(f"{result[name][c]:>11.3f}" for c in columns))
    return "\n".join(lines)


def toy_captions(music, split: str, n: int, seed: int, batch: int = 64, ranks=None, **settings) -> dict:
    """`adherence` of n clips that a generate.MusicGenerator makes for toy captions of a split.

    The captions start at index 100,000, far from those that validation reads. ranks: a distributed.Ranks that shares the batches
    out; each has a seed of its own, so that their number changes nothing."""
    drawn = [toy.draw_clip(seed, 0, 100_000 + i, split) for i in range(n)]

    def make(i: int) -> list:
        texts = [text for _, text in drawn[i:i + batch]]
        return hear(music.generate(texts, toy.CLIP_SECONDS, seed=seed + i, **settings), music.codec.sample_rate)

    return adherence(share_out(make, n, batch, ranks), [clip for clip, _ in drawn], music.codec, seed)


def share_out(make, n: int, batch: int, ranks=None) -> list:
    """The lists make(0), make(batch), .. as one of n, made by all ranks, the same on each."""
    rank, world = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    mine = [(i, make(i)) for i in range(rank * batch, n, batch * world)]
    parts = sorted((part for share in (ranks.gather(mine) if ranks else [mine]) for part in share), key=lambda part: part[0])
    return [x for _, made in parts for x in made]


GIVEN = (("text",), ("melody",), ("style",), ("text", "melody"), ("text", "style"), ("text", "melody", "style"), ())


def toy_conditions(music, n: int, seed: int, batch: int = 64, ranks=None) -> dict:
    """How far clips follow toy clips of which the model is given text, melody, style, several of them or none.

    -> {"text+melody": {attribute: accuracy, "tune", "chroma", "shuffled"}, .., "codec": the clips themselves through the codec}.
    tune: share of beats with the right pitch class; chroma: cosine similarity with the clip's own, shuffled: with another's."""
    drawn, codec = [toy.draw_clip(seed, 0, 100_000 + i, "valid") for i in range(n)], music.codec
    clips, rate = [clip for clip, _ in drawn], codec.sample_rate
    real = torch.cat([rendered(clips[i:i + batch], codec) for i in range(0, n, batch)])                  # [n, C, N]
    tunes = [chroma.chroma(wav, rate) for wav in real]
    given = [names for names in GIVEN if set(names) <= set(music.model.conditioner.names)]

    def judge(wav: Tensor, i: int) -> list:
        mono = torchaudio.functional.resample(wav.float().mean(1), rate, toy.SAMPLE_RATE)                # [b, N]
        return [dict(heard=heard, tune=analyser.tune_accuracy(mono[j], clips[i + j]), chroma=chroma.similarity(own, tunes[i + j]),
                     shuffled=chroma.similarity(own, tunes[(i + j + 1) % n]))
                for j, (heard, own) in enumerate(zip(hear(wav, rate), (chroma.chroma(x, rate) for x in wav)))]

    def make(names: tuple, i: int) -> list:
        own = slice(i, min(i + batch, n))
        audio = {name: list(real[own]) for name in ("melody", "style") if name in names}
        texts = [text if "text" in names else None for _, text in drawn[own]]
        return judge(music.generate(texts, toy.CLIP_SECONDS, seed=seed + i, **audio), i)

    rows = {"+".join(names) or "none": share_out(lambda i, names=names: make(names, i), n, batch, ranks) for names in given}
    rows["codec"] = share_out(lambda i: judge(round_trip(clips[i:i + batch], codec), i), n, batch, ranks)
    asked = [clip.attributes() for clip in clips]
    return {title: analyser.accuracy([r["heard"] for r in row], asked) |
            {name: float(np.mean([r[name] for r in row])) for name in ("tune", "chroma", "shuffled")} for title, row in rows.items()}


def conditions_table(result: dict, title: str) -> str:
    """The figures of `toy_conditions` as lines to print."""
    columns = list(next(iter(result.values())))
    return "\n".join([f"{title:<24}" + "".join(f"{c:>11}" for c in columns)] +
                     [f"  {name:<22}" + "".join(f"{row[c]:>11.3f}" for c in columns) for name, row in result.items()])


def untrained(music, seed: int) -> generate.MusicGenerator:
    """A model of the same shape, vocabulary and sampling settings whose weights are as they are drawn before training."""
    old = music.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MusicGen(old.config, Conditioner(old.conditioner.config, old.config.dim, old.conditioner.assets))
    return generate.MusicGenerator(model.to(old.emb[0].weight.device), music.codec, music.window, music.sampling, music.dtype)


def toy_sets(music, n: int, seed: int, split: str = "valid", batch: int = 64) -> dict:
    """Sets of n clips for the same toy captions, beside n other real clips:
    {"real", "codec", "trained", "untrained", "shuffled": {attribute: accuracy, "fad_codec", "fad_mel", "kl"}}.

    real: rendered as asked; codec: these through the codec; untrained: of the model before training; shuffled: the trained model's clips
    against captions of others (distances are of sets, and the same). kl: mean over the attributes. The other clips are the reference of
    every row, so what is due to the number of clips is in each, and alone in that of real ones. Errors: ValueError without text."""
    if music.model.conditioner is None or "text" not in music.model.conditioner.names:
        raise ValueError("this model was trained without text, so there are no captions to follow")
    codec, fresh = music.codec, untrained(music, seed)
    embeddings = [distances.load_embedding(name, codec) for name in ("codec", "mel")]
    drawn, others = ([toy.draw_clip(seed, 0, first + i, split) for i in range(n)] for first in (100_000, 200_000))

    def gathered(make, drawn: list = drawn) -> distances.Clips:
        clips = distances.Clips(embeddings, hear)
        for i in range(0, n, batch):
            for wav in make(*zip(*drawn[i:i + batch]), seed + i):
                clips.take(wav, codec.sample_rate)
        return clips

    makers = {"real": lambda clips, texts, seed: rendered(clips, codec), "codec": lambda clips, texts, seed: round_trip(clips, codec),
              "trained": lambda clips, texts, seed: music.generate(texts, toy.CLIP_SECONDS, seed),
              "untrained": lambda clips, texts, seed: fresh.generate(texts, toy.CLIP_SECONDS, seed)}
    reference, asked = gathered(makers["real"], others), [clip.attributes() for clip, _ in drawn]
    sets = {title: (gathered(make), asked) for title, make in makers.items()}
    sets["shuffled"] = sets["trained"][0], [asked[i] for i in np.random.default_rng(seed).permutation(n)]
    return {title: analyser.accuracy(clips.heard, asked) | apart(reference, clips) for title, (clips, asked) in sets.items()}


def apart(a: distances.Clips, b: distances.Clips) -> dict:
    """How far b is from a: Frechet distance in each embedding, and "kl", the mean divergence of what was heard over the attributes."""
    found = {f"fad_{e.name.split()[0]}": distances.frechet(distances.together(a.parts[e.name]), distances.together(b.parts[e.name]))
             for e in a.embeddings}
    kl = [distances.kl_divergence([h[name] for h in a.heard], [h[name] for h in b.heard], values) for name, values in LABELS.items()]
    return found | {"kl": float(np.mean(kl))}


def disorder(rows: dict) -> list:
    """Pairs of `toy_sets` that are not in the order real, codec, trained, then untrained and shuffled: (figure, one that should be
    better, one that should be worse)."""
    names, pairs = rows["real"], [("real", "codec"), ("codec", "trained"), ("trained", "untrained"), ("trained", "shuffled")]
    return [(name, better, worse) for name in names for better, worse in pairs
            if (rows[better][name] < rows[worse][name] if name in toy.VALUES else rows[better][name] > rows[worse][name])]


LABELS = {name: values + (analyser.NONE,) for name, values in toy.VALUES.items()}
SETS = ("reference", "generated", "codec", "noise")


def against_reference(make, n: int, codec, batch: int = 16, ranks=None, labels: bool = False, tunes: bool = False, inf: bool = False,
                      embeddings: list | None = None) -> dict:
    """`distances.compare` of n generated clips with reference clips. make(i, j) gives clips i..j-1 as two lists of audio [C,N] at
    the codec's rate: the reference and the generated ones.

    ranks: shares the batches out; each is embedded by itself and added up in its order, so that their number changes nothing."""
    embeddings = embeddings or [distances.load_embedding(name, codec) for name in ("codec", "mel")]

    def empty(groups: int = 1) -> dict:
        return {kind: distances.Clips(embeddings, hear if labels else None, tunes, groups) for kind in SETS}

    def embed(i: int) -> list:
        sets = empty()
        for number, (real, made) in enumerate(zip(*make(i, min(i + batch, n)), strict=True), i):
            distances.take_all(sets, real, number, codec.sample_rate, codec)
            sets["generated"].take(made, codec.sample_rate)
        return [{kind: clips.kept() for kind, clips in sets.items()}]

    kept = share_out(embed, n, batch, ranks)
    return distances.compare({kind: clips.merged([k[kind] for k in kept]) for kind, clips in empty().items()}, labels and LABELS, inf)


def list_audio(folder: str, flag: str) -> list:
    """Audio files below a folder, sorted by name. Errors: ValueError if there are none."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in audio.AUDIO_SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"{flag} {folder}: " + ("no audio files there" if Path(folder).is_dir() else "no such folder"))
    return found


def pieces(files: list):
    """The clips of audio files: (audio [C,N], its rate), 30 s of a file at most each; less than 0.1 s is left out.

    Errors: ValueError naming a file that cannot be read: what a set consists of must not depend on luck."""
    for path in files:
        info, start = audio.audio_info(path), 0.0
        audio.check_rate(path, info.sample_rate, distances.MEL_RATE)
        while start == 0 or info.seconds - start >= 0.1:
            wav = audio.read_audio(path, start, distances.CHUNK_SECONDS)
            if wav.shape[1] < 0.1 * info.sample_rate:
                raise ValueError(f"{path}: {info.seconds:.2f} s of audio; at least 0.1 s can be compared")
            yield wav, info.sample_rate
            start += distances.CHUNK_SECONDS


def compare_folders(reference: str, generated: str, codec, names: list, clap: str | None, inf: bool, labels: bool,
                    clap_labels: list) -> str:
    """The report of `distances.compare` on two folders of audio, as lines to print. Where both hold files of the same names, melodies
    are compared, and CLAP's labels pair by pair. Errors: ValueError."""
    embeddings = [distances.load_embedding(name, codec, clap) for name in dict.fromkeys(names)]
    hear, values = (hear_any, LABELS) if labels else (None, None)
    if clap_labels:
        if labels or len(set(clap_labels)) < 2:
            raise ValueError(f"--clap_labels {' '.join(clap_labels)}: " + ("not with --labels" if labels else "at least two of them"))
        judge, values = distances.Clap(clap), {"clap": clap_labels}
        hear = lambda wav, rate: [{"clap": judge.label_probabilities(wav[0], rate, clap_labels)}]
    files = {"reference": list_audio(reference, "--reference"), "generated": list_audio(generated, "--generated")}
    paired = [p.relative_to(reference) for p in files["reference"]] == [p.relative_to(generated) for p in files["generated"]]
    sets = {kind: distances.Clips(embeddings, hear, paired) for kind in SETS}
    for number, (wav, rate) in enumerate(pieces(files["reference"])):
        distances.take_all(sets, wav, number, rate, codec)
    for wav, rate in pieces(files["generated"]):
        sets["generated"].take(wav, rate)
    lines = [f"{kind:<10} {folder}: {distances.together(sets[kind].parts[embeddings[0].name])}".rsplit(",", 1)[0]
             for kind, folder in (("reference", reference), ("generated", generated))]
    lines += [f"embedding  {e}" for e in embeddings]
    lines.append(f"ceiling    the reference through the codec {codec.name} (fingerprint {codec.fingerprint[:12]})")
    lines.append("floor      noise with the spectra of the reference; chroma: pairs of other clips")
    if clap_labels:
        lines.append(f"kl_clap    {judge.path}, {'pair by pair' if paired else 'of means over the sets'}: {', '.join(clap_labels)}")
    return "\n".join(lines + [distances.table(distances.compare(sets, values, inf), "against the reference")])


def prompts_of(files: list) -> list:
    """The prompt of each audio file, from the json that generate.py and train.py write beside it. Errors: ValueError naming the file."""
    found = []
    for path in files:
        try:
            text = json.loads(path.with_suffix(".json").read_text("utf-8"))["prompt"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: no {path.with_suffix('.json').name} beside it that holds a prompt") from None
        if not isinstance(text, str):
            raise ValueError(f"{path}: its prompt is {text!r}: text consistency is of clips that had one")
        found.append(text)
    return found


def text_consistency(folder: str, clap: distances.Clap) -> str:
    """A line on the cosine similarity of CLAP's features of clips and of their prompts; floor: each with the next one's prompt that
    is another. Errors: ValueError."""
    files = list_audio(folder, "--generated")
    prompts, own, others = prompts_of(files), [], []
    for i, path in enumerate(files):
        other = next((p for p in prompts[i:] + prompts[:i] if p != prompts[i]), None)
        if other is None:
            raise ValueError(f"--generated {folder}: all clips have one prompt; the floor needs another")
        a, b = clap.similarity(audio.read_audio(path), audio.audio_info(path).sample_rate, [prompts[i], other])
        own, others = own + [a], others + [b]
    return (f"clap_text of {len(files)} clips: {np.mean(own):.4f} with their prompts, {np.mean(others):.4f} with those of others "
            f"({clap.path})")


def hear_any(wav: Tensor, sample_rate: int) -> list:
    """As `hear`; a clip [B,C,N] too short for the analyser is none of the sounds it knows."""
    if wav.shape[-1] / sample_rate < 1.01 * analyser.MIN_SAMPLES / toy.SAMPLE_RATE:
        return [dict.fromkeys(toy.VALUES, analyser.NONE) for _ in wav]
    return hear(wav, sample_rate)


def fit_analyser(codec, clips: int = 20_000) -> analyser.Analyser:
    """The toy analyser with heads fitted on clean, degraded and round-tripped clips."""
    def through(wav: Tensor) -> Tensor:
        return codec.decode(codec.encode(wav[:, None]))[:, 0, :wav.shape[1]]
    return analyser.Analyser.fit(through, clips)


def ceiling_report(codec, n: int, seed: int = 1) -> str:
    """Lines on what the analyser hears in clean clips and after a codec, with the confusion of instruments."""
    clips = [toy.draw_clip(seed, 0, i, "valid")[0] for i in range(n)]
    asked = [c.attributes() for c in clips]
    clean = hear(torch.from_numpy(np.stack([toy.render(c) for c in clips]))[:, None], toy.SAMPLE_RATE)
    coded = hear(round_trip(clips, codec), codec.sample_rate)
    lines = [f"{n} clips" + "".join(f"{name:>12}" for name in toy.VALUES)]
    for title, heard in (("clean", clean), ("codec", coded)):
        lines.append(f"{title:<{len(lines[0]) - 12 * len(toy.VALUES)}}" +
                     "".join(f"{v:>12.3f}" for v in analyser.accuracy(heard, asked).values()))
    return "\n".join(lines + ["after the codec:", analyser.confusion_table(coded, asked, "instrument"),
                              analyser.confusion_table(coded, asked, "tempo")])


def sweep(run: str, settings: list, n: int, seed: int, split: str) -> None:
    """Prints a line of adherence for each generate.Sampling."""
    music = generate.MusicGenerator.load(run)
    if music.model.conditioner is None or "text" not in music.model.conditioner.names:
        raise ValueError(f"{run}: this model was trained without text, so there are no captions to follow")
    print(f"{n} clips, {split}: cfg temp top_k top_p |" + "".join(f"{name:>12}" for name in toy.VALUES) + "        none")
    for sampling in settings:
        result = toy_captions(music, split, n, seed, sampling=sampling)
        print(f"{sampling.cfg:g} {sampling.temperature:g} {sampling.top_k} {sampling.top_p:g} |" +
              "".join(f"{result[name]['generated']:>12.3f}" for name in toy.VALUES) +
              f"{result['instrument']['none']:>12.3f}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description="Distances between sets of clips; caption adherence on toy music.", allow_abbrev=False)
    parser.add_argument("--reference", metavar="DIR", help="folder of real audio, to compare --generated with")
    parser.add_argument("--generated", metavar="DIR", help="folder of generated audio")
    parser.add_argument("--fad_embedding", nargs="+", default=["codec", "mel"], choices=distances.EMBEDDINGS,
                        help="what the Frechet distance is measured in: latents of --codec, log-mel statistics, features of --clap")
    parser.add_argument("--clap", metavar="FOLDER", help="a CLAP model of the transformers package")
    parser.add_argument("--clap_text", action="store_true", help="of --generated by --clap: how near clips are to their prompts")
    parser.add_argument("--clap_labels", nargs="+", default=[], metavar="TEXT",
                        help="by --clap: also the divergence of how likely it finds each of these (names of instruments, say)")
    parser.add_argument("--fad_inf", action="store_true", help="also extrapolate the Frechet distance to infinitely many clips")
    parser.add_argument("--labels", action="store_true", help="also compare what the toy analyser hears (toy sounds only)")
    parser.add_argument("--run", help="run folder, for a table over sampling settings")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--top_k", type=int, nargs="+", default=[250])
    parser.add_argument("--top_p", type=float, nargs="+", default=[0.0])
    parser.add_argument("--conditions", action="store_true", help="of --run: given some of its conditions, what the clips follow")
    parser.add_argument("--table", action="store_true", help="of --run: its clips beside real ones, the codec's, an untrained model's")
    parser.add_argument("--split", default="valid", choices=("valid", "heldout"), help="of the captions")
    parser.add_argument("--codec", default="toy")
    parser.add_argument("--fit_analyser", action="store_true", help="fit the heads first, and write them to assets/")
    parser.add_argument("--n", type=int, default=128, help="clips")
    parser.add_argument("--seed", type=int, default=1, help="of the captions and the sampling")
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints what the flags ask for. Errors: ValueError."""
    if args.clap_text:
        if not args.generated:
            raise ValueError("--clap_text: of which clips? Give --generated, a folder of audio with json files")
        print(text_consistency(args.generated, distances.Clap(args.clap)))
        return
    if args.reference or args.generated:
        if not (args.reference and args.generated):
            raise ValueError("give both --reference and --generated, folders of audio")
        print(compare_folders(args.reference, args.generated, tokenizer.load_codec(args.codec), args.fad_embedding, args.clap,
                              args.fad_inf, args.labels, args.clap_labels))
        return
    for name, low in (("n", 1), ("seed", 0)):
        if not low <= (value := getattr(args, name)) < 2 ** 31:
            raise ValueError(f"--{name} {value}: at least {low}, less than 2^31")
    for name in ("table", "conditions"):
        if getattr(args, name) and not args.run:
            raise ValueError(f"--{name}: of which model? Give --run")
    if args.table:
        rows = toy_sets(generate.MusicGenerator.load(args.run), args.n, args.seed, args.split)
        print(conditions_table(rows, f"{args.n} clips, {args.split}"))
        print("\n".join(f"out of order: {name}, {better} is not better than {worse}" for name, better, worse in disorder(rows))
              or "in order: real, codec, trained, then untrained and shuffled")
    elif args.conditions:
        music = generate.MusicGenerator.load(args.run)
        if music.model.conditioner is None:
            raise ValueError(f"{args.run}: an unconditional model follows nothing")
        print(conditions_table(toy_conditions(music, args.n, args.seed), f"{args.n} clips, given"))
    elif args.run:
        grid = itertools.product(args.cfg, args.temperature, args.top_k, args.top_p)
        sweep(args.run, [generate.Sampling(*point) for point in grid], args.n, args.seed, args.split)
    else:
        codec = tokenizer.load_codec(args.codec)
        if args.fit_analyser:
            fit_analyser(codec).save()
            print(f"wrote {analyser.HEADS_FILE}")
        print(ceiling_report(codec, args.n, args.seed))


def main(argv: list | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
