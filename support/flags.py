"""The flags of train.py: what they are, what follows from them, and what contradicts.

Each flag is declared once, below, with all that is to be known of it (flag.py says what that is); a condition
declares its own in its class. A flag left out is filled in by `fill_flags`: from the run that goes on, from
--init_from, from the dataset and the size, from the machine; it returns lines that say what and why.
`check_flags` refuses what cannot be. The result is an argparse.Namespace, which config.json and every
checkpoint hold as a plain dict.

    python train.py --help            the flags
    python train.py --dry_run         what was chosen, and an estimate of memory and time (estimate.py)
"""

import argparse
import math
from pathlib import Path

import torch

import toy
from conditioning import CONDITIONS, ConditionerConfig
from generate import Sampling
from interop import load
from model import SIZES
from patterns import PATTERNS
from support import common, kernels
from support.bounds import LIMITS, fits
from support.checkpoint import flags_of_checkpoint
from support.compiled import require_compiler
from support.draw import SAMPLE_BY
from support.flag import NOT_SAID, SMALL_WIDTH, Flag
from support.quantize import STORED_AS
from support.unread import OF_SAMPLING, refuse_unread

BFLOAT16_WIDTH = 128                # narrower models gain little by it on a CPU
SHAPE = ("dim", "num_layers", "num_heads", "hidden_scale")           # of a model, as --size gives it

GROUPS = {
    "data": (
        Flag("dataset", "toy, a folder of audio, or a manifest .jsonl[.gz]", default="toy"),
        Flag("captions", "a table of captions that does not lie beside or above the audio", before=None),
        Flag("caption_column", "its column of captions, or that of the tables found", before=None),
        Flag("valid", "folder, manifest, or the fraction of --dataset kept for validation", default="0.05"),
        Flag("cache", "token cache made by data.py cache; audio and codec are then not touched"),
        Flag("codec", "toy, encodec_24khz or the path of a codec (default: by dataset)",
             toy="toy", audio="encodec_24khz"),
        Flag("num_codebooks", "the first so many codebooks of a channel (default: all; 4 of encodec_24khz)",
             int, range=(1, 256), before=None),
        Flag("channels", "2: stereo, each channel with codebooks of its own",
             int, 1, choices=(1, 2), before=1),
        Flag("segment_seconds", "length of a training segment, seconds",
             float, toy=toy.CLIP_SECONDS, audio=30.0, range="clip"),
        Flag("min_segment_ratio", "least share of a segment that lies inside its file",
             float, 0.8, range="share"),
        Flag("min_seconds", "files shorter than this are left out, seconds",
             float, 0.0, range="natural", before=0.0),
        Flag("sample_by", "file: each as often as any other; duration: long ones more often",
             default="file", choices=SAMPLE_BY, before="file"),
        Flag("workers", "processes that load data (default: 0 for toy, else 4, or one a core)",
             int, toy=0, audio=4, range=(0, 512), may_change=True, of_launch=True),
    ),
    "model": (
        Flag("size", f"{', '.join(SIZES)}, or WIDTHxLAYERSxHEADS, such as 320x6x5",
             toy="tiny", audio="small"),
        Flag("pattern", "codebook pattern", default="delay", choices=PATTERNS),
        Flag("dropout", "dropout in the transformer", float, 0.0, range="share"),
        Flag("lora", "train additions of rank R to the matrices of --init_from, and nothing else",
             int, metavar="R", range=(1, 4096), of_launch=True, before=None),
        Flag("emb_std", "initial spread of the code embeddings (else: 1/sqrt(width))", float,
             toy=1.0, small=1.0),
        Flag("checkpointing", "recompute activations in backward: less memory, 4/3 the work",
             bool, False, may_change=True, of_launch=True),
    ),
    "conditions": (
        Flag("conditions", "what music is conditioned on",
             default=["text"], nargs="+", choices=CONDITIONS, before=["text"]),
        Flag("fuse", "how a condition enters: NAME=cross|prepend|sum, several joined by +", nargs="+"),
        Flag("mask_padding", "whether padded text is hidden (default: yes, or as --init_from has it)",
             bool),
        Flag("cfg_dropout", "probability that a sample loses all its conditions",
             float, toy=0.1, audio=0.3, range="share", overfit=0.0),
    ),
    "optimization": (
        Flag("epochs", "epochs; an epoch ends with validation and a checkpoint",
             int, toy=17, audio=100, range=(1, 1_000_000), overfit=1, may_change=True),
        Flag("updates_per_epoch", "optimizer steps an epoch",
             int, toy=100, audio=500, range=(1, 10_000_000), overfit=200),
        Flag("batch_size", "samples an update, over all ranks and micro-batches",
             int, toy=16, audio=32, range=(1, 65_536)),
        Flag("micro_batch_size", "samples a rank sends through at once (default: all)",
             int, range=(1, 65_536), may_change=True, of_launch=True),
        Flag("optimizer", "muon: orthogonal steps for the layers' matrices, AdamW for the rest",
             toy="muon", audio="adamw", small="muon", overfit="adamw", choices=("adamw", "muon"),
             before="adamw"),
        Flag("lr", "peak learning rate (AdamW)",
             float, toy=8e-3, audio=1e-4, small=2e-3, range="positive", overfit=1e-3),
        Flag("muon_lr", "peak learning rate of the layers' matrices under muon",
             float, toy=0.007, audio=1e-4, small=0.01, range="positive", before=None),
        Flag("text_lr", "peak learning rate of the text and style encoders",
             float, toy=1.5e-3, audio=1e-4, small=1e-3, range="positive", overfit=1e-3),
        Flag("warmup_steps", "linear warm-up, then cosine to --lr_min_ratio of the peak; short run: a tenth",
             int, toy=20, audio=1000, range="natural", overfit=20),
        Flag("lr_min_ratio", "final learning rate over the peak", float, 0.0, range="share"),
        Flag("beta1", "AdamW's decay of the mean gradient", float, 0.9, range="share"),
        Flag("beta2", "AdamW's decay of the squared gradient", float, 0.95, range="share"),
        Flag("weight_decay", "on matrices only", float, 0.1, range="natural"),
        Flag("max_grad_norm", "gradients are clipped to this norm; 0 is off", float, 1.0, range="natural"),
        Flag("max_skipped", "stop after so many updates in a row with gradients not finite",
             int, 20, range="count"),
        Flag("ema_decay", "of the averaged weights, bias-corrected; short run: over about a tenth",
             float, toy=0.99, audio=0.99, range="share"),
        Flag("ema_every", "average every so many updates, and at the end of an epoch; short run: more often",
             int, toy=1, audio=10, range="count"),
        Flag("overfit_one_batch", "the same batch in every update, no dropout: must reach ce 0",
             bool, False),
    ),
    "machine": (
        Flag("device", "cpu, cuda, cuda:1, mps (default: cuda if there is one)",
             may_change=True, of_launch=True),
        Flag("dtype", "of autocast (default: bfloat16 where it is fast, else float32)",
             choices=("float32", "bfloat16", "float16"), of_launch=True),
        Flag("compile", "torch.compile the layers; needs a C++ compiler",
             bool, False, may_change=True, of_launch=True),
        Flag("parallel", "several ranks: whole models, or shards (FSDP2)",
             default="ddp", choices=("ddp", "fsdp"), may_change=True, of_launch=True),
        Flag("zero", "fsdp: 3 gathers a layer twice a step, 2 keeps it gathered",
             int, 3, choices=(2, 3), may_change=True, of_launch=True),
        Flag("cpu_offload", "fsdp: shards and the optimizer live in the host's memory",
             bool, False, may_change=True, of_launch=True),
        Flag("timeout", "minutes a rank waits for the others before the job fails",
             float, 10.0, range="positive", may_change=True),
    ),
    "run": (
        Flag("out", "run folder (default: runs/ and the name of the cache or dataset)", common.output_name,
             may_change=True, of_launch=True),
        Flag("seed", "of weights, data, dropouts and samples", int, 0, range="natural"),
        Flag("init_from", "run folder, best.pt or published weights to start from; mono also starts stereo",
             may_change=True, of_launch=True, before=None),
        Flag("resume", "auto: go on from the folder's checkpoint",
             default="auto", choices=("auto", "never"), may_change=True, of_launch=True),
        Flag("save_minutes", "checkpoint within an epoch; 0: after every update",
             float, 10.0, range="natural", may_change=True),
        Flag("sharded_checkpoint", "all ranks write their shards, nothing is gathered",
             bool, False, may_change=True),
        Flag("log_every", "updates between log lines (default: a tenth of an epoch)",
             int, range="count", may_change=True),
        Flag("valid_samples", "segments in validation", int, toy=128, audio=512, range=(1, 100_000)),
        Flag("evaluate_every", "epochs between evaluations; 0: only at the end",
             int, toy=0, audio=25, range="natural", overfit=0, may_change=True),
        Flag("generate_every", "epochs between samples; 0: only at the end",
             int, toy=9, audio=25, range="natural", may_change=True),
        Flag("eval_samples", "clips generated for evaluation (toy: of each kind)",
             int, 128, range=(1, 100_000), may_change=True),
        Flag("generate_samples", "samples written by the generate stage",
             int, 4, range=(0, 10_000), may_change=True),
        Flag("cfg", "guidance coefficient of evaluate and generate; stored with the model",
             float, toy=1.0, audio=3.0),
        Flag("temperature", "sampling temperature; 0 takes the likeliest code; stored likewise",
             float, toy=0.3, audio=1.0),
        Flag("top_k", "sampling from the k likeliest codes; 0 is all; stored likewise",
             int, toy=50, audio=250, small=0),
        Flag("top_p", "sampling from the likeliest codes of this mass; 0 is off; stored likewise",
             float, 0.0, range="share"),
        Flag("only", "a stage alone, of the run in --out, with its flags and best weights",
             choices=("valid", "evaluate", "generate"), may_change=True, of_launch=True),
        Flag("weights", "of --only: what the best weights' matrices are held as",
             default="float32", choices=STORED_AS, may_change=True, of_launch=True, before="float32"),
        Flag("tensorboard", "also write scalars, sound and spectrograms for TensorBoard",
             bool, False, may_change=True, of_launch=True),
        Flag("dry_run", "print the estimate of memory and time, then stop",
             bool, False, may_change=True, of_launch=True),
        Flag("plan_gpus", "dry run: for so many GPUs instead of this machine",
             int, nargs="+", range=(1, 1_000_000), may_change=True, of_launch=True),
        Flag("plan_tflops", "dry run: peak of one of them (default: H100, bfloat16)",
             float, 990.0, range="positive", may_change=True, of_launch=True),
    ),
}


def all_flags() -> dict:
    """{group: [Flag]}, those of the conditions included."""
    groups = {name: list(flags) for name, flags in GROUPS.items()}
    for condition in CONDITIONS.values():
        own = Flag(f"{condition.name}_dropout", f"probability that a sample loses its {condition.name} alone",
                   float, 0.0, range="share", before=0.0)
        groups["conditions"] += [own, *condition.flags]
    return groups


def flags_by_name() -> dict:
    """{name: Flag}."""
    return {flag.name: flag for flags in all_flags().values() for flag in flags}


def build_parser() -> argparse.ArgumentParser:
    """The flags, in groups. A default of None is filled in by `fill_flags`."""
    parser = argparse.ArgumentParser(description="Train a MusicGen.", allow_abbrev=False)
    for name, flags in all_flags().items():
        group = parser.add_argument_group(name)
        for flag in flags:
            flag.add_to(group)
    return parser


# --------------------------------------------------------------------------------------------------
# what follows from the flags given


def fill_flags(args: argparse.Namespace, world: int) -> list:
    """Fills in the flags left out, in place, and returns lines that say what was chosen, by reason."""
    kind, flags = "toy" if args.dataset == "toy" else "audio", flags_by_name()
    given = {name for name, flag in flags.items() if getattr(args, name) != flag.default}
    notes = {}

    def fill(name, value, reason=None):
        if getattr(args, name) is not None or value is None:
            return
        if name == "muon_lr" and args.optimizer != "muon":
            return
        setattr(args, name, value)
        if reason is not None:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            notes[reason] = f"{notes.get(reason, f'{reason}:')} --{name} {shown}"

    # the run that goes on has what it had, whatever the defaults are now
    name = Path(args.cache or args.dataset).resolve().stem
    fill("out", f"runs/{'toy' if kind == 'toy' else name}", "by dataset")
    begun = {} if args.only else flags_of_checkpoint(Path(args.out))
    had = values_before() | begun if begun else {}
    for name, flag in flags.items():
        if name in had and (flag.by_dataset and not flag.of_launch or name == "dtype"):
            flag.check(had[name])
            fill(name, had[name], f"as the run in {args.out}")

    # the length of the run
    updates = max(1, flags["epochs"].expected(args) * flags["updates_per_epoch"].expected(args))
    for name, value in short_run_values(args, flags, updates).items():
        fill(name, value, f"for a run of {updates} updates")

    # one batch learned by heart
    if args.overfit_one_batch:
        for name, flag in flags.items():
            fill(name, flag.overfit, "overfitting one batch")
        for name in ("batch_size", "valid_samples"):
            fill(name, 4 * world, "overfitting one batch")

    # the model it starts from
    start = load.peek(args.init_from) if args.init_from else None
    if args.init_from and start is None and not begun and not args.only:
        load.read_model(args.init_from)                              # says what is wrong with it
    unread = [] if args.only else refuse_unread(args, given, begun, start)
    if start is not None:
        for name, value in flags_of_start(args, start).items():
            fill(name, value, f"as in {args.init_from}")
    fill("mask_padding", True)

    # the dataset; from random weights a small model learns real music sooner than by a large one's rates, and
    # any small one is unsure among more codes. Who gives --lr, a rate of AdamW, keeps AdamW
    if args.lora or args.lr is not None:
        fill("optimizer", "adamw", "with --lora" if args.lora else "with --lr alone")
    if kind == "audio" and not begun and not args.only:
        width = parse_size(args.size or flags["size"].audio)["dim"]
        for name, flag in flags.items() if width <= SMALL_WIDTH else ():
            if start is None or name in OF_SAMPLING:
                fill(name, flag.small, f"for a model of {SMALL_WIDTH} or less in width")
    if kind == "audio" and common.count_cores() < flags["workers"].audio:
        fill("workers", common.count_cores(), "one a core")
    for name, flag in flags.items():
        fill(name, getattr(flag, kind), f"default for {kind}")
    chosen = [CONDITIONS[name] for name in args.conditions]
    fuse = [f"{c.name}={c.default_method[kind]}" for c in chosen if isinstance(c.default_method, dict)]
    fill("fuse", fuse or None, f"default for {kind}")
    args.fuse = args.fuse or []

    # the conditions, each by itself
    for name, condition in CONDITIONS.items():
        known = start.conditioner if start is not None else None
        condition.fill_flags(args, fill, known[name] if known is not None and name in known.fuse else None)

    # the machine
    fill("device", "cuda" if torch.cuda.is_available() else "cpu", "what there is")
    common.check_device(args.device)
    fill("dtype", fastest_dtype(args.device, parse_size(args.size)["dim"]), f"best on {args.device}")
    fill("micro_batch_size", max(1, args.batch_size // world), "the rank's whole share")
    fill("log_every", max(1, args.updates_per_epoch // 10), "a tenth of an epoch")
    return [*unread, *notes.values(), *remarks(args, world, updates)]


def short_run_values(args: argparse.Namespace, flags: dict, updates: int) -> dict:
    """{name: value} where a run is too short for the usual ones: it warms up in its first tenth at most, and
    averages about its last tenth."""
    every = max(1, min(flags["ema_every"].expected(args), updates // 1000))
    most = dict(warmup_steps=updates // 10, ema_every=every)
    most["ema_decay"] = round(max(0.5, 1 - 10 * (args.ema_every or every) / updates), 3)
    return {name: value for name, value in most.items() if flags[name].expected(args) > value}


def fastest_dtype(device: str, width: int) -> str:
    """bfloat16 where a GPU or an x86 processor multiplies it, and the model is wide enough to gain by it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    multiplies = kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return "bfloat16" if multiplies and width >= BFLOAT16_WIDTH else "float32"


def remarks(args: argparse.Namespace, world: int, updates: int) -> list:
    """Lines on flags that have less of an effect than they seem to."""
    lines = []
    if args.parallel == "fsdp" and world == 1 and not args.plan_gpus:
        lines.append("--parallel fsdp: there is one rank, so nothing is sharded" +
                     (" and --cpu_offload moves nothing" if args.cpu_offload else ""))
    on_cpu = torch.device(args.device).type == "cpu" and not args.plan_gpus
    if args.dtype == "bfloat16" and on_cpu and kernels.SLOW_BFLOAT16:
        lines.append("--dtype bfloat16: without AVX-512 float32 is many times as fast on a CPU")
    if args.warmup_steps >= updates and not args.only:
        peak = args.lr * updates / (args.warmup_steps + 1)
        lines.append(f"--warmup_steps {args.warmup_steps} is no less than the {updates} updates of the run: "
                     f"the learning rate ends at {peak:.1e} of {args.lr:.1e}, still rising")
    return lines


def flags_of_start(args: argparse.Namespace, start) -> dict:
    """Flags that follow from the model of --init_from: its size, and how its conditions enter.

    start: what `load.peek` gave. Published weights also bring their codec."""
    shape = {name: getattr(start.model, name) for name in SHAPE}
    named = [name for name in SIZES if parse_size(name) == shape]
    size = named[0] if named else "x".join(map(str, shape.values())).removesuffix("x4")
    fuse = start.conditioner.fuse if start.conditioner is not None else {}
    flags = dict(mask_padding=start.model.mask_padding, size=size,
                 fuse=[f"{name}={method}" for name, method in fuse.items() if name in args.conditions])
    if start.published is not None:
        channels = start.published.channels
        flags |= dict(codec=str(start.path), num_codebooks=start.model.K // channels)
    return flags


def parse_size(size: str) -> dict:
    """What --size says of a model's shape: a name, or WIDTHxLAYERSxHEADS[xHIDDEN], the feed-forward HIDDEN
    (else 4) times as wide.

    Errors: ValueError for anything else."""
    if size in SIZES:
        return SIZES[size] | dict(hidden_scale=4)
    numbers = [int(n) if n.isdecimal() and len(n) < 10 else 0 for n in size.split("x")]
    shape = dict(zip(SHAPE, numbers + [4] * (len(numbers) == 3)))
    counted = len(shape) == 4 and len(numbers) <= 4 and all(fits(n, LIMITS[k]) for k, n in shape.items())
    if not counted or shape["dim"] % shape["num_heads"] or shape["dim"] % 2:
        most = ", ".join(f"{k} {LIMITS[k][0]} to {LIMITS[k][1]}" for k in SHAPE)
        raise ValueError(f"--size {size[:60]}: {', '.join(SIZES)}, or WIDTHxLAYERSxHEADS, such as 320x6x5: "
                         f"even, and a multiple of the heads ({most})")
    return shape


def fuse_methods(args: argparse.Namespace) -> dict:
    """{name: method} of the conditions trained on, in the order before the codes: the newest first.

    Errors: ValueError for a --fuse that is no NAME=METHOD, or of a condition that is not trained on."""
    if any(entry.count("=") != 1 for entry in args.fuse):
        raise ValueError(f"--fuse {' '.join(args.fuse)}: give NAME=METHOD, such as text=cross")
    asked = dict(entry.split("=") for entry in args.fuse)
    for name in asked:
        if name not in args.conditions:
            raise ValueError(f"--fuse {name}={asked[name]}: {name!r} is not among the --conditions "
                             f"{' '.join(args.conditions)}")
    kind = "toy" if args.dataset == "toy" else "audio"
    methods = {}
    for name, condition in reversed(CONDITIONS.items()):
        if condition.is_active(args):
            usual = condition.default_method
            if isinstance(usual, dict):
                usual = usual[kind]
            methods[name] = asked.get(name, usual)
    return methods


def segment_frames(args: argparse.Namespace, codec) -> int:
    """Frames T of a training segment."""
    return math.ceil(round(args.segment_seconds * codec.sample_rate) / codec.hop)


# --------------------------------------------------------------------------------------------------
# what contradicts


def check_flags(args: argparse.Namespace, world: int) -> None:
    """Errors: ValueError, with the way out, for flags that contradict each other or lie outside their
    range."""
    for name, flag in flags_by_name().items():
        flag.check(getattr(args, name))
    if args.seed >= 2 ** 31:
        raise ValueError(f"--seed {args.seed}: less than 2^31")
    if args.dropout == 1:
        raise ValueError("--dropout 1.0: less than 1")
    if args.emb_std is not None and not 0 < args.emb_std < 100:
        raise ValueError(f"--emb_std {args.emb_std}: more than 0, less than 100")
    Sampling(args.cfg, args.temperature, args.top_k, args.top_p)

    # samples over ranks and micro-batches
    if args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size} is over all ranks and does not divide by {world}: "
                         f"take {args.batch_size // world * world or world}")
    share = args.batch_size // world
    if share % args.micro_batch_size:
        divisors = ", ".join(str(d) for d in range(1, share + 1) if share % d == 0)
        raise ValueError(f"--micro_batch_size {args.micro_batch_size} does not divide a rank's {share} "
                         f"samples: take one of {divisors}")

    # the optimizer
    if args.lora and not args.init_from:
        raise ValueError(f"--lora {args.lora}: it adds to weights that are there: give them by --init_from")
    if args.optimizer == "muon" and args.lora:
        raise ValueError(f"--optimizer muon with --lora {args.lora}: an orthogonal step is one of a whole "
                         "matrix, an addition is a product of two: take --optimizer adamw")
    if args.optimizer != "muon" and args.muon_lr is not None:
        raise ValueError(f"--muon_lr {args.muon_lr:g}: give --optimizer muon with it")

    # the machine
    if args.dtype == "float16" and torch.device(args.device).type == "cpu":
        raise ValueError("--dtype float16 needs a GPU: take float32 or bfloat16")
    if args.compile:
        require_compiler()
    if args.weights != "float32" and not args.only:
        raise ValueError(f"--weights {args.weights}: a model is trained in float32; give it with --only")

    # the model and its conditions
    parse_size(args.size)
    ConditionerConfig(fuse_methods(args))
    for condition in CONDITIONS.values():
        condition.check_flags(args)


# --------------------------------------------------------------------------------------------------
# flags of a run that is there


def changed_flags(args: argparse.Namespace, saved: dict) -> dict:
    """Flags whose value is not that of a checkpoint: {name: (value there, value now)}.

    saved: the checkpoint's flags. One that is newer than the checkpoint had the value that its declaration
    says."""
    changed = {}
    for name, flag in flags_by_name().items():
        value = saved.get(name, flag.before)
        now = getattr(args, name)
        if value is not NOT_SAID and value != now:
            changed[name] = (value, now)
    return changed


def values_before() -> dict:
    """{name: the value that runs had before the flag came} of the flags that say so."""
    return {name: flag.before for name, flag in flags_by_name().items() if flag.before is not NOT_SAID}


def refused_changes(args: argparse.Namespace, saved: dict, moved: set = frozenset()) -> list:
    """What of `changed_flags` makes it another run: lines "--lr 0.1 there, 0.2 now".

    moved: flags whose path may be another, because the same lies there."""
    flags = flags_by_name()
    return [f"--{name} {there} there, {now} now" for name, (there, now) in changed_flags(args, saved).items()
            if not flags[name].may_change and name not in moved]


def flags_of_run(argv: list | None, out: str | None) -> argparse.Namespace:
    """The flags of the run in a folder, for --only; those given now win. Errors: ValueError."""
    if out is None:
        raise ValueError("--only: of which run? Give --out, the folder of a run that has finished an epoch")
    stored = load.read_model(out).get("args")
    if not isinstance(stored, dict):
        raise ValueError(f"{out}: its best.pt does not say how it was trained")
    flags, parser = flags_by_name(), build_parser()
    taken = {name: value for name, value in stored.items() if name in flags and not flags[name].of_launch}
    parser.set_defaults(**taken)
    args = parser.parse_args(argv)
    given = {name for name in flags if getattr(args, name) != parser.get_default(name)}
    refuse_unread(args, given, begun=stored)
    return args
