"""What the evaluate stage computes: how well generated toy clips follow their captions, between chance and the ceiling.

    ceiling     clips rendered as the caption says, through the codec and back: what the analyser can hear at best
    generated   what it hears in the model's clips
    shuffled    the same clips against the captions of other clips: chance, or the metric is broken
    none        share of clips that are "none of these"
    reach       (generated - chance) / (ceiling - chance)

The accuracy of every attribute comes from toy.py's analyser, which knows nothing of the model.
Legend: B clips, C channels, N samples.
    python metrics.py --run runs/toy --cfg 1 3 --temperature 0 1     adherence at several sampling settings, as a table
    python metrics.py --codec toy                                    the analyser on clean clips and after a codec
    python metrics.py --codec toy --fit_analyser                     fits the analyser's heads again (assets/)
    python metrics.py --run runs/toy --conditions                    given text, melody, style, or some of them: what follows what
"""

import argparse
import itertools
import sys

import numpy as np
import torch
import torchaudio
from torch import Tensor

import chroma
import data
import generate
import tokenizer
import toy


def hear(wav: Tensor, sample_rate: int) -> list:
    """What the analyser hears in clips [B,C,N]: a list of {attribute: value}."""
    mono = torchaudio.functional.resample(wav.float().cpu().mean(1), sample_rate, toy.SAMPLE_RATE)       # [B, N]
    return toy.Analyser()(mono)


def rendered(clips: list, codec) -> Tensor:
    """Toy clips as a codec takes them: [B,C,N] at its rate."""
    wav = torch.from_numpy(np.stack([data.pan(toy.render(c), c, codec.channels) for c in clips]))
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
    generated, shuffled = toy.accuracy(heard, asked), toy.accuracy(heard, [asked[i] for i in order])
    ceiling = toy.accuracy(hear(round_trip(clips, codec), codec.sample_rate), asked)
    return {name: dict(generated=generated[name], ceiling=ceiling[name], chance=toy.CHANCE[name], shuffled=shuffled[name],
                       none=float(np.mean([h[name] == toy.NONE for h in heard])),
                       reach=reach(generated[name], ceiling[name], toy.CHANCE[name]))
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

    The captions start at index 100,000, far from those that validation reads. ranks: a ranks.Ranks that shares the batches
    out; each has a seed of its own, so that their number changes nothing."""
    drawn = [toy.draw(seed, 0, 100_000 + i, split) for i in range(n)]

    def make(i: int) -> list:
        texts = [text for _, text in drawn[i:i + batch]]
        return hear(music.generate(texts, toy.CLIP_SECONDS, seed=seed + i, **settings), music.codec.sample_rate)

    return adherence(share_out(make, n, batch, ranks), [clip for clip, _ in drawn], music.codec, seed)


def share_out(make, n: int, batch: int, ranks=None) -> list:
    """The lists make(0), make(batch), .. as one of n, made by all ranks, the same on each."""
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    mine = [(i, make(i)) for i in range(rank * batch, n, batch * world)]
    parts = sorted((part for share in (ranks.gather(mine) if ranks else [mine]) for part in share), key=lambda part: part[0])
    return [x for _, made in parts for x in made]


GIVEN = (("text",), ("melody",), ("style",), ("text", "melody"), ("text", "style"), ("text", "melody", "style"), ())


def toy_conditions(music, n: int, seed: int, batch: int = 64, ranks=None) -> dict:
    """How far clips follow toy clips of which the model is given text, melody, style, several of them or none.

    -> {"text+melody": {attribute: accuracy, "tune", "chroma", "shuffled"}, .., "codec": the clips themselves through the codec}.
    tune: share of beats with the right pitch class; chroma: cosine similarity with the clip's own, shuffled: with another's."""
    drawn, codec = [toy.draw(seed, 0, 100_000 + i, "valid") for i in range(n)], music.codec
    clips, rate = [clip for clip, _ in drawn], codec.sample_rate
    real = torch.cat([rendered(clips[i:i + batch], codec) for i in range(0, n, batch)])                  # [n, C, N]
    tunes = [chroma.chroma(wav, rate) for wav in real]
    given = [names for names in GIVEN if set(names) <= set(music.model.conditioner.names)]

    def judge(wav: Tensor, i: int) -> list:
        mono = torchaudio.functional.resample(wav.float().mean(1), rate, toy.SAMPLE_RATE)                # [b, N]
        return [dict(heard=heard, tune=toy.tune_accuracy(mono[j], clips[i + j]), chroma=chroma.similarity(own, tunes[i + j]),
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
    return {title: toy.accuracy([r["heard"] for r in row], asked) |
            {name: float(np.mean([r[name] for r in row])) for name in ("tune", "chroma", "shuffled")} for title, row in rows.items()}


def conditions_table(result: dict, title: str) -> str:
    """The figures of `toy_conditions` as lines to print."""
    columns = list(next(iter(result.values())))
    return "\n".join([f"{title:<24}" + "".join(f"{c:>11}" for c in columns)] +
                     [f"  {name:<22}" + "".join(f"{row[c]:>11.3f}" for c in columns) for name, row in result.items()])


def fit_analyser(codec, clips: int = 20_000) -> toy.Analyser:
    """The toy analyser with heads fitted on clean, degraded and round-tripped clips."""
    def through(wav: Tensor) -> Tensor:
        return codec.decode(codec.encode(wav[:, None]))[:, 0, :wav.shape[1]]
    return toy.Analyser.fit(through, clips)


def ceiling_report(codec, n: int, seed: int = 1) -> str:
    """Lines on what the analyser hears in clean clips and after a codec, with the confusion of instruments."""
    clips = [toy.draw(seed, 0, i, "valid")[0] for i in range(n)]
    asked = [c.attributes() for c in clips]
    clean = hear(torch.from_numpy(np.stack([toy.render(c) for c in clips]))[:, None], toy.SAMPLE_RATE)
    coded = hear(round_trip(clips, codec), codec.sample_rate)
    lines = [f"{n} clips" + "".join(f"{name:>12}" for name in toy.VALUES)]
    for title, heard in (("clean", clean), ("codec", coded)):
        lines.append(f"{title:<{len(lines[0]) - 12 * len(toy.VALUES)}}" +
                     "".join(f"{v:>12.3f}" for v in toy.accuracy(heard, asked).values()))
    return "\n".join(lines + ["after the codec:", toy.confusion(coded, asked, "instrument"),
                              toy.confusion(coded, asked, "tempo")])


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


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Caption adherence on toy music.", allow_abbrev=False)
    parser.add_argument("--run", help="run folder, for a table over sampling settings")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--top_k", type=int, nargs="+", default=[250])
    parser.add_argument("--top_p", type=float, nargs="+", default=[0.0])
    parser.add_argument("--conditions", action="store_true", help="of --run: given some of its conditions, what the clips follow")
    parser.add_argument("--split", default="valid", choices=("valid", "heldout"), help="of the captions")
    parser.add_argument("--codec", default="toy")
    parser.add_argument("--fit_analyser", action="store_true", help="fit the heads first, and write them to assets/")
    parser.add_argument("--n", type=int, default=128, help="clips")
    parser.add_argument("--seed", type=int, default=1, help="of the captions and the sampling")
    args = parser.parse_args(argv)
    try:
        for name, low in (("n", 1), ("seed", 0)):
            if not low <= (value := getattr(args, name)) < 2 ** 31:
                raise ValueError(f"--{name} {value}: at least {low}, less than 2^31")
        if args.run and args.conditions:
            music = generate.MusicGenerator.load(args.run)
            if music.model.conditioner is None:
                raise ValueError(f"{args.run}: an unconditional model follows nothing")
            print(conditions_table(toy_conditions(music, args.n, args.seed), f"{args.n} clips, given"))
            return 0
        if args.conditions:
            raise ValueError("--conditions: of which model? Give --run")
        if args.run:
            grid = itertools.product(args.cfg, args.temperature, args.top_k, args.top_p)
            sweep(args.run, [generate.Sampling(*point) for point in grid], args.n, args.seed, args.split)
            return 0
        codec = tokenizer.load_codec(args.codec)
        if args.fit_analyser:
            fit_analyser(codec).save()
            print(f"wrote {toy.ANALYSER_FILE}")
        print(ceiling_report(codec, args.n, args.seed))
    except ValueError as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
