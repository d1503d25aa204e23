"""The stages of gate.py: what it trains, generates, converts and prints, each with the digests it makes.

A stage is a function of a `Stage` of gate.py: s.run runs a command, s.path names a file in the folder that
all share. Its docstring says what it covers. Words that begin with "--" are split at their spaces.
"""

import json
import signal
import wave
from pathlib import Path

import numpy as np
import torch
from gate_digests import Digests
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

BASE = (
    "--size debug --batch_size 4 --epochs 1 --updates_per_epoch 3 --valid_samples 4 --eval_samples 1 "
    "--generate_samples 0 --lr 0.01 --warmup_steps 2 --log_every 1 --device cpu"
)
LARGE = (
    "--conditions text melody style --fuse text=cross --epochs 2 --updates_per_epoch 10 --valid_samples 8 "
    "--eval_samples 2 --generate_samples 1 --micro_batch_size 2"
)
TUNE = "--conditions text melody --fuse text=prepend melody=prepend --no-mask_padding"
TEXTS = ("a slow low organ tune in D major with drums", "fast bells")
T5_SMALL = dict(d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=2048, vocab_size=32128)

STAGES = {}  # name: (function, names of the stages it needs, processes it runs at a time)


def stage(*needs: str, processes: int = 1):
    """Makes a function a stage of its name, run after the stages it needs."""

    def register(function):
        STAGES[function.__name__] = (function, needs, processes)
        return function

    return register


# ----------------------------------------------------------------------------------------------------------
# training, in each of its modes: three updates, or some more


@stage()
def toy_run(s) -> None:
    """20 updates with text, melody and style, in micro-batches, with validation, evaluation and samples."""
    s.train(LARGE)


@stage("toy_run")
def resumed(s) -> None:
    """The same run, stopped by a signal after some updates and started again: every bit as without."""
    words, out = (BASE, LARGE, "--out", s.path("resumed")), s.path("resumed")
    process = s.start("train", *words)
    for line in process.stdout:
        if " step 4 " in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=300)
    stopped = torch.load(out / "last.pt", weights_only=True)["step"]
    assert process.returncode == 0 and 4 <= stopped < 20, f"exit code {process.returncode}, step {stopped}"
    s.run("train", *words)
    mine, whole = Digests({str(out): "OUT"}), Digests({str(s.path("toy_run")): "OUT"})
    mine.add_run("run", out)
    whole.add_run("run", s.path("toy_run"))
    differ = [name for name, value in whole.found.items() if mine.found.get(name) != value]
    assert not differ, f"differs from the run without a stop: {differ}"
    s.digests.add("resumed", differ)


@stage()
def text_run(s) -> None:
    """Text alone, with every kind of dropout, two epochs, samples after each."""
    s.train(
        "--fuse text=cross --dropout 0.1 --word_dropout 0.2 --cfg_dropout 0.3 --text_dropout 0.1",
        "--epochs 2 --updates_per_epoch 2 --ema_every 2 --generate_every 1 --generate_samples 1",
    )


@stage()
def tune_run(s) -> None:
    """Melody and text in front of the codes, as the published melody models have them."""
    s.train(TUNE, "--melody_dropout 0.3 --checkpointing")


@stage("text_run")
def stereo(s) -> None:
    """Two channels, started from the mono run."""
    s.train("--fuse text=cross --channels 2 --segment_seconds 0.8 --init_from", s.path("text_run"))


@stage("text_run")
def lora(s) -> None:
    """Additions of low rank to the text run."""
    s.train("--fuse text=cross --lora 4 --init_from", s.path("text_run"))


@stage()
def parallel_pattern(s) -> None:
    """All codebooks of a frame at once, without any condition, one batch over and over."""
    s.train("--pattern parallel --no_text --overfit_one_batch --segment_seconds 0.8")


@stage()
def unrolled_pattern(s) -> None:
    """A codebook a step, fewer codebooks, bfloat16, the text summed, its encoder frozen."""
    s.train(
        "--pattern unrolled --num_codebooks 2 --dtype bfloat16 --fuse text=sum --freeze_text_encoder",
        "--segment_seconds 0.8 --max_grad_norm 0.5 --lr_min_ratio 0.1",
    )


@stage(processes=2)
def ddp(s) -> None:
    """Two ranks with whole models, micro-batches, all three conditions."""
    s.train(LARGE, "--epochs 1 --updates_per_epoch 2 --micro_batch_size 1", ranks=2)


@stage(processes=2)
def fsdp(s) -> None:
    """Two ranks with a shard of the model each, gathered into one checkpoint."""
    s.train("--fuse text=cross --parallel fsdp --updates_per_epoch 2 --segment_seconds 0.8", ranks=2)


@stage()
def sharded(s) -> None:
    """A checkpoint in shards, gone on with for another epoch; the shards are read as torch reads them."""
    words = (BASE, "--sharded_checkpoint --no_text --segment_seconds 0.8 --out", s.path("sharded"))
    s.run("train", *words)
    s.run("train", *words, "--epochs 2")
    s.digests.add_run("sharded", s.path("sharded"))
    shards = torch.load(s.path("sharded/last.pt"), weights_only=True)["shards"]["folder"]
    dcp_to_torch_save(s.path("sharded", shards), s.path("shards.pt"))
    s.digests.add_parts("sharded/shards", torch.load(s.path("shards.pt"), weights_only=True))


# ----------------------------------------------------------------------------------------------------------
# audio of one's own, the codec, the cache


def write_wav(path: Path, seconds: float, seed: int, rate: int = 16_000, channels: int = 1) -> None:
    """Notes of a fifth of a second with some noise, 16 bits."""
    rng = np.random.default_rng(seed)
    count, beat = round(seconds * rate), rate // 5  # samples
    time, lines = np.arange(count) / rate, []
    for _ in range(channels):
        pitch = np.repeat(rng.integers(50, 80, count // beat + 1), beat)[:count]
        tone = np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time)
        lines.append(0.3 * tone + 0.01 * rng.standard_normal(count))
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, count, "NONE", "NONE"))
        file.writeframes((np.stack(lines, 1) * 32767).astype("<i2").tobytes())


@stage()
def sounds(s) -> None:
    """The audio that others read: a tune, one in stereo, music with captions, a folder to validate on."""
    music, held = s.path("music"), s.path("held")
    music.mkdir()
    held.mkdir()
    write_wav(s.path("tune.wav"), 1.6, 100)
    write_wav(s.path("wide.wav"), 1.0, 101, channels=2)
    write_wav(held / "held.wav", 1.4, 102, channels=2)
    for i in range(5):
        write_wav(music / f"{i}.wav", 1.5 + 0.3 * i, i, 22_050 if i == 3 else 16_000, 1 + (i == 4))
        if i % 2:
            words = dict(description=f"tune {i} of the folder", key="D", bpm=100 + i)
            words |= dict(genre="folk", moods=["calm", "bright"])
            (music / f"{i}.json").write_text(json.dumps(words))
        else:
            (music / f"{i}.txt").write_text(f"a quiet tune with noise, take {i}")
    s.digests.add_folder("sounds", s.folder, "**/*.wav")


@stage("sounds")
def folder_check(s) -> None:
    """What is in a folder."""
    s.digests.add_numbers("folder_check", s.run("check", s.path("music"), "--valid 0.3"))


@stage("sounds")
def folder_run(s) -> None:
    """Audio read from a folder by another process, captions with metadata merged in, a melody, samples."""
    s.train(
        "--dataset", s.path("music"), TUNE, "--valid 0.3 --segment_seconds 1 --codec toy --workers 1",
        "--merge_text_p 0.5 --generate_samples 1",
    )  # fmt: skip


@stage("sounds")
def codec(s) -> None:
    """Round trips through the codec: mono, fewer codebooks, stereo."""
    for name, source, words in (
        ("mono", "tune.wav", ()),
        ("two_levels", "tune.wav", ["--num_codebooks 2"]),
        ("stereo", "wide.wav", ["--channels 2"]),
    ):
        back = s.path(f"{name}_back.wav")
        s.digests.add_numbers(f"codec/{name}/printed", s.run("tokenizer", s.path(source), back, *words))
        s.digests.add_file(f"codec/{name}/wav", back)


@stage()
def fitted_codec(s) -> None:
    """A small codec fitted with the discriminator, stopped on the way and gone on with."""
    words = (
        "--dataset toy --steps 8 --filters 2 --ratios 20 16 --dim 16 --card 16 --codebooks 2",
        "--batch_size 2 --residual_layers 1 --adversarial --segment_seconds 0.4 --out", s.path("codec.pt"),
    )  # fmt: skip
    s.run("fit_codec", *words, "--stop_after 4")
    s.run("fit_codec", *words)
    s.digests.add_file("fitted_codec", s.path("codec.pt"))


@stage("sounds", "fitted_codec")
def cache(s) -> None:
    """A token cache of the folder by the fitted codec."""
    s.run("cache", s.path("music"), "--codec", s.path("codec.pt"), "--out", s.path("cache"))
    s.digests.add_folder("cache", s.path("cache"))


@stage("sounds")
def stereo_cache(s) -> None:
    """A token cache of two channels, with a folder of its own to validate on."""
    s.run(
        "cache", s.path("music"), "--valid", s.path("held"), "--channels 2 --num_codebooks 2 --out",
        s.path("stereo_cache"),
    )  # fmt: skip
    s.digests.add_folder("stereo_cache", s.path("stereo_cache"))


@stage("cache")
def cache_run(s) -> None:
    """Trained from the cache, with a melody and a style; the codec is the fitted one."""
    s.train(
        "--dataset", s.path("music"), "--cache", s.path("cache"), "--codec", s.path("codec.pt"),
        "--conditions text melody style --fuse text=prepend --valid 0.3 --segment_seconds 1 --workers 0",
        "--generate_samples 1",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# generation: greedy clips have no randomness but the model's, the others have seeds


@stage("toy_run")
def greedy(s) -> None:
    """The likeliest codes for two texts."""
    s.generate("toy_run", "--prompt", TEXTS[0], "--prompt", TEXTS[1], "--temperature 0 --cfg 1")


@stage("toy_run", "sounds")
def guided(s) -> None:
    """The likeliest codes with guidance: by a text, a text and a melody, a style; double guidance by all."""
    text, likeliest = ("--prompt", TEXTS[0]), "--temperature 0 --cfg 3"
    melody, style = ("--melody", s.path("tune.wav")), ("--style", s.path("tune.wav"))
    s.generate("toy_run", *text, likeliest, name="guided/text")
    s.generate("toy_run", *text, *melody, likeliest, name="guided/melody")
    s.generate("toy_run", *style, likeliest, name="guided/style")
    s.generate("toy_run", *text, *melody, *style, likeliest, "--cfg_style 3", name="guided/double")


@stage("toy_run", "sounds")
def sampled(s) -> None:
    """Sampled clips: several of a text; by their mass; without a text; a file gone on with."""
    text = ("--prompt", TEXTS[0])
    mass = "--unconditional --seed 4 --temperature 0.8 --top_p 0.9 --seconds 0.7"
    s.generate("toy_run", *text, "--n 2 --seed 3 --temperature 1 --top_k 50 --cfg 2", name="sampled/top_k")
    s.generate("toy_run", mass, name="sampled/top_p")
    begun = ("--temperature 1 --top_k 0 --continue", s.path("wide.wav"))
    s.generate("toy_run", *text, *begun, name="sampled/continued")


@stage("toy_run", "sounds")
def windows(s) -> None:
    """A clip of several windows, with a melody that is read on in each."""
    asked = ("--prompt", TEXTS[0], "--melody", s.path("tune.wav"))
    s.generate("toy_run", *asked, "--seconds 4 --stride 1 --temperature 1")


@stage("stereo", "unrolled_pattern", "parallel_pattern", "lora", "cache_run")
def other_runs(s) -> None:
    """A sampled clip of each of the other runs."""
    short = "--seconds 0.6 --temperature 1"
    for run in ("stereo", "unrolled_pattern", "lora", "cache_run"):
        s.generate(run, "--prompt", TEXTS[1], short, "--cfg 3", name=f"other_runs/{run}")
    s.generate("parallel_pattern", "--unconditional", short, name="other_runs/parallel_pattern")


# ----------------------------------------------------------------------------------------------------------
# conversion


@stage("text_run")
def hf(s) -> None:
    """The text run as a Hugging Face folder, what that holds, and back."""
    s.convert("text_run", "hf", "hf/out")
    s.digests.add_numbers("hf/described", s.run("convert", s.path("hf/out")))
    s.convert("hf/out", "nano", "hf/back")


@stage("hf")
def hf_start(s) -> None:
    """Trained from the Hugging Face folder, whose text encoder stays as it is."""
    s.train("--init_from", s.path("hf/out"))


@stage("tune_run")
def hf_melody(s) -> None:
    """The run with a melody as a Hugging Face folder, and back."""
    s.convert("tune_run", "hf", "hf_melody/out")
    s.convert("hf_melody/out", "nano", "hf_melody/back")


def grow_t5(source: Path, target: Path, t5: Path) -> None:
    """Writes a Hugging Face folder like `source` whose text encoder is as large as t5-small, with random
    weights, and that encoder alone to `t5`: a package of audiocraft takes none but a published T5."""
    config = json.loads((source / "config.json").read_text())
    width, inner, hidden = T5_SMALL["d_model"], T5_SMALL["num_heads"] * T5_SMALL["d_kv"], T5_SMALL["d_ff"]
    sizes = {"shared.weight": (T5_SMALL["vocab_size"], width), "encoder.final_layer_norm.weight": (width,)}
    relative_bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    sizes[relative_bias] = (32, T5_SMALL["num_heads"])
    for i in range(T5_SMALL["num_layers"]):
        block = f"encoder.block.{i}.layer"
        sizes |= {f"{block}.0.SelfAttention.{n}.weight": (inner, width) for n in "qkv"}
        sizes |= {f"{block}.0.SelfAttention.o.weight": (width, inner)}
        sizes |= {f"{block}.1.DenseReluDense.wi.weight": (hidden, width)}
        sizes |= {f"{block}.1.DenseReluDense.wo.weight": (width, hidden)}
        sizes |= {f"{block}.{n}.layer_norm.weight": (width,) for n in (0, 1)}
    draws = torch.Generator().manual_seed(0)

    def drawn(size: tuple) -> torch.Tensor:
        return torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=draws)

    encoder = {name: drawn(size) for name, size in sizes.items()}
    tensors = load_file(source / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not name.startswith("text_encoder.")}
    tensors["enc_to_dec_proj.weight"] = drawn((config["decoder"]["hidden_size"], width))
    tensors |= {f"text_encoder.{name}": x for name, x in encoder.items()}
    config["text_encoder"] |= T5_SMALL
    if "chroma_length" in config:
        config["chroma_length"] = 235  # of 30 seconds: a folder does not say how long a segment is
    for folder, content, settings in ((target, tensors, config), (t5, encoder, config["text_encoder"])):
        folder.mkdir()
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "spiece.model").write_bytes((source / "spiece.model").read_bytes())
    (target / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())


@stage("hf")
def audiocraft(s) -> None:
    """A text model over a T5 as a package of audiocraft, back, and a clip of what came back."""
    grow_t5(s.path("hf/out"), s.path("large"), s.path("t5"))
    s.convert("large", "audiocraft", "audiocraft/out")
    s.convert("audiocraft/out", "nano", "audiocraft/back", "--t5", s.path("t5"))
    s.generate("audiocraft/back", "--prompt", TEXTS[1], "--seconds 0.5", name="audiocraft/clip")


@stage("hf_melody")
def audiocraft_melody(s) -> None:
    """A model with a melody over a T5 as a package of audiocraft, and back."""
    grow_t5(s.path("hf_melody/out"), s.path("large_melody"), s.path("t5_melody"))
    s.convert("large_melody", "audiocraft", "audiocraft_melody/out")
    s.convert("audiocraft_melody/out", "nano", "audiocraft_melody/back", "--t5", s.path("t5_melody"))


@stage("toy_run")
def nano(s) -> None:
    """The run with all conditions, which only this project's own format can express."""
    s.convert("toy_run", "nano", "nano")


# ----------------------------------------------------------------------------------------------------------
# figures of a run, and what the other commands print


@stage("text_run", "toy_run")
def metrics(s) -> None:
    """Tables of how well clips follow what they were asked for."""
    for name, words in (
        ("sweep", ("--run", s.path("text_run"), "--cfg 1 3 --top_k 50 --n 2")),
        ("table", ("--run", s.path("text_run"), "--table --split heldout --n 2")),
        ("conditions", ("--run", s.path("toy_run"), "--conditions --n 2")),
        ("ceiling", ("--n 4",)),
    ):
        s.digests.add_numbers(f"metrics/{name}", s.run("metrics", *words))


@stage("toy_run", "resumed")
def stages_alone(s) -> None:
    """The stages of an epoch by themselves, of the run that is there."""
    for name in ("valid", "evaluate"):
        printed = s.run("train", "--only", name, "--device cpu --out", s.path("toy_run"))
        lines = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        lines = [line for line in lines if " seconds " not in line]
        s.digests.add_numbers(f"stages_alone/{name}", "\n".join(lines))


@stage("sampled", "toy_run")
def distances(s) -> None:
    """Distances between two folders of clips."""
    folders = ("--reference", s.path("toy_run/samples/reference"), "--generated", s.path("sampled"))
    s.digests.add_numbers("distances", s.run("metrics", *folders, "--labels"))


@stage("toy_run", "sounds")
def shown_conditions(s) -> None:
    """What a text, a melody and a style become."""
    tune, run = s.path("tune.wav"), ("--run", s.path("toy_run"))
    s.digests.add_numbers("shown_conditions/text", s.run("show_text", TEXTS[0], *run))
    s.digests.add_numbers("shown_conditions/melody", s.run("show_melody", tune))
    s.digests.add_numbers("shown_conditions/style", s.run("show_style", tune, *run))


@stage()
def shown_shapes(s) -> None:
    """The drawing of the patterns, and the table of the sizes."""
    s.digests.add_numbers("shown_shapes/patterns", s.run("patterns", "--stereo"))
    s.digests.add_numbers("shown_shapes/sizes", s.run("model"))


@stage()
def shown_analyser(s) -> None:
    """What the analyser hears in toy clips."""
    s.digests.add_numbers("shown_analyser", s.run("analyser", "--clips 20"))


@stage("toy_run", "resumed", "stages_alone")
def page(s) -> None:
    """The page of a run, drawn once more. Its bytes are not compared, since it shows times."""
    path = s.path("toy_run/index.html")
    path.unlink()
    s.run("page", s.path("toy_run"))
    s.digests.add("page", path.stat().st_size > 100_000)
