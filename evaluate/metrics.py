"""The command that measures: a run's clips on the toy (adherence.py), or two folders of audio (distances.py).

    python -m evaluate.metrics --run runs/toy --cfg 1 3      adherence at several sampling settings
                                              --conditions   given some of its conditions: what clips follow
                                              --table        beside real, coded, untrained, shuffled clips
    python -m evaluate.metrics --codec toy                   the analyser on clean clips and after a codec
                                           --fit_analyser    fits the analyser's heads (assets/) first
    python -m evaluate.metrics --reference DIR --generated DIR               Frechet distance and more
    python -m evaluate.metrics --generated DIR --clap_text --clap FOLDER     clips against their prompts

Legend: B clips, C channels, N samples.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import generate
import tokenizer
import toy
from evaluate import adherence, analyser, distances, sound
from evaluate.distances import SETS, ClipSet
from evaluate.embeddings import CHUNK_SECONDS, EMBEDDINGS, MEL_RATE, Clap, load_embedding
from support import audio, common
from support.bounds import check_flag_number
from support.decode import AUDIO_SUFFIXES
from support.quantize import STORED_AS

SAMPLING_GRID = dict(cfg=1.0, temperature=1.0, top_k=250, top_p=0.0)   # of a table, if not said
MIN_SECONDS = 0.1                                        # of audio that can be compared


# ------------------------------------------------------------------------------------------------------------
# folders of audio


def list_audio(folder: str, flag: str) -> list:
    """Audio files below a folder, sorted by name. Errors: ValueError if there are none."""
    files = [p for p in Path(folder).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file()]
    if not files:
        what = "no audio files there" if Path(folder).is_dir() else "no such folder"
        raise ValueError(f"{flag} {folder}: {what}")
    return sorted(files)


def read_chunks(files: list, seconds: float = CHUNK_SECONDS, channels: int | None = None,
                rates: tuple = (MEL_RATE,)) -> Iterator[tuple[Tensor, int]]:
    """The clips of audio files: (audio [C,N], its rate), at most so many seconds of a file each; less than
    0.1 s is left out. channels: as of `audio.read_audio`. rates: those that clips are then resampled to.

    Errors: ValueError naming a file that cannot be read: what a set consists of must not depend on luck."""
    for path in files:
        info, start = audio.audio_info(path), 0.0
        for rate in rates:
            audio.check_rate(path, info.sample_rate, rate)
        while start == 0 or info.seconds - start >= MIN_SECONDS:
            wav = audio.read_audio(path, start, seconds, channels=channels)                       # [C, N]
            if wav.shape[1] < MIN_SECONDS * info.sample_rate:
                raise ValueError(f"{path}: {info.seconds:.2f} s of audio; "
                                 f"at least {MIN_SECONDS:g} s can be compared")
            yield wav, info.sample_rate
            start += seconds


def compare_folders(args: argparse.Namespace) -> None:
    """Prints `distances.compare_sets` of --reference and --generated, and what is heard in them.

    Where both hold files of the same names, melodies are compared, and CLAP's labels pair by pair. Errors:
    ValueError."""
    if not (args.reference and args.generated):
        raise ValueError("give both --reference and --generated, folders of audio")
    if args.clap and "clap" not in args.fad_embedding and not args.clap_labels:
        raise ValueError(f"--clap {args.clap}: nothing reads it; give --fad_embedding clap or --clap_labels")
    codec = tokenizer.load_codec(args.codec)
    embeddings = [load_embedding(name, codec, args.clap) for name in dict.fromkeys(args.fad_embedding)]
    hear_labels, labels = None, None
    if args.labels:
        hear_labels, labels = analyser.hear, analyser.HEARD_VALUES
    if args.clap_labels:
        flag = f"--clap_labels {' '.join(args.clap_labels)}"
        if args.labels:
            raise ValueError(f"{flag}: not with --labels")
        if len(set(args.clap_labels)) < 2:
            raise ValueError(f"{flag}: at least two of them")
        clap, labels = Clap(args.clap), {"clap": args.clap_labels}

        def hear_labels(wav: Tensor, rate: int) -> list:
            return [{"clap": clap.label_probabilities(wav[0], rate, args.clap_labels)}]

    def hear(wav: Tensor, rate: int) -> list:                                                  # [1, C, N]
        heard = sound.measure_sound(wav[0], rate, codec.sample_rate)
        return [heard | hear_labels(wav, rate)[0]] if hear_labels else [heard]

    real, made = list_audio(args.reference, "--reference"), list_audio(args.generated, "--generated")
    paired = [p.relative_to(args.reference) for p in real] == [p.relative_to(args.generated) for p in made]
    rates = (MEL_RATE, codec.sample_rate)
    sets = {kind: ClipSet(embeddings, hear, tunes=paired) for kind in SETS}
    for number, (wav, rate) in enumerate(read_chunks(real, rates=rates)):
        distances.add_reference(sets, wav, number, rate, codec)
    for wav, rate in read_chunks(made, rates=rates):
        sets["generated"].add(wav, rate)

    for kind, folder in (("reference", args.reference), ("generated", args.generated)):
        moments = sets[kind].moments(embeddings[0])
        print(f"{kind:<10} {folder}: {moments.clips} clips, {moments.seconds:.1f} s")
    for embedding in embeddings:
        print(f"embedding  {embedding}")
    print(f"ceiling    the reference through the codec {codec.name} (fingerprint {codec.fingerprint[:12]})")
    print("floor      noise with the spectra of the reference; chroma: pairs of other clips")
    if args.clap_labels:
        how = "pair by pair" if paired else "of means over the sets"
        print(f"kl_clap    {clap.path}, {how}: {', '.join(args.clap_labels)}")
    result = distances.compare_sets(sets, labels, extrapolate=args.fad_inf)
    print(distances.distances_table(result, "against the reference"))
    print(sound.sound_table({kind: clips.heard for kind, clips in sets.items()}))


def read_prompt(path: Path) -> str:
    """The prompt of an audio file, from the json that generate.py and train.py write beside it.

    Errors: ValueError naming the file."""
    beside = path.with_suffix(".json")
    try:
        prompt = common.read_json(beside)["prompt"]
    except (ValueError, KeyError):
        raise ValueError(f"{path}: no {beside.name} beside it that holds a prompt") from None
    if not isinstance(prompt, str):
        raise ValueError(f"{path}: its prompt is {prompt!r}: text consistency is of clips that had one")
    return prompt


def text_consistency(args: argparse.Namespace) -> None:
    """Prints how near, by CLAP, the clips of --generated are to their prompts: the mean cosine similarity.

    Beside it stands the floor: each clip with the next prompt that is another. Errors: ValueError."""
    if not args.generated:
        raise ValueError("--clap_text: of which clips? Give --generated, a folder of audio with json files")
    clap = Clap(args.clap)
    files = list_audio(args.generated, "--generated")
    prompts = [read_prompt(path) for path in files]
    similarities = []
    for i, path in enumerate(files):
        other = next((p for p in prompts[i:] + prompts[:i] if p != prompts[i]), None)
        if other is None:
            raise ValueError(f"--generated {args.generated}: all clips have one prompt; "
                             "the floor needs another")
        wav, rate = audio.read_audio(path), audio.audio_info(path).sample_rate
        similarities.append(clap.similarity(wav, rate, [prompts[i], other]))
    own, others = np.mean(similarities, 0)
    print(f"clap_text of {len(files)} clips: {own:.4f} with their prompts, "
          f"{others:.4f} with those of others ({clap.path})")


# ------------------------------------------------------------------------------------------------------------
# toy clips


def load_music(args: argparse.Namespace) -> generate.MusicGenerator:
    """The model of --run. Errors: ValueError."""
    return generate.MusicGenerator.load(args.run, weights=args.weights)


def load_with_text(args: argparse.Namespace) -> generate.MusicGenerator:
    """A model that follows captions. Errors: ValueError, also for one trained without text."""
    music = load_music(args)
    if not adherence.has_text(music):
        raise ValueError(f"{args.run}: this model was trained without text, so it follows no captions")
    return music


def compare_untrained(args: argparse.Namespace) -> None:
    """Prints the clips of --run beside real ones, the codec's, an untrained model's, and what is out of
    order."""
    music = load_music(args)
    rows = adherence.compare_toy_sets(music, args.n, args.seed, args.split)
    print(adherence.rows_table(rows, f"{args.n} clips, {args.split}"))
    wrong = adherence.out_of_order(rows)
    for name, better, worse in wrong:
        print(f"out of order: {name}, {better} is not better than {worse}")
    if not wrong:
        print("in order: real, codec, trained, then untrained and shuffled")


def compare_conditions(args: argparse.Namespace) -> None:
    """Prints what the clips of --run follow, given some of its conditions, all or none. Errors:
    ValueError."""
    music = load_music(args)
    if music.model.conditioner is None:
        raise ValueError(f"{args.run}: an unconditional model follows nothing")
    rows = adherence.measure_conditions(music, args.n, args.seed)
    print(adherence.rows_table(rows, f"{args.n} clips, given"))


def follow_long(args: argparse.Namespace) -> None:
    """Prints what is heard in each second of long pieces of --run. Errors: ValueError."""
    music = load_with_text(args)
    rows = adherence.measure_long(music, args.split, args.n, args.seed, args.seconds)
    print(adherence.rows_table(rows, f"{args.n} pieces, {args.seconds:g} s"))


def compare_sampling(args: argparse.Namespace) -> None:
    """Prints a line of adherence for each combination of sampling settings. Errors: ValueError."""
    lists = [getattr(args, name) or [default] for name, default in SAMPLING_GRID.items()]
    grid = [generate.Sampling(*point) for point in itertools.product(*lists)]
    music = load_with_text(args)
    names = "".join(f"{name:>12}" for name in (*toy.VALUES, "none"))
    print(f"{args.n} clips, {args.split}: cfg temp top_k top_p |{names}")
    for sampling in grid:
        result = adherence.measure_adherence(music, args.split, args.n, args.seed, sampling=sampling)
        numbers = [result[name]["generated"] for name in toy.VALUES] + [result["instrument"]["none"]]
        print(f"{sampling.cfg:g} {sampling.temperature:g} {sampling.top_k} {sampling.top_p:g} |" +
              "".join(f"{number:>12.3f}" for number in numbers), flush=True)


def fit_analyser(codec, clips: int = 20_000) -> None:
    """Writes the toy analyser's heads, fitted on clean, degraded and round-tripped clips."""
    def through(wav: Tensor) -> Tensor:
        return codec.decode(codec.encode(wav[:, None]))[:, 0, :wav.shape[1]]                      # [B, N]
    analyser.Analyser.fit(through, clips).save()
    print(f"wrote {analyser.HEADS_FILE}")


def measure_analyser(args: argparse.Namespace) -> None:
    """Prints what the analyser hears in clean clips and after --codec, with confusions; fits it first if
    asked."""
    codec = tokenizer.load_codec(args.codec)
    if args.fit_analyser:
        fit_analyser(codec)
    clips = [toy.draw_clip(args.seed, 0, i, "valid")[0] for i in range(args.n)]
    asked = [clip.attributes() for clip in clips]
    clean = torch.from_numpy(np.stack([toy.render(clip) for clip in clips]))[:, None]             # [n, 1, N]
    heard = {
        "clean": analyser.hear(clean, toy.SAMPLE_RATE),
        "codec": analyser.hear(adherence.render_through_codec(clips, codec), codec.sample_rate),
    }
    head = f"{args.n} clips"
    print(head + "".join(f"{name:>12}" for name in toy.VALUES))
    for title, each in heard.items():
        scores = analyser.accuracy(each, asked)
        print(f"{title:<{len(head)}}" + "".join(f"{score:>12.3f}" for score in scores.values()))
    print("after the codec:")
    for name in ("instrument", "tempo"):
        print(analyser.confusion_table(heard["codec"], asked, name))


# ------------------------------------------------------------------------------------------------------------
# the command


def metrics_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m evaluate.metrics", allow_abbrev=False,
                                     description="Distances between sets of clips; adherence on toy music.")
    group = parser.add_argument_group("folders of audio").add_argument
    group("--reference", metavar="DIR", help="folder of real audio, to compare --generated with")
    group("--generated", metavar="DIR", help="folder of generated audio")
    group("--fad_embedding", nargs="+", default=["codec", "mel"], choices=EMBEDDINGS,
          help="what the Frechet distance is measured in: latents of --codec, log-mel, features of --clap")
    group("--fad_inf", action="store_true", help="also extrapolate that distance to infinitely many clips")
    group("--labels", action="store_true", help="also compare what the toy analyser hears (toy sounds only)")
    group("--clap", metavar="FOLDER", help="a CLAP model of the transformers package")
    group("--clap_text", action="store_true", help="of --generated by --clap: how near to their prompts")
    group("--clap_labels", nargs="+", default=[], metavar="TEXT",
          help="by --clap: also the divergence of how likely it finds each of these, such as instruments")
    group = parser.add_argument_group("a run on toy clips").add_argument
    group("--run", help="run folder, for a table over sampling settings")
    group("--weights", default="float32", choices=STORED_AS, help="what its matrices are held as")
    group("--cfg", type=float, nargs="+", help="guidance coefficients (default: 1)")
    group("--temperature", type=float, nargs="+", help="temperatures (default: 1)")
    group("--top_k", type=int, nargs="+", help="numbers of likeliest codes; 0 is all (default: 250)")
    group("--top_p", type=float, nargs="+", help="masses of likeliest codes; 0 is off (default: 0)")
    group("--conditions", action="store_true", help="of --run: given some conditions, what its clips follow")
    group("--table", action="store_true", help="of --run: its clips beside real, coded, untrained ones")
    group("--seconds", type=float, help="of --run: what is heard along pieces as long as this")
    group("--split", default="valid", choices=("valid", "heldout"), help="of the captions")
    group("--n", type=int, default=128, help="clips")
    group("--seed", type=int, default=1, help="of the captions and the sampling")
    group = parser.add_argument_group("the codec and the analyser").add_argument
    group("--codec", default="toy", help="toy, encodec_24khz or the path of a codec")
    group("--fit_analyser", action="store_true", help="fit the heads first, and write them to assets/")
    return parser


# What the command does by the first of these that is given; and the flags that are read then
MODES = {
    "clap_text": (text_consistency, "generated clap"),
    "reference": (compare_folders, "generated fad_embedding fad_inf labels clap clap_labels codec"),
    "generated": (compare_folders, "reference"),
    "table": (compare_untrained, "run weights split n seed"),
    "conditions": (compare_conditions, "run weights n seed"),
    "seconds": (follow_long, "run weights split n seed"),
    "run": (compare_sampling, "weights cfg temperature top_k top_p split n seed"),
    "codec": (measure_analyser, "fit_analyser n seed"),
}


@common.command("evaluate.metrics", "--n")
def main(argv: list | None = None) -> None:
    parser = metrics_parser()
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    mode = next((mode for mode in MODES if mode in given), "codec")
    measure, read = MODES[mode]
    for name in given:
        if name != mode and name not in read.split():
            alone = "of which model? Give --run (or --reference and --generated)"
            what = f"--{mode} does not read it; leave one of them out" if mode in given else alone
            raise ValueError(f"--{name}: {what}")
    if mode in ("table", "conditions", "seconds") and not args.run:
        raise ValueError(f"--{mode}: of which model? Give --run")
    check_flag_number("n", args.n, 1, 100_000)
    check_flag_number("seed", args.seed, 0, 2 ** 31 - 1)
    if args.seconds is not None:
        check_flag_number("seconds", args.seconds, 0, 600)
    measure(args)


if __name__ == "__main__":
    sys.exit(main())
