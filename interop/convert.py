"""Converts models: published MusicGens into ours, and ours into what transformers and audiocraft load.

    python -m interop.convert DIR                                       says what a folder holds
    python -m interop.convert runs/NAME --to hf --out DIR               for transformers
    python -m interop.convert runs/NAME --to audiocraft --out DIR       for audiocraft
    python -m interop.convert runs/NAME --to peft --out DIR             a --lora run's additions, for peft
    python -m interop.convert ADAPTER --base DIR --to hf --out DIR      an adapter in the model it adds to
    python -m interop.convert PACKAGE --t5 T5_DIR --to nano --out DIR   audiocraft's package as a best.pt

A model that a target cannot express is refused with every reason. The new folder appears whole or not at all.
"""

import argparse
import os
import secrets
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import tokenizer
from interop import load, t5
from interop.adapter import is_adapter, write_adapter
from interop.audiocraft import write_package
from interop.huggingface import MELODY, TEXT, write_hf
from interop.tensors import folder_kind
from model import ModelConfig
from support import chroma, common

TARGETS = ("hf", "audiocraft", "nano", "peft")
MASKS_PADDING = {"hf": True, "audiocraft": False}        # whether padded text is hidden from a model there
PADDING_NOTES = {                                        # for a model of ours that does otherwise
    "hf": "note: this model attends to padded text, transformers hides it: a batch of texts of several "
          "lengths gives other numbers",
    "audiocraft": "note: this model hides padded text, audiocraft attends to it: a batch of texts of several "
                  "lengths gives other numbers"}
MELODY_NOTES = {
    "hf": "note: generation_config.json turns use_cache off: with it, transformers 4.57 and others of before "
          "its pull request 48679 generate without text and melody. Where it is fixed, "
          "generate(use_cache=True) is faster",
    "audiocraft": "note: audiocraft takes drums and bass out of a melody (demucs) before it reads it"}


def write_model(data: dict, target: str, out: Path, base: str | None = None) -> list:
    """Writes a model, as `read_model` gives it, into a new folder for one of TARGETS -> lines to print.

    base: for peft, the model that it began from. Errors: ValueError says what of it the target cannot
    express."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there already: name a new folder")
    codec = _load_codec(data["codec"])
    notes = []
    if target != "nano":
        conditioner = load.read_conditioner_config(data["conditioner_config"] or {"fuse": {}})
        data = {**data, "model_config": asdict(ModelConfig(**data["model_config"])),
                "conditioner_config": conditioner.to_dict()}           # older files lack what came later
        classes = "hf" if target == "peft" else target                 # peft adds to transformers' model
        if reasons := unsupported(data, codec, classes):
            raise ValueError(f"it cannot be written for {target}: {'; '.join(reasons)}")
        if "melody" in data["conditioner_config"]["fuse"]:
            notes.append(MELODY_NOTES[classes])
        elif data["model_config"]["mask_padding"] != MASKS_PADDING[classes]:
            notes.append(PADDING_NOTES[classes])
        if target == "peft" and base and (is_adapter(base) or folder_kind(load.locate(base)) != "hf"):
            notes.append("note: peft loads it onto a folder of transformers: python -m interop.convert "
                         f"{base} --to hf --out DIR writes that; name it here by --base")

    # written beside, then renamed: the folder is there whole or not at all
    temporary = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")      # no other's, no leftover
    temporary.mkdir(parents=True)
    try:
        if target == "hf":
            write_hf(data, codec, temporary)
        elif target == "audiocraft":
            write_package(data, codec, temporary)
        elif target == "peft":
            write_adapter(data, base, load.read_model, temporary)
        else:
            common.write_torch(temporary / "best.pt", data)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in sorted(out.iterdir()):
        notes.append(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return notes


def _load_codec(stored: dict):
    """The codec that a model was trained on. Errors: ValueError where it is another now."""
    stored = dict(channels=1, levels=stored["K"]) | stored           # older files: mono
    codec = tokenizer.load_codec(stored["name"], stored["levels"], "cpu", stored["channels"])
    if codec.fingerprint != stored["fingerprint"]:
        raise ValueError(f"codec {stored['name']} has fingerprint {codec.fingerprint[:12]}, the model was "
                         f"trained on codes of {stored['fingerprint'][:12]}: give that codec by --codec")
    return codec


def unsupported(data: dict, codec, target: str) -> list:
    """What of a model the target's classes cannot express, a reason each.

    data: what best.pt holds, its configs with all defaults; codec: a tokenizer.Codec."""
    config, conditioner = data["model_config"], data["conditioner_config"]
    fuse = conditioner["fuse"]
    reasons = []
    if list(fuse.items()) not in (list(TEXT.items()), list(MELODY.items())):         # in this order
        reasons.append(f"its conditions are {as_fuse_flag(fuse)}, only {as_fuse_flag(TEXT)} or "
                       f"{as_fuse_flag(MELODY)} can be written")
    elif "melody" in fuse:
        reasons += unsupported_melody(data, codec, target)
    usual = [k // codec.streams for k in range(config["K"])]
    if config["pattern"] != "delay" or (config["delays"] or list(range(config["K"]))) != usual:
        reasons.append(f"its pattern is {config['pattern']} {config['delays'] or ''}, only delay "
                       f"{' '.join(map(str, usual))} can be written")
    if codec.channels > codec.streams:
        reasons.append(f"its codec takes {codec.channels} channels at once")
    if codec.config is None:
        reasons.append("its codec's configuration is not known")
    if reasons:
        return reasons
    if target == "hf" and conditioner["text_dim"] == config["dim"]:
        weight = data["model"]["conditioner.parts.text.output_proj.weight"]
        bias = data["model"]["conditioner.parts.text.output_proj.bias"]
        if not torch.equal(weight, torch.eye(len(weight))) or bias.any():
            reasons.append(f"text encoder and model are both {config['dim']} wide, "
                           "and then transformers has no projection between them")
    if target == "audiocraft" and t5.published_t5(conditioner) is None:
        reasons.append("its text encoder is not a published T5 left as it is, "
                       "which audiocraft fetches by name")
    return reasons


def unsupported_melody(data: dict, codec, target: str) -> list:
    """The reasons of `unsupported` that a melody in front of the codes adds."""
    config, conditioner = data["model_config"], data["conditioner_config"]
    n_fft, seconds = 4 * chroma.hop_length(codec.sample_rate), data["segment_frames"] / codec.frame_rate
    frames = chroma.count_frames(int(seconds * codec.sample_rate), codec.sample_rate)
    reasons = []
    if config["mask_padding"]:
        reasons.append("it hides padding in front of the codes, which there is attended to "
                       "(train with --no-mask_padding)")
    if not conditioner["melody_null_bin0"]:
        reasons.append("without a melody it reads zeros, there the first class all along")
    if not conditioner["melody_argmax"]:
        reasons.append("its melody is of all twelve classes, there the strongest alone")
    if target == "audiocraft" and n_fft & (n_fft - 1):
        reasons.append(f"its melody is read in windows of {n_fft} samples, there only in powers of two")
    if target == "audiocraft" and conditioner["melody_frames"] != frames:
        reasons.append(f"its melody has {conditioner['melody_frames']} frames, there {frames}, "
                       f"those of {seconds:g} s")
    return reasons


def as_fuse_flag(fuse: dict) -> str:
    """{name: method} as --fuse takes it."""
    return " ".join(f"{name}={method}" for name, method in fuse.items()) or "no condition"


def describe_model(data: dict) -> list:
    """Lines on what a model is."""
    config, codec = data["model_config"], data["codec"]
    parameters = sum(x.numel() for name, x in data["model"].items() if ".encoder." not in name)
    fuse = (data["conditioner_config"] or {}).get("fuse") or {}
    conditions = ", ".join(f"{name} ({method})" for name, method in fuse.items())
    return [f"model: {parameters / 1e6:.1f}M parameters without text encoder; width {config['dim']}, "
            f"{config['num_layers']} layers, {config['num_heads']} heads; {config['K']} x {config['card']} "
            f"codes, pattern {config['pattern']}",
            f"conditions: {conditions or 'none'}",
            f"codec: {codec['name']}, fingerprint {codec['fingerprint'][:12]}"]


@common.command("interop.convert")
def main(argv: list | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m interop.convert", allow_abbrev=False,
                                     description="Published weights in, ours out.")
    parser.add_argument("model", help="run folder, best.pt, a Hugging Face folder, an adapter of peft, or "
                                      "an audiocraft package")
    parser.add_argument("--to", choices=TARGETS, help="what to write; without it, say what is there")
    parser.add_argument("--out", type=common.output_name, help="folder to write")
    parser.add_argument("--codec", help="where the codec lies, if it has moved or is not in the folder")
    parser.add_argument("--t5", help="folder with the T5 of a package: config.json, weights, spiece.model")
    parser.add_argument("--base", help="the model that an adapter adds to; with --to peft the one that the "
                                       "run began from, if it has moved")
    args = parser.parse_args(argv)
    if bool(args.to) != bool(args.out):
        parser.error("--to and --out go together")
    path = load.locate(args.model)
    if args.base and args.to != "peft" and not is_adapter(path):
        raise ValueError(f"--base {args.base}: {path} is no adapter, so it adds to nothing")
    if args.t5 and not is_adapter(path) and folder_kind(path) != "audiocraft":
        raise ValueError(f"--t5 {args.t5}: {path} is no package of audiocraft and needs none; leave it out")
    data = load.read_model(path, args.t5, args.codec, args.base)
    try:
        base = args.base or (data["args"] or {}).get("init_from")
        lines = write_model(data, args.to, Path(args.out), base) if args.to else describe_model(data)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:      # a file can lie in any way
        problem = common.describe_error(error)
        raise ValueError(f"{path}: not {common.MODEL_FILE}, or damaged ({problem})") from None
    print(*lines, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
