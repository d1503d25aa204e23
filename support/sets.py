"""The training and the validation set of a run, as its flags ask for them."""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import data
from conditioning import CONDITIONS, full_text
from support.cache import dataset_of
from support.captions import READ_ERRORS
from support.common import read_json
from support.distributed import Ranks
from support.flags import flags_by_name
from support.scan import Scan, scan_dataset, skip_lines, split_entries

NOT_YET = "not yet"  # what the other ranks hear while rank 0 scans
BEAT_SECONDS = 60  # how often: less than the least --timeout that makes sense


def find_data(args: argparse.Namespace, ranks: Ranks) -> str | Scan:
    """What `data.open_dataset` takes: the dataset scanned and split, or the name of what needs no scan.

    Rank 0 alone reads the disk. All ranks call it. Errors: ValueError, OSError on all ranks."""
    if args.cache or args.dataset == "toy":
        return args.dataset
    if not ranks.is_main:
        while (found := ranks.broadcast(None)) == NOT_YET:
            pass
    else:
        last = time.monotonic()

        def alive() -> None:
            nonlocal last
            if time.monotonic() - last > BEAT_SECONDS:
                ranks.broadcast(NOT_YET)
                last = time.monotonic()

        try:
            scanning = dict(captions=args.captions, caption_column=args.caption_column, alive=alive)
            found = scan_dataset(args.dataset, **scanning)
            found.parts = split_entries(found.entries, args.valid, begun_before(args), **scanning)
        except READ_ERRORS as error:
            found = error
        found = ranks.broadcast(found)
    if isinstance(found, Exception):
        raise found
    return found


def begun_before(args: argparse.Namespace) -> bool:
    """Whether the run in --out was begun when hashes alone split the files, see `split_by_hash`.

    Sets args.near_split, False for such a run: config.json keeps it for the next start."""
    try:
        config = read_json(Path(args.out, "config.json"))
        args.near_split = bool((config.get("args") or {}).get("near_split"))
    except (ValueError, AttributeError):  # no run, or nothing to go on from
        args.near_split = True
    return not args.near_split


def open_sets(args: argparse.Namespace, found: str | Scan, codec, ranks: Ranks) -> tuple:
    """(training set, validation set) out of what `find_data` gave; says what is in them."""
    features = {}
    for condition in CONDITIONS.values():
        if condition.is_active(args):
            features |= condition.features(args)
    train_set, valid_set = (
        data.open_dataset(found, args.valid, split, segment_seconds=args.segment_seconds, codec=codec,
                          seed=args.seed, min_segment_ratio=args.min_segment_ratio, cache=args.cache,
                          features=features, min_seconds=args.min_seconds, sample_by=args.sample_by)
        for split in ("train", "valid"))
    if isinstance(found, Scan):
        ranks.print(*found.notes, *(f"skipped: {line}" for line in skip_lines(found.skipped)))
    ranks.print(f"train: {train_set.describe()}", f"valid: {valid_set.describe()}")
    made_of = dataset_of(args.cache) if args.cache else None
    if made_of and os.path.realpath(made_of) != os.path.realpath(args.dataset):
        ranks.print(f"token cache {args.cache} was made of {made_of}, and it alone is read: --dataset "
                    f"{args.dataset} chooses defaults and nothing else")
    has_split = args.cache and any(entry.split for entry in train_set.files)
    if has_split and args.valid != flags_by_name()["valid"].default:
        ranks.print(f"--valid {args.valid} has no effect: token cache {args.cache} was made with its own")
    if any(condition.is_text and condition.is_active(args) for condition in CONDITIONS.values()):
        count, without = len(train_set.files), sum(not full_text(entry.meta) for entry in train_set.files)
        if count / 2 < without < count:
            ranks.print(f"warning: {without} of {count} files of the training set have no text: of them the "
                        "model learns nothing about captions")
    return train_set, valid_set


def sets_fingerprint(train_set, valid_set) -> str:
    """SHA-256 of which files both sets have, by name and length, wherever they lie; the toy has none."""
    files = [[(entry.key, round(entry.seconds, 3)) for entry in one.files] for one in (train_set, valid_set)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def check_sets(args: argparse.Namespace, train_set, valid_set) -> None:
    """Errors: ValueError where a condition that is trained on has nothing to learn from in these sets."""
    for condition in CONDITIONS.values():
        if condition.is_active(args):
            texts, held_out = (sum(bool(full_text(entry.meta)) for entry in one.files)
                               for one in (train_set, valid_set))
            if condition.is_text and held_out and not texts:
                raise ValueError(f"no captions to train with: the {held_out} files that have one are held "
                                 f"out for validation: give another --valid than {args.valid}, more "
                                 "captions, or train without text (--no_text)")
            condition.check_sets(args, train_set, valid_set)
