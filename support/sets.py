"""The training and the validation set of a run, as its flags ask for them."""

import argparse
import hashlib
import json

import data
from conditioning import CONDITIONS
from support.distributed import Ranks
from support.scan import Scan, skip_lines


def open_sets(args: argparse.Namespace, found: str | Scan, codec, ranks: Ranks) -> tuple:
    """(training set, validation set) out of what `data.find_data` gave; says what is in them."""
    features = {}
    for condition in CONDITIONS.values():
        if condition.is_active(args):
            features |= condition.features(args)
    train_set, valid_set = (
        data.open_dataset(found, args.valid, split, segment_seconds=args.segment_seconds, codec=codec,
                          seed=args.seed, min_segment_ratio=args.min_segment_ratio, cache=args.cache,
                          features=features)
        for split in ("train", "valid"))
    if isinstance(found, Scan):
        ranks.print(*(f"skipped: {line}" for line in skip_lines(found.skipped)))
    ranks.print(f"train: {train_set.describe()}", f"valid: {valid_set.describe()}")
    return train_set, valid_set


def sets_fingerprint(train_set, valid_set) -> str:
    """SHA-256 of which files both sets have, by name and length, wherever they lie; the toy has none."""
    files = [[(entry.key, round(entry.seconds, 3)) for entry in one.files] for one in (train_set, valid_set)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def check_sets(args: argparse.Namespace, train_set, valid_set) -> None:
    """Errors: ValueError where a condition that is trained on has nothing to learn from in these sets."""
    for condition in CONDITIONS.values():
        if condition.is_active(args):
            condition.check_sets(args, train_set, valid_set)
