"""Bad flags, models and prompts, and how it ends: generate.py, metrics.py, conditioning.py. See bad_input.py.

    python tests/test_bad_generate.py [WORD]    the table: case | how it ended, for the cases that hold WORD
"""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bad_input

REFUSED = {
    # generate.py: flags
    "generate: no run": ("generate --prompt x", "--run"),
    "generate: unknown flag": ("generate --run @model --prompt x --length 3", "--length"),
    "generate: run missing": ("generate --run no/such --prompt x", "no/such", "give the folder of a run"),
    "generate: run without best.pt": ("generate --run @no_best --prompt x", "no_best", "no best.pt"),
    "generate: nothing to generate": ("generate --run @model", "nothing to generate", "--prompt"),
    "generate: no samples": ("generate --run @model --prompt x --n 0", "--n 0", "at least 1"),
    "generate: negative samples": ("generate --run @model --prompt x --n -3", "--n -3", "at least 1"),
    "generate: seconds zero": ("generate --run @model --prompt x --seconds 0", "--seconds 0", "more than 0"),
    "generate: seconds nan": (
        "generate --run @model --prompt x --seconds nan", "--seconds nan", "more than 0"),
    "generate: seconds inf": (
        "generate --run @model --prompt x --seconds inf", "--seconds inf", "at most 3600"),
    "generate: seconds huge": (
        "generate --run @model --prompt x --seconds 99999", "--seconds 99999", "at most 3600"),
    "generate: stride zero": (
        "generate --run @model --prompt x --seconds 2 --stride 0", "--stride 0", "less than the window"),
    "generate: stride nan": (
        "generate --run @model --prompt x --seconds 2 --stride nan", "--stride nan", "less than the window"),
    "generate: stride inf": (
        "generate --run @model --prompt x --seconds 2 --stride inf", "--stride inf", "less than the window"),
    "generate: stride of the window": (
        "generate --run @model --prompt x --seconds 2 --stride 1", "--stride 1", "than the window of 1 s"),
    "generate: stride longer than the window": (
        "generate --run @model --prompt x --stride 99", "--stride 99", "window of 1 s"),
    "generate: stride of one window": (
        "generate --run @model --prompt x --seconds 1 --stride 0.5", "--stride 0.5", "one window of 1 s"),
    "generate: port of no page": ("generate --run @model --prompt x --port 80", "--port 80", "--serve"),
    "generate: likeliest of many": (
        "generate --run @model --prompt x --temperature 0 --top_k 5", "--temperature 0", "leave --top_k"),
    "generate: two kinds of likeliest": (
        "generate --run @model --prompt x --top_p 0.5 --top_k 5", "--top_k 5", "--top_p 0.5 goes before"),
    "generate: guidance towards nothing": (
        "generate --run @model --unconditional --cfg 2", "--cfg 2", "no text or other condition"),
    "generate: double guidance of a text alone": (
        "generate --run @model --prompt x --cfg_style 2", "--cfg_style 2", "both must be given"),
    "generate: negative temperature": (
        "generate --run @model --prompt x --temperature -1", "temperature -1", "between 0 and 100"),
    "generate: top_p over 1": ("generate --run @model --prompt x --top_p 2", "top_p 2", "between 0 and 1"),
    "generate: top_k negative": ("generate --run @model --prompt x --top_k -1", "top_k -1", "between 0 and"),
    "generate: guidance nan": ("generate --run @model --prompt x --cfg nan", "cfg nan", "between"),
    "generate: seed too large": (
        "generate --run @model --prompt x --seed 99999999999999999999999", "--seed 999", "between 0 and"),
    "generate: unknown device": ("generate --run @model --prompt x --device banana", "banana", "cpu, cuda"),
    "generate: device with a bad number": (
        "generate --run @model --prompt x --device cpu:x", "cpu:x", "cpu, cuda"),
    "generate: no GPU": ("generate --run @model --prompt x --device cuda", "--device cuda", "--device cpu"),
    "generate: device of no use": ("generate --run @model --prompt x --device meta", "meta", "cpu, cuda"),
    "generate: codec of another fingerprint": (
        "generate --run @model --prompt x --codec @codec_other", "codec_other", "give that codec"),
    "generate: codec of fewer codebooks": (
        "generate --run @model --prompt x --codec @codec_K2", "num_codebooks 4", "1 to 2"),
    "generate: codec missing": (
        "generate --run @model --prompt x --codec gone.pt", "gone.pt", "no such file"),
    "generate: codec is a pickle": (
        "generate --run @model --prompt x --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "generate: out empty": ("generate --run @model --prompt x --out $empty", "--out", "empty"),
    "generate: out is a file": (
        "generate --run @model --prompt x --out @good.wav", "--out", "good.wav", "cannot be written"),
    "generate: out below a file": (
        "generate --run @model --prompt x --out @good.wav/more", "good.wav/more", "cannot be written"),
    "generate: out read-only": (
        "generate --run @model --prompt x --out @empty_folder", "empty_folder", "cannot be written"),
    # generate.py: what it reads
    "generate: text for a model without": (
        "generate --run @mute --prompt x", "without text", "--unconditional"),
    "generate: prompt of white space": (
        "generate --run @model --prompt $blank", "--prompt", "no text", "--unconditional"),
    "generate: prompt empty": (
        "generate --run @model --prompt $empty", "--prompt", "no text", "--unconditional"),
    "generate: prompts file missing": (
        "generate --run @model --prompts gone.txt", "gone.txt", "No such file"),
    "generate: prompts file empty": ("generate --run @model --prompts @empty.txt", "empty.txt", "no text"),
    "generate: prompts file binary": ("generate --run @model --prompts @binary.txt", "binary.txt", "utf-8"),
    "generate: prompts is a folder": (
        "generate --run @model --prompts @empty_folder", "empty_folder", "directory"),
    "generate: continue a missing file": (
        "generate --run @model --unconditional --continue gone.wav", "--continue gone.wav", "no such file"),
    "generate: continue zero bytes": (
        "generate --run @model --unconditional --continue @zero.wav", "zero.wav", "not readable as audio"),
    "generate: continue a header alone": (
        "generate --run @model --unconditional --continue @none.wav", "none.wav", "no audio"),
    "generate: continue samples not finite": (
        "generate --run @model --unconditional --continue @nan.wav", "nan.wav", "not finite"),
    "generate: continue text named .wav": (
        "generate --run @model --unconditional --continue @text.wav", "text.wav", "not readable"),
    "generate: continue longer than seconds": (
        "generate --run @model --unconditional --continue @good.wav --seconds 1",
        "1.00 s", "--seconds must be longer"),
    **{
        f"generate: best.pt {what}": (f"generate --run @best_{name} --prompt x", f"best_{name}", says)
        for name, what, says in (
            ("empty", "empty", "not a model"),
            ("cut", "cut", "not a model"),
            ("text", "is text", "not a model"),
            ("pickle", "is a pickle", "not a model"),
            ("pickle_zip", "is a pickle in a zip", "not a model"),
            ("list", "is a list", "not a model"),
            ("other_format", "of another format", "not a model"),
            ("no_model", "without weights", "not a model"),
            ("no_codec", "without codec", "not a model"),
            ("no_assets", "without vocabulary", "not a model"),
            ("shapes", "of other shapes", "not a model"),
            ("bad_pieces", "with a broken vocabulary", "not a model"),
            ("bad_config", "with a broken config", "not a model"),
            ("bad_sampling", "with bad sampling", "not a model"),
            ("bad_window", "with a window of nothing", "not a model"),
            ("other_card", "of more codes than the codec", "256"),
        )
    },
    "generate: melody for a model without": (
        "generate --run @model --prompt x --melody @good.wav", "--melody", "good.wav", "without melody"),
    "generate: style for a model without": (
        "generate --run @model --prompt x --style @good.wav", "--style", "good.wav", "without style"),
    "generate: text for a model of melodies": (
        "generate --run @tune --prompt x", "without text", "--unconditional"),
    "generate: melody missing": (
        "generate --run @tune --melody gone.wav", "--melody gone.wav", "no such file"),
    "generate: melody silent": (
        "generate --run @tune --melody @silent.wav", "--melody", "silent.wav", "it is silent"),
    "generate: melody of one sample": (
        "generate --run @tune --melody @one.wav", "--melody", "one.wav", "at least 0.512 s"),
    "generate: melody is text": (
        "generate --run @tune --melody @text.wav", "--melody", "text.wav", "not readable as audio"),
    "generate: style of one sample": (
        "generate --run @tune --style @one.wav", "--style", "one.wav", "at least"),
    "generate: three styles for two melodies": (
        "generate --run @tune --melody a b --style a b c", "2 of melody, 3 samples", "as many"),
    "generate: stems without a melody": (
        "generate --run @tune --unconditional --melody_stems", "--melody_stems", "is not given"),
    "generate: stems without demucs": (
        "generate --run @tune --melody @good.wav --melody_stems", "--melody_stems", "pip install demucs"),
    "generate: double guidance nan": (
        "generate --run @tune --melody @good.wav --cfg_style nan", "cfg_style nan", "both must be given"),
    "generate: top_k of a run with a top_p": (
        "generate --run @best_top_p --unconditional --top_k 5", "0.9, the run's own", "give --top_p 0"),
    # convert
    "convert: a T5 of no package": ("convert @model --t5 t5", "--t5 t5", "no package"),
    "convert: out empty": ("convert @model --to nano --out $empty", "--out", "empty"),
    "convert: out is there": ("convert @model --to nano --out @good.wav", "good.wav", "name a new folder"),
    # metrics
    "metrics: run missing": ("metrics --run no/such", "no/such", "no best.pt"),
    "metrics: run is a pickle": ("metrics --run @best_pickle", "best_pickle", "not a model"),
    "metrics: run without text": ("metrics --run @mute --n 1", "without text"),
    "metrics: pieces of no length": ("metrics --run @model --seconds 0", "--seconds 0", "a toy clip, 1.6 s"),
    "metrics: pieces of no model": ("metrics --seconds 8", "--seconds", "Give --run"),
    "metrics: two tables": ("metrics --run @model --table --seconds 8", "--seconds", "--table"),
    "metrics: settings beside a table": (
        "metrics --run @model --seconds 8 --cfg 3", "--cfg", "--seconds does not read it"),
    "metrics: settings of no model": ("metrics --cfg 3", "--cfg", "of which model?"),
    "metrics: no clips": ("metrics --run @model --n 0", "--n 0", "at least 1"),
    "metrics: no clips of a codec": ("metrics --n 0", "--n 0", "at least 1"),
    "metrics: negative seed": ("metrics --n 1 --seed -1", "--seed -1", "at least 0"),
    "metrics: top_p over 1": ("metrics --run @model --top_p 0.5 2", "top_p 2", "between 0 and 1"),
    "metrics: temperature is a word": ("metrics --run @model --temperature hot", "--temperature", "'hot'"),
    "metrics: unknown split": ("metrics --run @model --split test", "'test'", "heldout"),
    "metrics: codec unknown": ("metrics --codec mystery", "'mystery'", "toy, encodec_24khz"),
    "metrics: codec is a pickle": ("metrics --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "metrics: a CLAP that nothing reads": (
        "metrics --reference @music --generated @music --clap x", "--clap x", "--fad_embedding clap"),
    # conditioning
    "conditioning: nothing": ("conditioning --run @tune", "text"),
    "style: without a run": ("style @good.wav", "--run"),
    "style: of a run without": ("style @good.wav --run @model", "model", "without style"),
    "chroma: missing": ("chroma gone.wav", "gone.wav", "not readable as audio"),
    "conditioning: no text": ("conditioning", "text"),
    "conditioning: run missing": ("conditioning organ --run no/such", "no/such", "give the folder of a run"),
    "conditioning: run is a pickle": ("conditioning organ --run @best_pickle", "best_pickle", "not a model"),
    "conditioning: run cut": ("conditioning organ --run @best_cut", "best_cut", "not a model"),
    "conditioning: run without text": ("conditioning organ --run @mute", "mute", "without text"),
    "conditioning: broken vocabulary": (
        "conditioning organ --run @best_bad_pieces", "best_bad_pieces", "not a model"),
}

# The words stand in what is printed.
FINE = {
    "generate: prompt of 100,000 words": ("generate --run @model --prompt $long", "wrote"),
    "generate: prompt with NUL": ("generate --run @model --prompt $nul", "wrote"),
    "generate: prompt of emoji": ("generate --run @model --prompt $emoji", "wrote"),
    "generate: prompt from right to left": ("generate --run @model --prompt $rtl", "wrote"),
    "generate: prompt that is no UTF-8": ("generate --run @model --prompt $surrogate", "wrote"),
    "generate: continue one sample": ("generate --run @model --unconditional --continue @one.wav", "wrote"),
    "generate: continue 7 channels": (
        "generate --run @model --unconditional --continue @seven.wav --seconds 1.1", "wrote"),
    "generate: continue silence": (
        "generate --run @model --unconditional --continue @silent.wav --seconds 1.1", "wrote"),
    "generate: names in the folder that are no numbers": (
        "generate --run @model --unconditional --out @odd_names", "wrote"),
    "generate: a melody and a style": (
        "generate --run @tune --melody @good.wav --style @good.wav --cfg 2", "wrote"),
    "generate: a melody that begins again": (
        "generate --run @tune --melody @good.wav --seconds 2.5", "wrote"),
    "generate: style of silence": ("generate --run @tune --style @silent.wav", "wrote"),
    "conditioning: text with NUL": ("conditioning $nul --run @model", "pieces"),
    "conditioning: text that is no UTF-8": ("conditioning $surrogate --run @model", "pieces"),
    "conditioning: text of nothing": ("conditioning $empty --run @model", "pieces"),
}

CASES = bad_input.all_cases(REFUSED, {}, FINE)


@pytest.mark.parametrize("name", CASES)
def test_case(name, bad_input_folder):
    bad_input.check_case(CASES[name], name, bad_input_folder)


if __name__ == "__main__":
    sys.exit(bad_input.print_table(CASES, *sys.argv[1:]))
