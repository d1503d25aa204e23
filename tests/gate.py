"""The gate: what the project computes, as digests to compare before and after code is moved. Not a test by itself.

    python tests/gate.py --write FILE.json        runs everything in a temporary folder and writes a digest of each figure
    python tests/gate.py --compare FILE.json      runs it again; names what differs or is missing, exit code 1 if anything is
    python tests/gate.py --compare FILE.json --only cache lora        these stages and what they need, nothing else
    ... --plain                                   every command in a Python of its own: slower, the same digests

It drives the project only through its command lines, and imports none of it: modules may move and functions may change their
names, then COMMANDS is all that has to follow. Toy runs of a few updates are trained in every mode; their logs, checkpoints,
samples, generated clips, conversions, caches and metrics are taken apart, and every part gets a digest of its own, so that a
difference says where it is. Digests are of exact bits, so they compare on one machine alone, under one release of torch. Every
process has one thread, because the order of sums depends on the number of threads; two stages run at a time.

Left out is what no two runs share: seconds and rates in logs, the length of a log in bytes (its seconds have more or fewer
digits), the release of torch, index.html, which shows them. The folder of the repository and the temporary one become words.
The codes behind a clip are in no file; its wav stands for them: 16-bit samples of other codes are other samples.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import queue
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import wave
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
COMMANDS = {                                        # what follows `python`, from the root of the repository
    "train": ["train.py"],
    "generate": ["generate.py"],
    "convert": ["-m", "interop.convert"],
    "data": ["data.py"],
    "tokenizer": ["tokenizer.py"],
    "fit": ["-m", "tools.fit_codec"],
    "metrics": ["-m", "evaluate.metrics"],
    "page": ["-m", "evaluate.page"],
    "analyser": ["-m", "evaluate.analyser"],
    "chroma": ["-m", "support.chroma"],
    "style": ["-m", "support.style"],
    "conditioning": ["conditioning.py"],
    "patterns": ["patterns.py"],
    "model": ["model.py"],
}
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}
ENVIRONMENT = {**THREADS, "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
SLOTS = 2                                           # processes at a time
TIMED = {"seconds", "frames_per_second"}            # of records in logs and histories
STAGES = {}                                         # name: (function, stages it needs, slots it takes)
TEXTS = ("a slow low organ tune in D major with drums", "fast bells")


def command(name: str, *words, processes: int = 1) -> list:
    """The words of a command of the project: its entry in COMMANDS, then `words`; under torchrun if `processes` > 1."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *several, *COMMANDS[name], *map(str, words)]


# ---------------------------------------------------------------------------------------------------------------------
# digests


def tensor_digest(x: torch.Tensor) -> str:
    """A digest of a tensor's dtype, shape and bytes."""
    content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return hashlib.sha256(f"{x.dtype} {list(x.shape)} ".encode() + content).hexdigest()


class Digests:
    """Digests by name. `folders`: {path: the word that stands for it}, so that a temporary folder changes nothing."""

    def __init__(self, folders: dict):
        self.folders, self.found = folders, {}

    def plain(self, value, dropped=frozenset()):
        """A value as JSON can hold it: tensors as their digests, folders as words, without the keys `dropped`."""
        if isinstance(value, torch.Tensor):
            return {"tensor": tensor_digest(value)}
        if isinstance(value, dict):
            return {str(k): self.plain(v, dropped) for k, v in value.items() if k not in dropped}
        if isinstance(value, (list, tuple)):
            return [self.plain(v, dropped) for v in value]
        if isinstance(value, str):
            for path, word in self.folders.items():
                value = value.replace(path, word)
        return value

    def add(self, name: str, value, dropped=frozenset()) -> None:
        """Notes the digest of a value under a name."""
        content = value if isinstance(value, bytes) else json.dumps(self.plain(value, dropped), sort_keys=True).encode()
        assert name not in self.found, name
        self.found[name] = hashlib.sha256(content).hexdigest()[:20]

    def add_parts(self, name: str, tensors: dict) -> None:
        """A dictionary of tensors in parts, by what their names begin with: "ema/..", "transformer.." and so on."""
        parts = {}
        for key, x in tensors.items():
            parts.setdefault(re.split(r"[/.]", key)[0], {})[key] = x
        for part, content in parts.items():
            self.add(f"{name}/{part}", content)

    def add_file(self, name: str, path: Path) -> None:
        """A file by its kind: JSON, checkpoints and safetensors by their content, anything else by its bytes."""
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            if isinstance(content.get("args") if isinstance(content, dict) else None, dict):
                self.add_sections(name, content)
            else:
                self.add(name, content)
        elif path.suffix in (".pt", ".bin"):
            self.add_sections(name, torch.load(path, map_location="cpu", weights_only=True))
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file
            self.add_parts(name, load_file(path))
        else:
            self.add(name, path.read_bytes())

    def add_sections(self, name: str, content: dict) -> None:
        """A checkpoint or the like: a digest for each of its sections, for each flag, for each part of the tensors."""
        for section, value in content.items():
            if section in ("log_bytes", "torch"):
                continue
            if section == "args":
                for flag, setting in value.items():
                    self.add(f"{name}/args/{flag}", setting)
            elif isinstance(value, dict) and value and all(isinstance(x, torch.Tensor) for x in value.values()):
                self.add_parts(f"{name}/{section}", value)
            else:
                self.add(f"{name}/{section}", value, TIMED if section in ("history", "metrics", "best_values") else ())

    def add_folder(self, name: str, folder: Path, pattern: str = "**/*") -> None:
        """Every file of a folder, and the list of their names."""
        paths = sorted(p for p in folder.glob(pattern) if p.is_file())
        assert paths, f"{folder} is empty"
        self.add(f"{name}/files", [str(p.relative_to(folder)) for p in paths])
        for path in paths:
            self.add_file(f"{name}/{path.relative_to(folder)}", path)

    def add_log(self, name: str, path: Path) -> None:
        """A log.jsonl: a digest for the records of each kind and stage."""
        groups = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            groups.setdefault(f"{record['kind']}_{record['stage']}", []).append(record)
        for group, records in groups.items():
            self.add(f"{name}/{group}", records, TIMED)

    def add_run(self, name: str, out: Path) -> None:
        """A run folder: the log, both checkpoints, the configuration, the samples. index.html is not compared: it shows times."""
        self.add_log(f"{name}/log.jsonl", out / "log.jsonl")
        for file in ("last.pt", "best.pt", "config.json"):
            self.add_file(f"{name}/{file}", out / file)
        self.add(f"{name}/files", sorted(p.name for p in out.iterdir()))
        if (out / "samples").is_dir():
            self.add_folder(f"{name}/samples", out / "samples")

    def add_figures(self, name: str, text: str) -> None:
        """The numbers of what a command printed, in order; its words may change."""
        self.add(name, re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", self.plain(text)))


# ---------------------------------------------------------------------------------------------------------------------
# stages


LIBRARIES = ("torch", "torchaudio", "torch._dynamo", "torch.distributed.checkpoint", "torch.utils.data", "soundfile", "sentencepiece", "tqdm",
             "safetensors.torch", "encodec.modules", "encodec.quantization", "matplotlib.figure", "matplotlib.backends.backend_agg")


class Starter:
    """Starts commands of the project without waiting for torch each time: a process that has imported the LIBRARIES, and nothing of the
    project, forks for every command, and the child runs it as `python` would. Without, a third of the time goes into imports."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--starter"], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**os.environ, **ENVIRONMENT})

    def run(self, words: list, printed: Path) -> int:
        """Runs COMMANDS' words with arguments, writes what it printed to `printed` -> exit code."""
        self.process.stdin.write(json.dumps([words, str(printed)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        """Lets the process go."""
        self.process.stdin.close()
        self.process.wait()

    @staticmethod
    def serve() -> None:
        """What the process does: reads [words, file] from the standard input, answers with exit codes."""
        for name in LIBRARIES:
            importlib.import_module(name)
        for line in sys.stdin:
            words, printed = json.loads(line)
            if (child := os.fork()) == 0:
                os._exit(Starter.become(words, printed))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

    @staticmethod
    def become(words: list, printed: str) -> int:
        """What the child does: the command, as the main module -> exit code."""
        with open(printed, "w") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        module = words[0] == "-m"
        sys.argv = words[module:]
        sys.path[0] = str(REPO if module else (REPO / words[0]).parent)
        try:
            if module:
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return code


class Stage:
    """What a stage gets: its name, the folder that all share, its own digests, and commands to run. starters: those that are free; None
    where every command is to be a process of its own."""

    def __init__(self, name: str, folder: Path, digests: Digests, starters: queue.Queue | None):
        self.name, self.folder, self.digests, self.starters = name, folder, digests, starters

    def path(self, *names) -> Path:
        """A path in the shared folder."""
        return self.folder.joinpath(*names)

    def run(self, name: str, *words, processes: int = 1) -> str:
        """Runs a command of the project and returns what it printed. Errors: RuntimeError with its last lines."""
        printed = self.path(f"{self.name}.printed.txt")
        if self.starters is None or processes > 1:
            with open(printed, "w") as file:
                code = subprocess.run(command(name, *words, processes=processes), cwd=REPO, stdout=file, stderr=subprocess.STDOUT,
                                      timeout=600, env={**os.environ, **ENVIRONMENT}).returncode
        else:
            starter = self.starters.get()
            code = starter.run(command(name, *words)[1:], printed)
            self.starters.put(starter)
        text = printed.read_text()
        printed.unlink()
        if code != 0:
            raise RuntimeError(f"{name} {' '.join(map(str, words))}: exit code {code}\n{text[-2000:]}")
        return text

    def train(self, *words, processes: int = 1) -> None:
        """Trains a run into the folder of the stage's name and digests it."""
        self.run("train", *BASE, *words, "--out", self.path(self.name), processes=processes)
        self.digests.add_run(self.name, self.path(self.name))

    def generate(self, run: str, *words, name: str | None = None) -> None:
        """Generates clips of a run and digests them with their records."""
        name = name or self.name
        self.run("generate", "--run", self.path(run), *words, "--out", self.path(name))
        self.digests.add_folder(name, self.path(name))

    def convert(self, source: str, target: str, name: str, *words) -> None:
        """Converts a model and digests the folder."""
        self.run("convert", self.path(source), "--to", target, "--out", self.path(name), *words)
        self.digests.add_folder(name, self.path(name))


def stage(*needs: str, slots: int = 1):
    """Makes a function a stage of its name, run after the stages it needs."""
    def register(function):
        STAGES[function.__name__] = (function, needs, slots)
        return function
    return register


BASE = ("--size debug --batch_size 4 --epochs 1 --updates_per_epoch 3 --valid_samples 4 --eval_samples 1 --generate_samples 0 --lr 0.01 "
        "--warmup_steps 2 --log_every 1 --device cpu").split()
LARGE = ("--conditions text melody style --fuse text=cross --epochs 2 --updates_per_epoch 10 --valid_samples 8 --eval_samples 2 "
         "--generate_samples 1 --micro_batch_size 2").split()
TUNE = "--conditions text melody --fuse text=prepend melody=prepend --no-mask_padding".split()


def write_wav(path: Path, seconds: float, seed: int, rate: int = 16_000, channels: int = 1) -> None:
    """Notes of a fifth of a second with some noise, 16 bits."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    t = np.arange(n) / rate
    lines = []
    for _ in range(channels):
        pitch = np.repeat(rng.integers(50, 80, n // (rate // 5) + 1), rate // 5)[:n]
        lines.append(0.3 * np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * t) + 0.01 * rng.standard_normal(n))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.stack(lines, 1) * 32767).astype("<i2").tobytes())


@stage()
def sounds(s: Stage) -> None:
    """The audio that others read: a tune, and a folder of music with captions."""
    music = s.path("music")
    music.mkdir()
    write_wav(s.path("tune.wav"), 1.6, 100)
    write_wav(s.path("wide.wav"), 1.0, 101, channels=2)
    for i in range(5):
        write_wav(music / f"{i}.wav", 1.5 + 0.3 * i, i, 22_050 if i == 3 else 16_000, 1 + (i == 4))
        if i % 2:
            (music / f"{i}.json").write_text(json.dumps(dict(description=f"tune number {i} of the folder", key="D", bpm=100 + i,
                                                             genre="folk", moods=["calm", "bright"])))
        else:
            (music / f"{i}.txt").write_text(f"a quiet tune with noise, take {i}")
    s.digests.add_folder("sounds", s.folder, "**/*.wav")


@stage()
def toy_run(s: Stage) -> None:
    """20 updates with text, melody and style, in micro-batches, with validation, evaluation and samples."""
    s.train(*LARGE)


@stage("toy_run")
def resumed(s: Stage) -> None:
    """The same run stopped by a signal after some updates and started again: every bit as without."""
    words, out = [*BASE, *LARGE, "--out", s.path("resumed")], s.path("resumed")
    process = subprocess.Popen(command("train", *words), cwd=REPO, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT})
    for line in process.stdout:
        if " step 4 " in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    stopped = torch.load(out / "last.pt", weights_only=True)["step"]
    assert process.returncode == 0 and 4 <= stopped < 20, f"exit code {process.returncode} after step {stopped}"
    s.run("train", *words)
    mine = Digests({str(out): f"{s.folder}/toy_run"} | s.digests.folders)
    for name in ("resumed", "toy_run"):
        mine.add_run(name, s.path(name))
    differ = [k for k, v in mine.found.items() if k.startswith("resumed/") and mine.found[f"toy_run/{k[8:]}"] != v
              and k != "resumed/files"]
    s.digests.add("resumed/differs_from_toy_run", differ)
    assert not differ, f"differs from the run without a stop: {differ}"


# Training in each of its modes: three updates, or two epochs of two.


@stage()
def text_run(s: Stage) -> None:
    """Text alone, with every kind of dropout, two epochs, samples between them."""
    s.train(*"--fuse text=cross --dropout 0.1 --word_dropout 0.2 --cfg_dropout 0.3 --text_dropout 0.1 --epochs 2 --updates_per_epoch 2 "
            "--ema_every 2 --generate_every 1 --generate_samples 1".split())


@stage()
def tune_run(s: Stage) -> None:
    """Melody and text in front of the codes, as the published melody models have them."""
    s.train(*TUNE, "--melody_dropout", "0.3", "--checkpointing")


@stage("text_run")
def stereo(s: Stage) -> None:
    """Two channels, started from the mono run."""
    s.train("--fuse", "text=cross", "--channels", "2", "--init_from", s.path("text_run"), "--segment_seconds", "0.8")


@stage("text_run")
def lora(s: Stage) -> None:
    """Additions of low rank to the text run."""
    s.train("--fuse", "text=cross", "--lora", "4", "--init_from", s.path("text_run"))


@stage()
def parallel_pattern(s: Stage) -> None:
    """All codebooks of a frame at once, without any condition, one batch over and over, the text left out."""
    s.train(*"--pattern parallel --no_text --overfit_one_batch --segment_seconds 0.8".split())


@stage()
def unrolled_pattern(s: Stage) -> None:
    """A codebook a step, fewer codebooks, bfloat16, the text summed, its encoder frozen."""
    s.train(*"--pattern unrolled --num_codebooks 2 --dtype bfloat16 --fuse text=sum --freeze_text_encoder --segment_seconds 0.8 "
            "--max_grad_norm 0.5 --lr_min_ratio 0.1".split())


@stage(slots=2)
def ddp(s: Stage) -> None:
    """Two ranks with whole models, micro-batches, all three conditions."""
    s.train(*LARGE, "--epochs", "1", "--updates_per_epoch", "2", "--micro_batch_size", "1", processes=2)


@stage(slots=2)
def fsdp(s: Stage) -> None:
    """Two ranks with a shard of the model each, gathered into one checkpoint."""
    s.train(*"--fuse text=cross --parallel fsdp --updates_per_epoch 2 --segment_seconds 0.8".split(), processes=2)


@stage()
def sharded(s: Stage) -> None:
    """A checkpoint in shards, gone on with for another epoch."""
    words = [*BASE, "--sharded_checkpoint", "--no_text", "--segment_seconds", "0.8", "--out", s.path("sharded")]
    s.run("train", *words)
    s.run("train", *words, "--epochs", "2")
    s.digests.add_run("sharded", s.path("sharded"))


# Audio of one's own, the codec, the cache.


@stage("sounds")
def folder_run(s: Stage) -> None:
    """Audio read from a folder by a second process, captions with metadata merged in, a melody, samples."""
    s.train("--dataset", s.path("music"), *TUNE, *"--valid 0.3 --segment_seconds 1 --codec toy --workers 1 --merge_text_p 0.5 "
            "--generate_samples 1".split())


@stage("sounds")
def check(s: Stage) -> None:
    """What is in a folder."""
    s.digests.add_figures("check", s.run("data", "check", s.path("music"), "--valid", "0.3"))


@stage("sounds")
def codec(s: Stage) -> None:
    """Round trips through the codec: mono, stereo, fewer codebooks."""
    for name, words in (("mono", ()), ("two_levels", ("--num_codebooks", 2)), ("stereo", ("--channels", 2))):
        printed = s.run("tokenizer", s.path("wide.wav" if name == "stereo" else "tune.wav"), s.path(f"{name}_back.wav"), *words)
        s.digests.add_figures(f"codec/{name}/figures", printed)
        s.digests.add_file(f"codec/{name}/wav", s.path(f"{name}_back.wav"))


@stage()
def fitted_codec(s: Stage) -> None:
    """A small codec fitted with the discriminator, stopped on the way and gone on with."""
    words = ["--dataset", "toy", "--out", s.path("codec.pt"), *"--steps 8 --filters 2 --ratios 20 16 --dim 16 --card 16 --codebooks 2 "
             "--batch_size 2 --residual_layers 1 --adversarial --segment_seconds 0.4".split()]
    s.run("fit", *words, "--stop_after", 4)
    s.run("fit", *words)
    s.digests.add_file("fitted_codec", s.path("codec.pt"))


@stage("sounds", "fitted_codec")
def cache(s: Stage) -> None:
    """A token cache of the folder by the fitted codec."""
    s.run("data", "cache", s.path("music"), "--codec", s.path("codec.pt"), "--out", s.path("cache"))
    s.digests.add_folder("cache/folder", s.path("cache"))


@stage("cache")
def cache_run(s: Stage) -> None:
    """Trained from the cache, with a melody and a style; the codec is the fitted one."""
    s.train("--dataset", s.path("music"), "--cache", s.path("cache"), "--codec", s.path("codec.pt"), "--conditions", "text", "melody", "style",
            "--fuse", "text=prepend", *"--valid 0.3 --segment_seconds 1 --workers 0 --generate_samples 1".split())


# Generation. Greedy clips have no randomness but the model's; the others have seeds.


@stage("toy_run")
def greedy(s: Stage) -> None:
    """The likeliest codes for two texts."""
    s.generate("toy_run", "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--temperature", 0, "--cfg", 1)


@stage("toy_run", "sounds")
def guided(s: Stage) -> None:
    """The likeliest codes with guidance: by a text, by a text and a melody, by a style, by all of them with double guidance."""
    greedy = ("--temperature", 0, "--cfg", 3)
    s.generate("toy_run", "--prompt", TEXTS[0], *greedy, name="guided/text")
    s.generate("toy_run", "--prompt", TEXTS[0], "--melody", s.path("tune.wav"), *greedy, name="guided/melody")
    s.generate("toy_run", "--style", s.path("tune.wav"), *greedy, name="guided/style")
    s.generate("toy_run", "--prompt", TEXTS[0], "--melody", s.path("tune.wav"), "--style", s.path("tune.wav"), *greedy, "--cfg_style", 3,
               name="guided/double")


@stage("toy_run", "sounds")
def sampled(s: Stage) -> None:
    """Sampled clips: several of a text; by their mass; without a text; a file gone on with."""
    s.generate("toy_run", "--prompt", TEXTS[0], "--n", 2, "--seed", 3, "--temperature", 1, "--top_k", 50, "--cfg", 2, name="sampled/top_k")
    s.generate("toy_run", "--unconditional", "--seed", 4, "--temperature", 0.8, "--top_p", 0.9, "--seconds", 0.7, name="sampled/top_p")
    s.generate("toy_run", "--prompt", TEXTS[1], "--continue", s.path("wide.wav"), "--temperature", 1, "--top_k", 0, name="sampled/continued")


@stage("toy_run", "sounds")
def windows(s: Stage) -> None:
    """A clip of several windows, with a melody that is read on in each."""
    s.generate("toy_run", "--prompt", TEXTS[0], "--melody", s.path("tune.wav"), "--seconds", 4, "--stride", 1, "--temperature", 1)


@stage("stereo", "unrolled_pattern", "parallel_pattern", "lora", "cache_run")
def other_runs(s: Stage) -> None:
    """A sampled clip of each of the other runs."""
    for run in ("stereo", "unrolled_pattern", "lora", "cache_run"):
        s.generate(run, "--prompt", TEXTS[1], "--seconds", 0.6, "--temperature", 1, "--cfg", 3, name=f"other_runs/{run}")
    s.generate("parallel_pattern", "--unconditional", "--seconds", 0.6, "--temperature", 1, name="other_runs/parallel_pattern")


# Conversion.


def grow_t5(source: Path, target: Path, t5: Path, seed: int = 0) -> None:
    """A Hugging Face folder like `source` whose text encoder is as large as t5-small, with random weights, and `t5`, the encoder alone:
    only a model over a published T5 can be written as a package of audiocraft."""
    from safetensors.torch import load_file, save_file
    shape = dict(d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=2048, vocab_size=32128)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    width = config["decoder"]["hidden_size"]
    draws = torch.Generator().manual_seed(seed)
    sizes = {"shared.weight": (32128, 512), "encoder.final_layer_norm.weight": (512,),
             "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8)}
    for i in range(6):
        block = f"encoder.block.{i}.layer"
        sizes |= {f"{block}.0.SelfAttention.{n}.weight": (512, 512) for n in "qkvo"}
        sizes |= {f"{block}.{n}.layer_norm.weight": (512,) for n in (0, 1)}
        sizes |= {f"{block}.1.DenseReluDense.wi.weight": (2048, 512), f"{block}.1.DenseReluDense.wo.weight": (512, 2048)}
    encoder = {name: torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=draws) for name, size in sizes.items()}
    tensors = {name: x for name, x in tensors.items() if not name.startswith("text_encoder.")}
    tensors["enc_to_dec_proj.weight"] = 0.05 * torch.randn(width, 512, generator=draws)
    tensors |= {f"text_encoder.{name}": x for name, x in encoder.items()}
    config["text_encoder"] |= shape
    if "chroma_length" in config:                                    # a folder says nothing of the segment: 30 s are assumed
        config["chroma_length"] = 235
    for folder, content, settings in ((target, tensors, config), (t5, encoder, config["text_encoder"])):
        folder.mkdir()
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "spiece.model").write_bytes((source / "spiece.model").read_bytes())
    (target / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())


@stage("text_run")
def hf(s: Stage) -> None:
    """The text run as a Hugging Face folder, what it holds, and back."""
    s.convert("text_run", "hf", "hf/out")
    s.digests.add_figures("hf/described", s.run("convert", s.path("hf/out")))
    s.convert("hf/out", "nano", "hf/back")


@stage("hf")
def hf_start(s: Stage) -> None:
    """Trained from the Hugging Face folder, whose text encoder stays as it is."""
    s.train("--init_from", s.path("hf/out"))


@stage("tune_run")
def hf_melody(s: Stage) -> None:
    """The run with a melody as a Hugging Face folder, and back."""
    s.convert("tune_run", "hf", "hf_melody/out")
    s.convert("hf_melody/out", "nano", "hf_melody/back")


@stage("hf")
def audiocraft(s: Stage) -> None:
    """A text model over a T5 as a package of audiocraft, and back."""
    grow_t5(s.path("hf/out"), s.path("large"), s.path("t5"))
    s.convert("large", "audiocraft", "audiocraft/out")
    s.convert("audiocraft/out", "nano", "audiocraft/back", "--t5", s.path("t5"))
    s.generate("audiocraft/back", "--prompt", TEXTS[1], "--seconds", 0.5, name="audiocraft/clip")


@stage("hf_melody")
def audiocraft_melody(s: Stage) -> None:
    """A model with a melody over a T5 as a package of audiocraft, and back."""
    grow_t5(s.path("hf_melody/out"), s.path("large_melody"), s.path("t5_melody"))
    s.convert("large_melody", "audiocraft", "audiocraft_melody/out")
    s.convert("audiocraft_melody/out", "nano", "audiocraft_melody/back", "--t5", s.path("t5_melody"))


@stage("toy_run")
def nano(s: Stage) -> None:
    """The run with all conditions, which only this project's own format can express."""
    s.convert("toy_run", "nano", "nano")


# Figures of a run, and what the other commands print.


@stage("text_run", "toy_run")
def figures(s: Stage) -> None:
    """Tables of the metrics, and the stages of training alone."""
    s.digests.add_figures("figures/sweep", s.run("metrics", "--run", s.path("text_run"), "--n", 2, "--cfg", 1, 3, "--top_k", 50))
    s.digests.add_figures("figures/table", s.run("metrics", "--run", s.path("text_run"), "--n", 2, "--table", "--split", "heldout"))
    s.digests.add_figures("figures/ceiling", s.run("metrics", "--n", 4))
    s.digests.add_figures("figures/conditions", s.run("metrics", "--run", s.path("toy_run"), "--n", 2, "--conditions"))
    printed = s.run("train", "--only", "evaluate", "--out", s.path("toy_run"), "--device", "cpu")
    s.digests.add_figures("figures/evaluate", "\n".join(line for line in printed.splitlines() if line.startswith("evaluate ")
                                                        and " seconds " not in line))


@stage("sampled", "guided", "toy_run")
def distances(s: Stage) -> None:
    """Distances between two folders of clips."""
    s.digests.add_figures("distances", s.run("metrics", "--reference", s.path("toy_run/samples/reference"), "--generated", s.path("sampled"),
                                             "--labels"))


@stage("toy_run", "sounds")
def shown(s: Stage) -> None:
    """Commands that show something: a text's pieces, a melody, a style, the patterns, the sizes, what the analyser hears."""
    printed = s.run("conditioning", TEXTS[0], "--run", s.path("toy_run")) + s.run("chroma", s.path("tune.wav"))
    printed += s.run("style", s.path("tune.wav"), "--run", s.path("toy_run"))
    s.digests.add_figures("shown/conditions", printed)
    s.digests.add_figures("shown/patterns", s.run("patterns", "--stereo"))
    s.digests.add_figures("shown/sizes", s.run("model"))
    s.digests.add_figures("shown/toy", s.run("analyser", "--clips", 20))
    page = s.path("toy_run/index.html")
    page.unlink()
    s.run("page", s.path("toy_run"))
    assert page.stat().st_size > 100_000, "the page of a run is small"


# ---------------------------------------------------------------------------------------------------------------------
# running them


def needed(names: list) -> list:
    """The stages named, with all that they need, in the order of this file. Errors: SystemExit for a name that is none."""
    if unknown := [name for name in names if name not in STAGES]:
        raise SystemExit(f"no stage {unknown[0]}: there are {', '.join(STAGES)}")
    wanted, left = set(), list(names)
    while left:
        wanted.add(name := left.pop())
        left += [need for need in STAGES[name][1] if need not in wanted]
    return [name for name in STAGES if name in wanted]


def run_stages(names: list, folder: Path, plain: bool) -> tuple[dict, list]:
    """Runs stages, SLOTS processes at a time, and prints the seconds of each -> (digests, the names of those that failed).

    plain: without a Starter."""
    starters = None if plain else queue.Queue()
    for _ in range(0 if plain else SLOTS):
        starters.put(Starter())
    changed, ended, failed, digests, began = threading.Condition(), set(), [], {}, time.perf_counter()
    waiting, busy = list(names), 0

    def work(name):
        nonlocal busy
        mine, start, problem = Digests({str(folder): "FOLDER", str(REPO): "REPO"}), time.perf_counter(), None
        try:
            STAGES[name][0](Stage(name, folder, mine, starters))
        except Exception as error:                                   # whatever it is, the other stages go on
            problem = f"{type(error).__name__}: {error}"
        with changed:
            print(f"{name:<18} {time.perf_counter() - start:6.1f} s, {len(mine.found)} digests", flush=True)
            if problem:
                failed.append(name)
                print(f"FAILED {name}: {problem}", flush=True)
            else:
                digests.update(mine.found)
            ended.add(name)
            busy -= STAGES[name][2]
            changed.notify()

    with changed:
        while waiting:
            ready = [n for n in waiting if set(STAGES[n][1]) <= ended and busy + STAGES[n][2] <= SLOTS]
            ready = ready or [n for n in waiting if busy == 0 and set(STAGES[n][1]) <= ended]
            if not ready:
                changed.wait()
                continue
            name = max(ready, key=lambda n: (dependents(n, waiting), -waiting.index(n)))
            waiting.remove(name)
            if set(STAGES[name][1]) & set(failed):
                failed.append(name)
                ended.add(name)
                print(f"FAILED {name}: a stage that it needs has", flush=True)
                continue
            busy += STAGES[name][2]
            threading.Thread(target=work, args=(name,)).start()
        while busy:
            changed.wait()
    for _ in range(0 if plain else SLOTS):
        starters.get().end()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.perf_counter() - began:.1f} s in all, {spent.ru_utime + spent.ru_stime:.0f} s of processors", flush=True)
    return dict(sorted(digests.items())), failed


def dependents(name: str, waiting: list) -> int:
    """How many of the stages that wait need this one, directly or not: those that many need go first."""
    found, added = {name}, True
    while added:
        added = [n for n in waiting if n not in found and set(STAGES[n][1]) & found]
        found |= set(added)
    return len(found) - 1


def machine() -> dict:
    """What digests are true of."""
    return dict(torch=torch.__version__, capability=torch.backends.cpu.get_cpu_capability(), machine=platform.machine(),
                python=platform.python_version(), numpy=np.__version__)


def compare(old: dict, new: dict, names: list) -> int:
    """Prints what differs, is missing or is new -> exit code. names: the stages that were run, or all."""
    stages = set(names)
    old = {name: value for name, value in old.items() if name.split("/")[0] in stages}
    wrong = 0
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            print(f"new: {name}")
        elif name not in new or old[name] != new[name]:
            print(f"{'missing' if name not in new else 'differs'}: {name}")
            wrong += 1
    print(f"{wrong} of {len(old)} digests differ or are missing" if wrong else f"{len(old)} digests equal")
    return 1 if wrong else 0


def main(argv: list | None = None) -> int:
    parser = argparse.ArgumentParser(description="Digests of everything the project computes, to compare.", allow_abbrev=False)
    parser.add_argument("--write", metavar="FILE", help="write digests")
    parser.add_argument("--compare", metavar="FILE", help="compare with digests written before")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages and what they need")
    parser.add_argument("--plain", action="store_true", help="every command in a process of its own: slower, the same digests")
    parser.add_argument("--starter", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.starter:
        Starter.serve()
        return 0
    if bool(args.write) == bool(args.compare):
        parser.error("give --write FILE or --compare FILE")
    names = needed(args.only or list(STAGES))
    stored = json.loads(Path(args.compare).read_text()) if args.compare else None
    if stored and stored["machine"] != machine():
        print(f"note: made on another machine: {stored['machine']}, this is {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        found, failed = run_stages(names, Path(folder).resolve(), args.plain)
    if failed:
        print(f"failed: {' '.join(failed)}")
    if stored:
        return max(compare(stored["digests"], found, names), bool(failed))
    if not failed:
        Path(args.write).write_text(json.dumps(dict(machine=machine(), digests=found), indent=1) + "\n")
        print(f"{len(found)} digests written")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
