"""Bad audio, datasets, caches and codecs, and how it ends. See bad_input.py.

    python tests/test_bad_data.py [WORD]    the table: case | how it ended, for the cases that hold WORD
"""

import io
import pickle
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bad_input
from bad_material import EVIL, EVIL_ZIP
from evaluate import analyser

SMALL_FIT = "--steps 3 --segment_seconds 0.3 --batch_size 4 --dim 8 --filters 2 --card 8"

REFUSED = {
    # data
    "data: no command": ("data", "command"),
    "data: unknown command": ("data frobnicate", "'frobnicate'", "check"),
    "data check: missing": ("data check no/such", "'no/such'", "give a folder"),
    "data check: folder empty": ("data check @empty_folder", "empty_folder", "found nothing"),
    "data check: folder of bad audio only": (
        "data check @only_bad", "only_bad", "1 zero bytes", "give a folder"),
    "data check: valid fraction out of range": (
        "data check @music --valid 1.5", "--valid 1.5", "between 0 and 1"),
    "data check: the toy with captions": ("data check toy --captions x.csv", "--captions x.csv", "no files"),
    "data check: the toy decoded": ("data check toy --decode", "--decode", "no files"),
    "data check: manifest empty": ("data check @empty.jsonl", "empty.jsonl", "found nothing"),
    "data check: manifest of missing files only": ("data check @gone_only.jsonl", "1 missing", "gone.wav"),
    "data check: manifest .gz that is no gz": (
        "data check @no_gz.jsonl.gz", "no_gz.jsonl.gz", "cannot be read as a manifest"),
    "data check: manifest .gz cut off": (
        "data check @cut.jsonl.gz", "cut.jsonl.gz", "cannot be read as a manifest"),
    "data cache: into a folder of something else": (
        "data cache @music --out @run", "holds something else", "give a new"),
    "data cache: into its own dataset": (
        "data cache @music --out @music", "holds something else", "give a new"),
    "data cache: into a cache of other songs": (
        "data cache @no_captions --out @cache", "another dataset", "another --out"),
    "data cache: into a cache whose cache.json is text": (
        "data cache @music --out @cache_text", "cache.json", "delete"),
    "data cache: into a cache whose cache.json is a list": (
        "data cache @music --out @cache_list", "cache.json", "delete"),
    "data cache: out is a file": ("data cache @music --out @good.wav", "--out", "good.wav", "folder"),
    "data cache: out below a file": ("data cache @music --out @good.wav/cache", "good.wav/cache"),
    "data cache: toy clips": ("data cache toy --out out", "toy clips are made fresh", "--dataset toy"),
    "data cache: unknown device": ("data cache @music --out out --device banana", "banana", "cpu, cuda"),
    "data cache: three channels": ("data cache @music --out out --channels 3", "--channels", "1, 2"),
    "data cache: two channels into a mono cache": (
        "data cache @music --out @cache --channels 2", "channels, fingerprint, K", "another --out"),
    "data cache: too many codebooks": (
        "data cache @music --out out --num_codebooks 99", "num_codebooks 99", "1 to 4"),
    "data cache: codec unknown": (
        "data cache @music --out out --codec mystery", "'mystery'", "toy, encodec_24khz"),
    "data cache: stems without demucs": (
        "data cache @music --out out --melody_stems", "--melody_stems", "pip install demucs"),
    "data cache: out empty": ("data cache @music --out $empty", "--out", "empty"),
    # tokenizer
    "tokenizer: output empty": ("tokenizer @good.wav $empty", "output", "empty"),
    "tokenizer: no file": ("tokenizer", "input"),
    "tokenizer: file missing": ("tokenizer gone.wav out.wav", "gone.wav", "no such file"),
    "tokenizer: zero bytes": ("tokenizer @zero.wav out.wav", "zero.wav", "not readable as audio"),
    "tokenizer: text named .wav": ("tokenizer @text.wav out.wav", "text.wav", "not readable as audio"),
    "tokenizer: noise named .wav": ("tokenizer @noise.wav out.wav", "noise.wav", "not readable as audio"),
    "tokenizer: wav of a header alone": ("tokenizer @none.wav out.wav", "none.wav", "no audio"),
    "tokenizer: flac that claims 50 days": (
        "tokenizer @endless.flac out.wav", "endless.flac", "not readable as audio"),
    "tokenizer: a sample rate of 3 Hz": ("tokenizer @rate3.wav out.wav", "rate3.wav", "3 Hz"),
    "tokenizer: a rate that cannot be resampled": ("tokenizer @prime.wav out.wav", "prime.wav", "999983 Hz"),
    "tokenizer: samples not finite": ("tokenizer @nan.wav out.wav", "nan.wav", "not finite"),
    "tokenizer: output is the input": ("tokenizer @good.wav good.wav", "good.wav", "another"),
    "tokenizer: output of an unknown kind": ("tokenizer @good.wav out.xyz", "out.xyz", ".wav, .flac"),
    "tokenizer: output into a missing folder": (
        "tokenizer @good.wav no/such/out.wav", "no/such/out.wav", "cannot be written"),
    "tokenizer: codec is a pickle": (
        "tokenizer @good.wav out.wav --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "tokenizer: codec is a pickle in a zip": (
        "tokenizer @good.wav out.wav --codec @pickle_zip.pt", "pickle_zip.pt", "not a codec file"),
    "tokenizer: codec cut": ("tokenizer @good.wav out.wav --codec @cut.pt", "cut.pt", "damaged"),
    "tokenizer: codec is a folder": (
        "tokenizer @good.wav out.wav --codec @empty_folder", "empty_folder", "no codec in this folder"),
    "tokenizer: codec is a list": (
        "tokenizer @good.wav out.wav --codec @codec_list", "codec_list", "not a codec file"),
    "tokenizer: codec of another format": (
        "tokenizer @good.wav out.wav --codec @codec_format", "codec_format", "its format is other"),
    "tokenizer: codec without config": (
        "tokenizer @good.wav out.wav --codec @codec_no_config", "codec_no_config", "damaged"),
    "tokenizer: codec without weights": (
        "tokenizer @good.wav out.wav --codec @codec_no_state", "codec_no_state", "damaged"),
    "tokenizer: codec with a broken config": (
        "tokenizer @good.wav out.wav --codec @codec_bad_config", "codec_bad_config", "sample_rate is 'fast'"),
    "tokenizer: codec with numbers for weights": (
        "tokenizer @good.wav out.wav --codec @codec_bad_state", "codec_bad_state", "x holds int"),
    "tokenizer: codec of other shapes": (
        "tokenizer @good.wav out.wav --codec @codec_shapes", "codec_shapes", "of another shape"),
    "tokenizer: codec is a run": (
        "tokenizer @good.wav out.wav --codec @run/best.pt", "best.pt", "not a codec file"),
    "tokenizer: no codebooks": ("tokenizer @good.wav out.wav --num_codebooks 0", "num_codebooks 0", "1 to 4"),
    "tokenizer: three channels": ("tokenizer @good.wav out.wav --channels 3", "--channels", "1, 2"),
    "tokenizer: unknown device": ("tokenizer @good.wav out.wav --device banana", "banana", "cpu, cuda"),
    "tokenizer: no GPU": ("tokenizer @good.wav out.wav --device cuda", "--device cuda", "--device cpu"),
    "tokenizer: fit is another command": (
        "tokenizer fit --dataset toy --out c.pt", "python -m tools.fit_codec"),
    # tools/fit_codec.py
    "fit_codec: no dataset": ("fit_codec --out c.pt", "--dataset"),
    "fit_codec: unknown flag": ("fit_codec --dataset toy --out c.pt --stepps 3", "--stepps"),
    "fit_codec: no steps": (
        "fit_codec --dataset toy --out c.pt --steps 0", "--steps 0", "at least 1"),
    "fit_codec: learning rate nan": (
        "fit_codec --dataset toy --out c.pt --lr nan", "--lr nan", "more than 0"),
    "fit_codec: learning rate inf": (
        "fit_codec --dataset toy --out c.pt --lr inf", "--lr inf", "more than 0"),
    "fit_codec: commitment nan": (
        "fit_codec --dataset toy --out c.pt --commitment nan", "--commitment nan", "at least 0"),
    "fit_codec: segment nan": (
        "fit_codec --dataset toy --out c.pt --segment_seconds nan", "--segment_seconds nan"),
    "fit_codec: segment inf": (
        "fit_codec --dataset toy --out c.pt --segment_seconds inf", "--segment_seconds inf"),
    "fit_codec: segment longer than a clip": (
        "fit_codec --dataset toy --out c.pt --segment_seconds 9", "--segment_seconds 9", "1.6 s"),
    "fit_codec: one code": ("fit_codec --dataset toy --out c.pt --card 1", "--card 1", "at least 2"),
    "fit_codec: more codes than latents": (
        "fit_codec --dataset toy --out c.pt --card 60000", "--card 60000", "16000"),
    "fit_codec: stride zero": (
        "fit_codec --dataset toy --out c.pt --ratios 0 16", "--ratios 0", "at least 1"),
    "fit_codec: compression of nothing": (
        "fit_codec --dataset toy --out c.pt --compress 4", "--compress 4", "--residual_layers"),
    "fit_codec: more compression than channels": (
        "fit_codec --dataset toy --out c.pt --residual_layers 1 --compress 64", "--compress 64", "16"),
    "fit_codec: negative residual layers": (
        "fit_codec --dataset toy --out c.pt --residual_layers -1", "--residual_layers -1"),
    "fit_codec: negative seed": (
        "fit_codec --dataset toy --out c.pt --seed -1", "--seed -1", "at least 0"),
    "fit_codec: autoencoder share nan": (
        "fit_codec --dataset toy --out c.pt --autoencoder_share nan", "--autoencoder_share nan"),
    "fit_codec: unknown device": (
        "fit_codec --dataset toy --out c.pt --device banana", "banana", "cpu"),
    "fit_codec: dataset missing": (
        "fit_codec --dataset no/such --out c.pt", "no/such", "no such folder"),
    "fit_codec: dataset without audio": (
        "fit_codec --dataset @no_audio --out c.pt", "no_audio", ".wav"),
    "fit_codec: out empty": ("fit_codec --dataset toy --out $empty", "--out", "empty"),
    "fit_codec: out is there": (
        "fit_codec --dataset toy --out @good.wav", "good.wav", "exists already"),
    "fit_codec: out in a missing folder": (
        "fit_codec --dataset toy --out no/such/c.pt", "no/such", "no folder"),
    "fit_codec: checkpoint is a pickle": (
        "fit_codec --dataset toy --out @fit_pickle", "fit_pickle.fit", "not a checkpoint"),
    "fit_codec: checkpoint cut": ("fit_codec --dataset toy --out @fit_cut", "fit_cut.fit", "damaged"),
    "fit_codec: checkpoint without flags": (
        "fit_codec --dataset toy --out @fit_keys", "fit_keys.fit", "damaged"),
    "fit_codec: checkpoint with a list for flags": (
        "fit_codec --dataset toy --out @fit_args", "fit_args.fit", "damaged"),
    # analyser
    "analyser: file missing": ("analyser gone.wav", "gone.wav", "no such file"),
    "analyser: text named .wav": ("analyser @text.wav", "text.wav", "not readable as audio"),
    "analyser: samples not finite": ("analyser @nan.wav", "nan.wav", "not finite"),
    "analyser: one sample": ("analyser @one.wav", "one.wav", "at least 0.64 s"),
    "analyser: a rate that cannot be resampled": ("analyser @prime.wav", "prime.wav", "999983 Hz"),
    "analyser: a sample rate of 3 Hz": ("analyser @rate3.wav", "rate3.wav", "3 Hz"),
    "analyser: no clips": ("analyser --clips 0", "--clips 0", "at least 1"),
}

# The last word stands once in what is printed.
SKIPPED = {
    **{
        f"data check: {what}": (f"data check @music+{name}", "1 skipped", reason)
        for name, what, reason in (
            ("zero.wav", "zero bytes", "zero bytes"),
            ("head.wav", "wav cut in its header", "not readable as audio"),
            ("text.wav", "text named .wav", "not readable as audio"),
            ("noise.wav", "noise named .wav", "not readable as audio"),
            ("none.wav", "wav of a header alone", "absurd header"),
            ("endless.flac", "flac that claims 50 days", "absurd header"),
            ("rate0.wav", "a sample rate of 0 Hz", "not readable as audio"),
            ("rate3.wav", "a sample rate of 3 Hz", "absurd header"),
            ("rate4e9.wav", "a sample rate of 4e9 Hz", "not readable as audio"),
            ("cover.jpg", "a picture", "not audio by its name"),
            ("locked.wav", "a file that may not be read", "not readable as audio"),
        )
    },
    **{
        f"data check: {what}": (f"data check @music+{name}.json", "1 with a problem", f"{name}.wav")
        for name, what in (
            ("broken", "JSON cut off"),
            ("list", "JSON is a list"),
            ("deep", "JSON of 100,000 brackets"),
            ("garbage", "JSON is binary"),
            ("huge", "JSON with a number of 400 digits"),
            ("types", "JSON of wrong types"),
            ("words", "JSON caption of 100,000 words"),
        )
    },
    "data check: caption of 100,000 words": ("data check @music+words.txt", "1 with a problem", "words.wav"),
    "data check: links in a circle, to nothing, to a song": (
        "data check @links",
        "3 skipped", "2 missing", "dangling.wav", "self.wav", "1 same file twice", "twin.wav"),
    **{
        f"data check: manifest {what}": (
            f"data check @music+good.wav+{name}.jsonl/{name}.jsonl", "1 skipped", reason)
        for name, what, reason in (
            ("away", "with a path to ../..", "not audio by its name"),
            ("folder", "with a folder", "not audio by its name"),
            ("gone", "with a missing file", "gone.wav"),
            ("double", "with a file twice", "same file twice"),
            ("broken", "with a line that is no JSON", "manifest line"),
        )
    },
    "data check: manifest with paths that are none": (
        "data check @music+good.wav+odd.jsonl/odd.jsonl",
        "5 skipped", "2 manifest line whose path is no text", "2 missing"),
    "data check: manifest that lies about seconds": (
        "data check @music+good.wav+lies.jsonl/lies.jsonl", "1 with a problem", "duration differs"),
    "data check: manifest with a number of 400 digits": (
        "data check @music+good.wav+huge.jsonl/huge.jsonl", "1 with a problem", "duration differs"),
    "data cache: samples not finite": (
        "data cache @music+nan.wav --out out", "1 cannot be encoded", "nan.wav"),
    "data cache: infinite samples": ("data cache @music+inf.wav --out out", "1 cannot be encoded", "inf.wav"),
    "data cache: samples of 1e30": (
        "data cache @music+loud.wav --out out", "1 cannot be encoded", "loud.wav"),
    "data cache: a rate that cannot be resampled": (
        "data cache @music+prime.wav --out out", "1 cannot be encoded", "prime.wav"),
    "data cache: manifest that lies about the rate": (
        "data cache @music+prime.wav+rate_lies.jsonl/rate_lies.jsonl --out out",
        "1 cannot be encoded", "prime.wav"),
    "fit_codec: zero bytes among songs": (
        f"fit_codec --dataset @music+zero.wav --out c.pt {SMALL_FIT}",
        "skipped", "zero.wav"),
    "fit_codec: samples not finite among songs": (
        f"fit_codec --dataset @music+nan.wav --out c.pt {SMALL_FIT}",
        "skipped", "nan.wav"),
}

# The words stand in what is printed.
FINE = {
    "data cache: a fraction for validation": (
        "data cache @music --out out --valid 0.3", "note --valid 0.3 has no effect"),
    **{
        f"data cache: {what}": (f"data cache @music+{name} --out out", "3 files")
        for name, what in (
            ("silent.wav", "silence"),
            ("one.wav", "one sample"),
            ("half.wav", "wav cut in its samples"),
            ("mp3.wav", "MP3 named .wav"),
            ("long.wav", "wav that claims 18 hours"),
            ("long.flac", "flac that claims 6 days"),
            ("u8.wav", "8 bits"),
            ("pcm24.wav", "24 bits"),
            ("double.wav", "64-bit floats"),
            ("seven.wav", "7 channels"),
        )
    },
    **{
        f"data check: {what}": (f"data check @music+{name}", "0 with a problem", "files        3,")
        for name, what in (
            ("nan.json", "JSON with NaN"),
            ("twice.json", "JSON with a name twice"),
            ("surrogate.json", "JSON with half a character"),
            ("nul.json", "JSON with NUL"),
            ("blank.txt", "caption of white space"),
            ("binary.txt", "caption is binary"),
            ("rtl.txt", "caption from right to left"),
            ("emoji.txt", "caption of emoji"),
            ("latin.txt", "caption in Latin-1"),
            ("nul.txt", "caption with NUL"),
            ("empty.txt", "caption of zero bytes"),
        )
    },
    "data check: manifest with a byte order mark": (
        "data check @music+good.wav+bom.jsonl/bom.jsonl", "0 skipped"),
    "data check: manifest of wrong types": (
        "data check @music+good.wav+wrong_types.jsonl/wrong_types.jsonl", "0 skipped"),
    "tokenizer: silence": ("tokenizer @silent.wav out.wav", "SI-SNR"),
    "tokenizer: one sample": ("tokenizer @one.wav out.wav", "SI-SNR"),
    "tokenizer: 7 channels in stereo": ("tokenizer @seven.wav out.wav --channels 2", "SI-SNR"),
    "tokenizer: one sample in stereo": ("tokenizer @one.wav out.wav --channels 2", "codes [1, 8, 1]"),
    "tokenizer: 7 channels": ("tokenizer @seven.wav out.wav", "SI-SNR"),
    "tokenizer: 64-bit floats": ("tokenizer @double.wav out.wav", "SI-SNR"),
    "analyser: silence": ("analyser @silent.wav", analyser.NONE),
    "analyser: 7 channels": ("analyser @seven.wav", "instrument"),
}

CASES = bad_input.all_cases(REFUSED, SKIPPED, FINE)


@pytest.mark.parametrize("name", CASES)
def test_case(name, bad_input_folder):
    bad_input.check_case(CASES[name], name, bad_input_folder)


def test_the_pickles_are_real(tmp_path, monkeypatch):
    """Loaded carelessly, each of them makes the file that no case may leave behind."""
    monkeypatch.chdir(tmp_path)
    for load in (lambda: pickle.loads(EVIL), lambda: torch.load(io.BytesIO(EVIL_ZIP), weights_only=False)):
        load()
        (tmp_path / "owned").unlink()


if __name__ == "__main__":
    sys.exit(bad_input.print_table(CASES, *sys.argv[1:]))
