"""Flags of train.py that nothing reads in the run they are given to: they are refused, not ignored.

A run that was begun with one, before it was refused, goes on: a line says that the flag has no effect.
"""

import argparse

from conditioning import CONDITIONS

# what updates and checkpoints read, and no stage alone (--only)
IN_TRAINING = (
    "text_vocab", "dropout", "lora", "emb_std", "checkpointing", "cfg_dropout", "freeze_text_encoder",
    "word_dropout", "merge_text_p", "drop_desc_p", "keep_other_p", "epochs", "optimizer", "lr", "muon_lr",
    "text_lr", "warmup_steps", "lr_min_ratio", "beta1", "beta2", "weight_decay", "max_grad_norm",
    "max_skipped", "ema_decay", "ema_every", "init_from", "resume", "save_minutes", "sharded_checkpoint",
    "log_every", "evaluate_every", "generate_every", "tensorboard", "dry_run", "plan_gpus", "plan_tflops",
    "compile")
# and what others read than these stages
OF_SAMPLING = ("cfg", "temperature", "top_k", "top_p")
OF_OTHERS = {
    "valid": ("updates_per_epoch", "eval_samples", "generate_samples", *OF_SAMPLING),
    "evaluate": ("updates_per_epoch", "generate_samples"),
    "generate": ("valid_samples", "eval_samples"),
}


def unread_flags(args: argparse.Namespace, start=None) -> dict:
    """{name: why} of the flags that nothing reads in a run with these; values may still be left out.

    start: the model of --init_from, of `load.peek`."""
    unread = {}

    def add(why: str, *names: str) -> None:
        unread.update(dict.fromkeys(names, why))

    # the data
    if args.cache:
        add("a cache has its captions from when it was made", "captions", "caption_column")
    elif args.dataset == "toy":
        add("the toy has its own", "captions", "caption_column")
        add("the toy has no files", "valid", "min_segment_ratio", "min_seconds", "sample_by")

    # the conditions: flags of one that is not trained on, but for what switches it off
    active = [condition for condition in CONDITIONS.values() if condition.is_active(args)]
    asked = argparse.Namespace(**{**vars(args), "conditions": list(CONDITIONS)})
    for name, condition in CONDITIONS.items():
        if condition not in active:
            add(f"the model has no {name}", f"{name}_dropout")
            for flag in condition.flags:
                without = argparse.Namespace(**{**vars(asked), flag.name: flag.default})
                if condition.is_active(without) == condition.is_active(asked):
                    add(f"the model has no {name}", flag.name)
    if not any(condition.learns_at_text_lr for condition in active):
        add("nothing learns at it", "text_lr")
    idle = [name for entry in args.fuse or [] if (name := entry.partition("=")[0]) in args.conditions
            and CONDITIONS[name] not in active]
    if idle:
        add(f"the model has no {idle[0]}", "fuse")
    if not active:
        add("the model has no conditions", "fuse", "mask_padding", "cfg_dropout", "cfg")
    merging = next(flag for flag in CONDITIONS["text"].flags if flag.name == "merge_text_p")
    if not merging.expected(args):
        add("it is for merged metadata, and --merge_text_p is 0", "drop_desc_p", "keep_other_p")

    # the model it starts from
    if start is not None:
        add("the embeddings are those of --init_from", "emb_std")
        if start.conditioner is not None and "text" in start.conditioner.fuse:
            add("the vocabulary is that of --init_from", "text_vocab")
    if args.lora:
        add("--lora leaves the encoders as they are", "text_lr", "freeze_text_encoder")

    # the machine and the plan
    if args.parallel != "fsdp":
        add("only --parallel fsdp reads it", "zero", "cpu_offload")
    if not args.plan_gpus:
        add("only --plan_gpus reads it", "plan_tflops")
    if not args.dry_run:
        add("only --dry_run reads it", "plan_gpus")

    # sampling
    if args.temperature == 0:
        add("--temperature 0 takes the likeliest code", "top_k", "top_p")
    elif args.top_p:
        add(f"--top_p {args.top_p:g} goes before it", "top_k")

    # a stage alone
    if args.only:
        add("no stage alone reads it", *IN_TRAINING, *(f"{name}_dropout" for name in CONDITIONS))
        add(f"--only {args.only} does not read it", *OF_OTHERS[args.only])
    return unread


def refuse_unread(args: argparse.Namespace, given: set, begun: dict, start=None) -> list:
    """Lines on flags that nothing reads and that the run in --out was begun with.

    given: names of the flags that are not left out; begun: that run's flags; start: as in `unread_flags`.
    Errors: ValueError for any other of them that is given."""
    lines = []
    for name, why in unread_flags(args, start).items():
        value = getattr(args, name)
        shown = f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        if isinstance(value, bool):
            shown = f"--{name}" if value else f"--no-{name}"
        if name in given and begun.get(name) != value:
            raise ValueError(f"{shown}: {why}; leave it out")
        if name in given:
            lines.append(f"{shown} has no effect: {why}; the run was begun with it")
    return lines
