"""Does a model copy what it was trained on? It goes on from the beginnings of training clips.

MusicLM (Agostinelli et al. 2023, arXiv:2301.11325, appendix on memorization) and MusicGen (sec. 4.4) look at
the first codebook alone. The model hears the first second or three of a clip, with its caption, and continues
by the likeliest code; what it continues is compared with the clip's own codes.

    exact     share of clips of which all codes are equal
    near      share of clips of which at most one code in five differs
    equal     share of codes that are equal, mean over the clips
    nearest   share of equal codes of a passage drawn without a prompt and of the training passage nearest to
              it, wherever in the searched clips that lies: the mean over the passages, and the largest,
              with the number of its different codes. Few are silence or a tone held, and say nothing

Music repeats itself, and much of a continuation can be known from its beginning: beside the training clips
stand held-out ones, which no model can copy. What counts is by how much the first are above the second.

Legend: B batch, K codebooks, T frames, P frames of a prompt, L frames of a passage.
    python -m evaluate.memorization --run runs/NAME --prompt_seconds 1 3
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import data
import generate
from support import checkpoint, common
from support.bounds import check_flag_number
from support.distributed import join_process_group
from support.flags import fill_flags, flags_by_name, flags_of_run
from support.per_sample import Noise
from support.sets import find_data, open_sets, sets_fingerprint

NEAR = 0.8                                # share of equal codes from which a clip counts as nearly copied
LEAST_SECONDS = 0.2                       # of a continuation that says anything
PASSAGE_SECONDS = 2.0
MOST_SECONDS = 5.0                        # of a continuation, as in MusicLM
NEVER = 1_000_000                         # epochs after the last
AT_ONCE = 32                              # clips
MOVABLE = ("dataset", "valid", "captions", "cache", "codec")          # flags of what may have moved


def share_equal(found: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Share of codes [B,T] that are equal where mask [B,T] is True -> [B]."""
    return ((found == wanted) & mask).sum(1) / mask.sum(1).clamp_min(1)


def copied(shares: Tensor) -> dict:
    """exact, near and equal of the shares of equal codes of clips [B]."""
    return dict(exact=(shares == 1).float().mean().item(), near=(shares >= NEAR).float().mean().item(),
                equal=shares.mean().item())


def nearest_shares(passages: Tensor, clips: Tensor, mask: Tensor) -> Tensor:
    """The largest share of codes of each passage [B,L] that is found anywhere in the clips [N,T] -> [B].

    mask [N,T]: False at padding, where nothing is looked for."""
    L = passages.shape[1]
    windows = clips.unfold(1, L, 1)[mask.unfold(1, L, 1).all(2)]                      # [places, L]
    if not len(windows):
        return torch.zeros(len(passages))
    return torch.stack([(windows == passage).float().mean(1).max() for passage in passages])


class Clips:
    """The first n clips of an epoch: codes [n,K,T], frame_mask [n,T], conditions [{name: value}]."""

    def __init__(self, source, epoch: int, n: int, music, args: argparse.Namespace):
        """music: a generate.MusicGenerator; args: of its run. Errors: ValueError where one is unreadable."""
        parts = []
        for first in range(0, n, AT_ONCE):
            examples = data.load_examples(source, epoch, min(AT_ONCE, n - first), first)
            if isinstance(examples, ValueError):
                raise examples
            codes, mask = (x.cpu() for x in data.collate(examples).encode(music.codec, "cpu"))
            conditioner, values = music.model.conditioner, [{} for _ in examples]
            if conditioner is not None:
                values, _ = conditioner.example_values(examples, codes, mask, args, music.codec, step=None)
            parts.append((codes, mask, values))
        codes, masks, values = zip(*parts)
        self.codes, self.frame_mask = torch.cat(codes), torch.cat(masks)
        self.values = [value for part in values for value in part]


def continue_clips(music: generate.MusicGenerator, clips: Clips, P: int) -> Tensor:
    """Share of codes [n] of the first codebook that the likeliest continuation after P frames has in common
    with each clip. Clips that end before are left out."""
    last = min(clips.codes.shape[2], P + round(MOST_SECONDS * music.codec.frame_rate))
    long_enough = clips.frame_mask[:, P:].sum(1) >= LEAST_SECONDS * music.codec.frame_rate
    rows, shares = long_enough.nonzero()[:, 0].tolist(), []
    for first in range(0, len(rows), AT_ONCE):
        batch = rows[first:first + AT_ONCE]
        codes = clips.codes[batch, :, :last]
        found = generate.generate_codes(
            music.model, [clips.values[i] for i in batch], last, generate.Sampling(cfg=1, temperature=0),
            prompt=codes[..., :P], dtype=music.dtype)
        shares.append(share_equal(found[:, 0, P:].cpu(), codes[:, 0, P:], clips.frame_mask[batch, P:last]))
    return torch.cat(shares) if shares else torch.empty(0)


def draw_passages(music: generate.MusicGenerator, clips: Clips, L: int, seed: int) -> Tensor:
    """First codebooks [n,L] of samples for the conditions of clips, without their sound, from the middle."""
    T, passages = clips.codes.shape[2], []
    for first in range(0, len(clips.values), AT_ONCE):
        values = clips.values[first:first + AT_ONCE]
        found = generate.generate_codes(music.model, values, T, music.sampling, dtype=music.dtype,
                                        noise=Noise(seed, range(first, first + len(values)), "cpu"))
        passages.append(found[:, 0, (T - L) // 2:(T - L) // 2 + L].cpu())
    return torch.cat(passages)


def measure_memorization(music: generate.MusicGenerator, sets: dict, args: argparse.Namespace,
                         prompt_seconds: list, n: int, searched: int, seed: int = 0) -> list[str]:
    """The lines of the table. sets: "training" and "held out": (data set, epoch); n clips of each; passages
    are looked for in `searched` training clips. Errors: ValueError."""
    rate, lines = music.codec.frame_rate, []
    clips = {name: Clips(*each, n, music, args) for name, each in sets.items()}
    T = music.window
    for seconds in prompt_seconds:
        P = round(seconds * rate)
        if P < 1 or T - P < LEAST_SECONDS * rate:
            lines.append(f"prompt {seconds:g} s: left out, the segments last {T / rate:g} s")
            continue
        for name, each in clips.items():
            shares = continue_clips(music, each, P)
            if not len(shares):
                lines.append(f"prompt {seconds:g} s, {name}: no clip is longer")
                continue
            row = "".join(f"{key:>8} {value:.3f}" for key, value in copied(shares).items())
            lines.append(f"prompt {seconds:g} s, {name:<9} {len(shares):>5} clips{row}")

    # passages
    L = min(round(PASSAGE_SECONDS * rate), T // 2)
    place = slice((T - L) // 2, (T - L) // 2 + L)
    real = clips["held out"]
    whole = real.frame_mask[:, place].all(1)
    passages = {"generated": draw_passages(music, clips["training"], L, seed),
                "held out": real.codes[whole, 0, place]}
    pool = Clips(*sets["training"], searched, music, args)
    for name, each in passages.items():
        if len(each):
            shares = nearest_shares(each, pool.codes[:, 0], pool.frame_mask)
            different = len(each[shares.argmax()].unique())
            lines.append(f"passages of {L / rate:g} s, {name:<9} {len(each):>5} clips "
                         f"nearest {shares.mean():.3f}, at most {shares.max():.3f} "
                         f"(different codes in it: {different}), of {searched} clips")
    return lines


def flags_where_they_lie(run: str, asked: argparse.Namespace) -> argparse.Namespace:
    """The flags of a run, with the places given now. Errors: ValueError for what it has not read."""
    args = flags_of_run(["--only", "valid"], run)
    given = {name: getattr(asked, name) for name in MOVABLE if getattr(asked, name) is not None}
    if args.cache:
        read = {"cache", "codec"}
    else:
        read = {"codec"} if args.dataset == "toy" else {"dataset", "valid", "captions", "codec"}
    for name, value in given.items():
        if name not in read:
            what = f"the token cache {args.cache}" if args.cache else f"--dataset {args.dataset}"
            raise ValueError(f"--{name} {value}: {run} was trained on {what}; leave it out")
        setattr(args, name, value)
    args.out = str(Path(run).parent if Path(run).is_file() else run)
    return args


def check_data(args: argparse.Namespace, sets: tuple, moved: bool) -> None:
    """Errors: ValueError where `moved` data are not the files of the run in --out, by name and length; where
    none were said to have moved a line says so. Its last.pt knows, unless it is of an older version."""
    path = Path(args.out, checkpoint.LAST)
    try:
        saved = checkpoint.read_checkpoint_file(path, check=False)
        files, then = saved["files"], saved["data"]
    except checkpoint.UNREADABLE:
        if moved:
            common.tell(f"{path} does not say which files the run has seen: these may be others")
        return
    if files != sets_fingerprint(*sets):
        problem = f"the data are not those of {args.out}: {then} then, {sets[0].describe()} now"
        if moved:
            raise ValueError(problem)
        common.tell(problem)


@common.command("evaluate.memorization", "--n or --searched")
def main(argv: list | None = None) -> None:
    """Prints what a run's best model has in common with what it was trained on."""
    parser = argparse.ArgumentParser(prog="python -m evaluate.memorization", allow_abbrev=False,
                                     description="Does a model copy its training clips?")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--prompt_seconds", type=float, nargs="+", default=[1.0, 3.0],
                        help="how much of a clip is heard (default 1 and 3)")
    parser.add_argument("--n", type=int, default=128, help="clips of each set (default 128)")
    parser.add_argument("--searched", type=int, default=1000,
                        help="training clips that passages are looked for in (default 1000)")
    for name in MOVABLE:
        parser.add_argument(f"--{name}", help=f"where it lies, if it has moved: {flags_by_name()[name].help}")
    asked = parser.parse_args(argv)
    for name in ("n", "searched"):
        check_flag_number(name, getattr(asked, name), 1, 1_000_000)
    for seconds in asked.prompt_seconds:
        if not 0 < seconds <= 3600:
            raise ValueError(f"--prompt_seconds {seconds:g}: more than 0, at most 3600")
    args = flags_where_they_lie(asked.run, asked)
    fill_flags(args, 1)
    music = generate.MusicGenerator.load(asked.run, codec=args.codec)
    ranks = join_process_group("cpu", args.timeout)
    train_set, valid_set = open_sets(args, find_data(args, ranks), music.codec, ranks)
    if args.dataset != "toy":
        check_data(args, (train_set, valid_set), any(getattr(asked, name) for name in MOVABLE[:-1]))
    if args.overfit_one_batch:            # that batch is all it has seen
        asked.n, asked.searched = min(asked.n, args.batch_size), min(asked.searched, args.batch_size)
    # Clips of the toy are new in every epoch: those of one that never was are held out, and made alike
    held_out = (train_set, args.epochs + NEVER) if args.dataset == "toy" else (valid_set, 0)
    for line in measure_memorization(music, {"training": (train_set, 0), "held out": held_out}, args,
                                     asked.prompt_seconds, asked.n, asked.searched, args.seed):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
