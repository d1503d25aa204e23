"""How far a model's clips follow what it was given: captions, and other conditions made of toy clips.

The toy alone can say so, because its analyser hears in audio what a caption asked for. What it hears in a
model's clips stands between chance and the ceiling:

    ceiling     clips rendered as the caption says, through the codec and back: what can be heard at best
    generated   what is heard in the model's clips
    shuffled    the same clips against the captions of other clips: at chance, or the metric is broken
    none        share of clips that are "none of these"
    reach       (generated - chance) / (ceiling - chance)

Legend: B clips, C channels, N samples.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import conditioning
import generate
import toy
from conditioning import Conditioner
from evaluate import analyser, distances
from evaluate.distances import ClipSet
from evaluate.embeddings import load_embedding
from model import MusicGen
from support import audio, chroma

FIRST_CLIP, FIRST_OTHER_CLIP = 100_000, 200_000          # indices far from those that validation reads


def render_clips(clips: list, codec, seconds: float = toy.CLIP_SECONDS) -> Tensor:
    """Toy clips as a codec takes them: [B,C,N] at its rate."""
    wavs = [toy.pan(toy.render(clip, seconds), clip, codec.channels) for clip in clips]
    return audio.resample(torch.from_numpy(np.stack(wavs)), toy.SAMPLE_RATE, codec.sample_rate)   # [B, C, N]


def render_through_codec(clips: list, codec, seconds: float = toy.CLIP_SECONDS) -> Tensor:
    """Toy clips through the codec and back: [B,C,N] at its rate."""
    device = next(codec.parameters()).device
    parts = []
    for i in range(0, len(clips), 16):
        wav = render_clips(clips[i:i + 16], codec, seconds).to(device)
        parts.append(codec.decode(codec.encode(wav)).cpu())
    return torch.cat(parts)                                                                       # [B, C, N]


def has_text(music) -> bool:
    """Whether a generate.MusicGenerator follows captions at all."""
    return any(condition.is_text for condition in music.conditions.values())


# ------------------------------------------------------------------------------------------------------------
# captions


def measure_adherence(music, split: str, n: int, seed: int, *, batch: int = 64, ranks=None,
                      sampling: generate.Sampling | None = None) -> dict:
    """How well n clips follow toy captions of a split: {attribute: {generated, ceiling, chance, shuffled,
    none, reach}}.

    music: a generate.MusicGenerator. A clip's noise depends on the seed and its number alone."""
    drawn = [toy.draw_clip(seed, 0, FIRST_CLIP + i, split) for i in range(n)]

    def make(i: int) -> list:
        texts = [text for _, text in drawn[i:i + batch]]
        wav = music.generate(texts, toy.CLIP_SECONDS, seed, sampling, first=i)                    # [b, C, N]
        return analyser.hear(wav, music.codec.sample_rate)

    heard = distances.make_in_batches(make, n, batch, ranks)
    asked = [clip.attributes() for clip, _ in drawn]
    others = [asked[i] for i in np.random.default_rng(seed).permutation(n)]
    coded = render_through_codec([clip for clip, _ in drawn], music.codec)
    generated = analyser.accuracy(heard, asked)
    shuffled = analyser.accuracy(heard, others)
    ceiling = analyser.accuracy(analyser.hear(coded, music.codec.sample_rate), asked)
    result = {}
    for name, chance in analyser.CHANCE.items():
        none = float(np.mean([h[name] == analyser.NONE for h in heard]))
        reach = float("nan")
        if ceiling[name] > chance:                       # else the codec leaves nothing to hear
            reach = (generated[name] - chance) / (ceiling[name] - chance)
        result[name] = dict(generated=generated[name], ceiling=ceiling[name], chance=chance,
                            shuffled=shuffled[name], none=none, reach=reach)
    return result


def measure_long(music, split: str, n: int, seed: int, seconds: float, batch: int = 64) -> dict:
    """What is heard along n pieces of so many seconds: {"from 0 s": {attribute: accuracy}, ..}.

    A row is the length of a toy clip, from each whole second on; "codec" are rendered pieces through the
    codec, the mean of all rows. Errors: ValueError for less than a clip."""
    if seconds < toy.CLIP_SECONDS:
        raise ValueError(f"--seconds {seconds:g}: at least a toy clip, {toy.CLIP_SECONDS:g} s")
    drawn = [toy.draw_clip(seed, 0, FIRST_CLIP + i, split) for i in range(n)]
    asked, rate = [clip.attributes() for clip, _ in drawn], music.codec.sample_rate
    starts = range(int(seconds - toy.CLIP_SECONDS + 1e-6) + 1)

    def hear_along(wav: Tensor) -> list:
        """What is heard from each start on, of each piece of [b,C,N]: [starts][b]."""
        length = round(toy.CLIP_SECONDS * rate)
        return [analyser.hear(wav[..., start * rate:start * rate + length], rate) for start in starts]

    heard, coded = [[] for _ in starts], [[] for _ in starts]
    for i in range(0, n, batch):
        clips, texts = zip(*drawn[i:i + batch])
        made = music.generate(texts, seconds, seed, first=i)                                      # [b, C, N]
        real = render_through_codec(clips, music.codec, seconds)
        for rows, wav in ((heard, made), (coded, real)):
            for row, part in zip(rows, hear_along(wav)):
                row += part
    result = {f"from {start} s": analyser.accuracy(row, asked) for start, row in zip(starts, heard)}
    ceilings = [analyser.accuracy(row, asked) for row in coded]
    result["codec"] = {name: float(np.mean([row[name] for row in ceilings])) for name in toy.VALUES}
    return result


def adherence_table(result: dict, title: str) -> str:
    """The figures of `measure_adherence` as lines to print."""
    columns = ("generated", "ceiling", "chance", "shuffled", "none", "reach")
    lines = [f"{title:<34}" + "".join(f"{column:>11}" for column in columns)]
    for name in toy.VALUES:
        lines.append(f"  {name:<32}" + "".join(f"{result[name][column]:>11.3f}" for column in columns))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# any conditions


def condition_combinations(names: list) -> list:
    """What a model of these conditions is given: each alone, the first with each other one, all, none."""
    alone = [(name,) for name in names]
    pairs = [(names[0], name) for name in names[1:]]
    return list(dict.fromkeys([*alone, *pairs, tuple(names), ()]))


def measure_conditions(music, n: int, seed: int, *, batch: int = 64, ranks=None) -> dict:
    """How far a model's clips follow toy clips of which it is given some conditions, all or none.

    {"text+melody": {attribute: accuracy, "tune", "chroma", "shuffled"}, .., "codec": the same}

        tune        share of beats with the right pitch class
        chroma      cosine similarity of the melody with the clip's own
        shuffled    the same with another clip's
        codec       of the clips themselves through the codec: the ceiling"""
    codec, rate, conditions = music.codec, music.codec.sample_rate, music.conditions
    drawn = [toy.draw_clip(seed, 0, FIRST_CLIP + i, "valid") for i in range(n)]
    clips = [clip for clip, _ in drawn]
    real = torch.cat([render_clips(clips[i:i + batch], codec) for i in range(0, n, batch)])       # [n, C, N]
    tunes = [chroma.chromagram(wav, rate) for wav in real]

    def judge(wav: Tensor, i: int) -> list:
        """What clips [b,C,N] that should be clips i.. have of them."""
        mono = audio.resample(wav.float().mean(1), rate, toy.SAMPLE_RATE)         # [b, N]
        judged = []
        for j, heard in enumerate(analyser.hear(wav, rate)):
            tune = chroma.chromagram(wav[j], rate)
            judged.append(dict(heard=heard, tune=analyser.tune_accuracy(mono[j], clips[i + j]),
                               chroma=chroma.similarity(tune, tunes[i + j]),
                               shuffled=chroma.similarity(tune, tunes[(i + j + 1) % n])))
        return judged

    def make(names: tuple, i: int) -> list:
        values = []
        for (clip, text), wav in zip(drawn[i:i + batch], real[i:i + batch]):
            given = {name: conditions[name].from_toy(clip, text, wav) for name in names}
            values.append({name: conditions[name].from_user(value, codec) for name, value in given.items()})
        codes = music.codes(values, toy.CLIP_SECONDS, seed, first=i)
        return judge(music.decode(codes, toy.CLIP_SECONDS), i)

    def make_coded(i: int) -> list:
        return judge(render_through_codec(clips[i:i + batch], codec), i)

    names = [name for name, condition in conditioning.CONDITIONS.items()
             if name in conditions and conditions[name].from_toy(*drawn[0], real[0]) is not None]
    rows = {}
    for given in condition_combinations(names):
        title = "+".join(given) or "none"
        rows[title] = distances.make_in_batches(functools.partial(make, given), n, batch, ranks)
    rows["codec"] = distances.make_in_batches(make_coded, n, batch, ranks)

    asked, result = [clip.attributes() for clip in clips], {}
    for title, row in rows.items():
        result[title] = analyser.accuracy([r["heard"] for r in row], asked)
        for name in ("tune", "chroma", "shuffled"):
            result[title][name] = float(np.mean([r[name] for r in row]))
    return result


def rows_table(result: dict, title: str) -> str:
    """{row: {column: number}}, as of `measure_conditions` and `compare_toy_sets`, as lines to print."""
    columns = list(next(iter(result.values())))
    lines = [f"{title:<24}" + "".join(f"{column:>11}" for column in columns)]
    for name, row in result.items():
        lines.append(f"  {name:<22}" + "".join(f"{row[column]:>11.3f}" for column in columns))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# a model between the real clips and an untrained one


def untrained_copy(music, seed: int) -> generate.MusicGenerator:
    """A model of the same shape, vocabulary and sampling settings, with the weights of before training."""
    old = music.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = Conditioner(old.conditioner.config, old.config.dim, old.conditioner.assets)
        model = MusicGen(old.config, conditioner)
    model = model.to(old.emb[0].weight.device)
    return generate.MusicGenerator(model, music.codec, music.window, music.sampling, music.dtype)


def compare_toy_sets(music, n: int, seed: int, split: str = "valid", batch: int = 64) -> dict:
    """Sets of n clips for the same toy captions: {set: {attribute: accuracy, "fad_codec", "fad_mel", "kl"}}.

        real         rendered as asked
        codec        these through the codec
        trained      of the model
        untrained    of the model before training
        shuffled     of the model, against the captions of other clips; its distances are those of "trained"

    kl is the mean over the attributes. The reference of every row are n other real clips: what is due to the
    number of clips is in each row, and alone in that of real ones. Errors: ValueError without text."""
    if not has_text(music):
        raise ValueError("this model was trained without text, so there are no captions to follow")
    codec, untrained = music.codec, untrained_copy(music, seed)
    embeddings = [load_embedding("codec", codec), load_embedding("mel")]
    drawn = [toy.draw_clip(seed, 0, FIRST_CLIP + i, split) for i in range(n)]
    others = [toy.draw_clip(seed, 0, FIRST_OTHER_CLIP + i, split) for i in range(n)]

    def collect(make: Callable, drawn: list) -> ClipSet:
        """The set of the clips that make(clips, texts, first number) gives, batch by batch, as [b,C,N]."""
        made = ClipSet(embeddings, analyser.hear)
        for i in range(0, n, batch):
            clips, texts = zip(*drawn[i:i + batch])
            for wav in make(clips, texts, i):
                made.add(wav, codec.sample_rate)
        return made

    def render(clips, texts, first):
        return render_clips(clips, codec)

    def render_coded(clips, texts, first):
        return render_through_codec(clips, codec)

    def generate_with(music):
        return lambda clips, texts, first: music.generate(texts, toy.CLIP_SECONDS, seed, first=first)

    reference = collect(render, others)
    sets = {
        "real": collect(render, drawn),
        "codec": collect(render_coded, drawn),
        "trained": collect(generate_with(music), drawn),
        "untrained": collect(generate_with(untrained), drawn),
    }
    sets["shuffled"] = sets["trained"]
    asked = [clip.attributes() for clip, _ in drawn]
    shuffled = [asked[i] for i in np.random.default_rng(seed).permutation(n)]

    rows = {}
    for title, clips in sets.items():
        row = rows[title] = analyser.accuracy(clips.heard, shuffled if title == "shuffled" else asked)
        for embedding in embeddings:
            a, b = reference.moments(embedding), clips.moments(embedding)
            row[f"fad_{embedding.kind}"] = distances.frechet(a, b)
        kl = []
        for name, values in analyser.HEARD_VALUES.items():
            a, b = ([heard[name] for heard in each.heard] for each in (reference, clips))
            kl.append(distances.kl_of_counts(a, b, values))
        row["kl"] = float(np.mean(kl))
    return rows


def out_of_order(rows: dict) -> list:
    """What of `compare_toy_sets` is not in the order real, codec, trained, then untrained and shuffled.

    [(figure, the set that should be better, the set that should be worse)]"""
    order = (("real", "codec"), ("codec", "trained"), ("trained", "untrained"), ("trained", "shuffled"))
    found = []
    for name in rows["real"]:
        sign = 1 if name in toy.VALUES else -1           # of an accuracy more is better, of a distance less
        for better, worse in order:
            if sign * rows[better][name] < sign * rows[worse][name]:
                found.append((name, better, worse))
    return found
