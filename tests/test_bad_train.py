"""Bad flags, files and folders of train.py, and how it ends. See bad_input.py.

    python tests/test_bad_train.py [WORD]    the table: case | how it ended, for the cases that hold WORD
"""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bad_input

REFUSED = {
    # train.py: flags
    "train: a flag that does not exist": ("train --sise tiny", "--sise"),
    "train: a size that does not exist": ("train --size huge", "--size huge", "tiny"),
    "train: a pattern that does not exist": ("train --pattern zigzag", "'zigzag'", "delay"),
    "train: a word for a number": ("train --epochs many", "--epochs", "'many'"),
    "train: a fraction for a whole number": ("train --batch_size 2.5", "--batch_size", "'2.5'"),
    "train: three channels": ("train --channels 3", "--channels", "1, 2"),
    "train: two channels of a mono cache": (
        "train --channels 2 --cache @cache", "holds 4 codebooks", "channels 1", "use that codec"),
    "train: one channel of a stereo cache": (
        "train --cache @cache_stereo", "holds 8 codebooks", "channels 2", "use that codec"),
    "train: two channels in a folder of one": (
        "train --out @run --channels 2 --epochs 2", "--channels 1 there, 2 now", "another --out"),
    "train: too many codebooks of two channels": (
        "train --channels 2 --num_codebooks 8", "num_codebooks 8", "1 to 4"),
    "train: start from nothing": ("train --init_from no/such", "no/such", "give the folder of a run"),
    "train: start from another size": (
        "train --init_from @model --size tiny", "dim 64 there, 192 here", "it was trained with"),
    "train: stereo start from another size": (
        "train --init_from @model --channels 2 --size tiny", "dim 64 there, 192 here"),
    "train: start from fewer conditions": (
        "train --init_from @mute", "cross_attention False there", "it was trained with"),
    "train: start from other codebooks": (
        "train --init_from @model --num_codebooks 2", "codes 4 of toy", "codes 2 of toy"),
    **{
        f"train: start from a best.pt {what}": (f"train --init_from @best_{name}", f"best_{name}", says)
        for name, what, says in (
            ("cut", "cut", "not a model"),
            ("pickle", "is a pickle", "not a model"),
            ("no_model", "without weights", "not a model"),
            ("no_codec", "without codec", "not a model"),
            ("no_assets", "without vocabulary", "not a model"),
            ("shapes", "of other shapes", "not what its configuration says"),
            ("bad_pieces", "with a broken vocabulary", "not a model"),
            ("bad_config", "with a broken config", "num_layers is 'two'"),
        )
    },
    "train: no epochs": ("train --epochs 0", "--epochs 0", "at least 1"),
    "train: negative updates": ("train --updates_per_epoch -1", "--updates_per_epoch -1", "at least 1"),
    "train: batch of none": ("train --batch_size 0", "--batch_size 0", "at least 1"),
    "train: batch not divisible": (
        "train --batch_size 4 --micro_batch_size 3", "--micro_batch_size 3", "1, 2, 4"),
    "train: learning rate nan": ("train --lr nan", "--lr nan", "more than 0"),
    "train: learning rate negative": ("train --lr -0.001", "--lr -0.001", "more than 0"),
    "train: text learning rate zero": ("train --text_lr 0", "--text_lr 0", "more than 0"),
    "train: probability over 1": ("train --cfg_dropout 1.5", "--cfg_dropout 1.5", "between 0 and 1"),
    "train: probability negative": ("train --word_dropout -0.1", "--word_dropout -0.1", "between 0 and 1"),
    "train: probability nan": ("train --merge_text_p nan", "--merge_text_p nan", "between 0 and 1"),
    "train: dropout over 1": ("train --dropout 2", "--dropout 2", "between 0 and 1"),
    "train: weight decay nan": ("train --weight_decay nan", "--weight_decay nan", "at least 0"),
    "train: negative workers": ("train --workers -1", "--workers -1", "at least 0"),
    "train: negative seed": ("train --seed -1", "--seed -1", "at least 0"),
    "train: top_p over 1": ("train --top_p 2", "top_p 2", "between 0 and 1"),
    "train: negative temperature": ("train --temperature -1", "temperature -1", "between 0 and 100"),
    "train: negative top_k": ("train --top_k -5", "top_k -5", "between 0 and"),
    "train: guidance nan": ("train --cfg nan", "cfg nan", "between"),
    "train: float16 on a CPU": ("train --dtype float16", "float16", "bfloat16"),
    "train: unknown device": ("train --device banana", "banana", "cpu, cuda"),
    "train: device with a bad number": ("train --device cpu:x", "cpu:x", "cpu, cuda"),
    "train: seed too large": ("train --seed 99999999999999999999999", "--seed 999"),
    "train: learning rate inf": ("train --lr inf", "--lr inf", "less than 10000"),
    "train: segment huge": ("train --segment_seconds 1e9", "--segment_seconds 1000000000", "at most 3600"),
    "train: segment far below a sample": ("train --segment_seconds 1e-9", "--segment_seconds 1e-09"),
    "train: segment of one frame": ("train --segment_seconds 0.02", "--segment_seconds 0.02"),
    "train: offload without shards": ("train --cpu_offload", "--cpu_offload", "--parallel fsdp"),
    "train: time-out of nothing": ("train --timeout 0", "--timeout 0.0", "more than 0"),
    "train: negative minutes": ("train --save_minutes -1", "--save_minutes -1.0", "at least 0"),
    "train: a plan for no GPU": ("train --dry_run --plan_gpus 0", "--plan_gpus 0", "at least 1"),
    "train: a plan of no start": ("train --dry_run --init_from no/such", "no/such", "no best.pt"),
    "train: a plan of a start that does not fit": (
        "train --dry_run --init_from @model --size tiny", "dim 64 there, 192 here", "it was trained with"),
    "train: embeddings far too large": ("train --emb_std 150", "--emb_std 150", "less than 100"),
    "train: ZeRO-1": ("train --zero 1", "--zero", "2, 3"),
    "train: log.jsonl of something else": ("train --out @no_log --epochs 2", "log.jsonl"),
    **{
        f"train: last.pt {what}": (f"train --out @last_{name} --epochs 2", f"last_{name}")
        for name, what in (
            ("empty", "empty"),
            ("cut", "cut"),
            ("flipped", "with a bit flipped"),
            ("text", "is text"),
            ("pickle", "is a pickle"),
            ("pickle_zip", "is a pickle in a zip"),
            ("list", "is a list"),
            ("other_format", "of another format"),
            ("no_tensors", "without weights"),
            ("no_args", "without flags"),
            ("no_assets", "without vocabulary"),
            ("shapes", "of other shapes"),
            ("names", "with tensors of nothing"),
            ("bad_pieces", "with a broken vocabulary"),
        )
    },
    "train: no GPU": ("train --device cuda", "--device cuda", "--device cpu"),
    "train: fuse without method": ("train --fuse text", "--fuse text", "text=cross"),
    "train: fuse of an unknown method": ("train --fuse text=nowhere", "text=nowhere", "cross, prepend, sum"),
    "train: fuse of an unknown condition": ("train --fuse melody=cross", "'melody'", "text"),
    "train: fuse with two signs": ("train --fuse text=cross=sum", "text=cross=sum", "NAME=METHOD"),
    "train: segment nan": ("train --segment_seconds nan", "--segment_seconds nan", "more than 0"),
    "train: segment zero": ("train --segment_seconds 0", "--segment_seconds 0", "more than 0"),
    "train: share of a segment over 1": (
        "train --dataset @music --min_segment_ratio 1.5", "--min_segment_ratio 1.5", "between 0 and 1"),
    "train: least length of toy clips": ("train --min_seconds 5", "--min_seconds 5", "no files"),
    "train: toy clips by duration": ("train --sample_by duration", "--sample_by duration", "no files"),
    "train: share of a segment zero": (
        "train --dataset @music --min_segment_ratio 0", "--min_segment_ratio 0", "more than 0"),
    "train: no codebooks": ("train --num_codebooks 0", "num_codebooks 0", "at least 1"),
    "train: too many codebooks": ("train --num_codebooks 99", "num_codebooks 99", "1 to 4"),
    "train: vocabulary of one piece": ("train --text_vocab 1", "text_vocab 1", "characters"),
    "train: vocabulary smaller than the alphabet": ("train --text_vocab 9", "text_vocab 9", "characters"),
    "train: a condition that does not exist": ("train --conditions smell", "'smell'", "melody"),
    "train: probability of losing the melody over 1": (
        "train --conditions melody --melody_dropout 1.5", "--melody_dropout 1.5", "between 0 and 1"),
    "train: style longer than the segment": (
        "train --conditions style --style_seconds 0.5 3", "--style_seconds 0.5 3", "less than the segment"),
    "train: style from long to short": (
        "train --conditions style --style_seconds 0.5 0.2", "--style_seconds 0.5 0.2", "not less"),
    "train: style of nan": (
        "train --conditions style --style_seconds nan 0.2", "--style_seconds nan 0.2", "more than 0"),
    "train: no levels": ("train --conditions style --style_levels 0", "--style_levels 0", "at least 1"),
    "train: stems without demucs": (
        "train --conditions melody --melody_stems", "--melody_stems", "pip install demucs"),
    "train: melody from a cache without": (
        "train --cache @cache_no_chroma --conditions melody",
        "cache_no_chroma", "no chroma", "data.py cache"),
    "train: melody from a damaged cache": (
        "train --cache @cache_cut_chroma --conditions melody", "cache_cut_chroma", "damaged"),
    # train.py: flags that nothing would read
    **{
        f"train: {flags}": (f"train {flags}", *says)
        for flags, *says in (
            ("--valid 0.1", "--valid 0.1", "no files", "leave it out"),
            ("--valid @music", "--valid", "no files"),
            ("--min_segment_ratio 0.5", "--min_segment_ratio 0.5", "no files"),
            ("--caption_column text", "--caption_column text", "its own"),
            ("--cache @cache --captions a.csv", "--captions a.csv", "when it was made"),
            ("--no_text --word_dropout 0.1", "--word_dropout 0.1", "no text"),
            ("--no_text --freeze_text_encoder", "--freeze_text_encoder", "no text"),
            ("--conditions melody --text_dropout 0.1", "--text_dropout 0.1", "no text"),
            ("--melody_dropout 0.5", "--melody_dropout 0.5", "no melody"),
            ("--no-melody_argmax", "--no-melody_argmax", "no melody"),
            ("--style_seconds 0.2 0.4", "--style_seconds 0.2 0.4", "no style"),
            ("--conditions melody --text_lr 1e-3", "--text_lr 0.001", "nothing learns at it"),
            ("--no_text --cfg 2", "--cfg 2", "no conditions"),
            ("--no_text --fuse text=sum", "--fuse text=sum", "no conditions"),
            ("--conditions text melody --no_text --fuse text=sum", "--fuse text=sum", "no text"),
            ("--init_from @model --emb_std 0.5", "--emb_std 0.5", "those of --init_from"),
            ("--init_from @model --text_vocab 300", "--text_vocab 300", "that of --init_from"),
            ("--init_from @model --lora 2 --text_lr 1e-3", "--text_lr 0.001", "--lora"),
            ("--init_from @model --lora 2 --no-freeze_text_encoder", "--no-freeze_text_encoder", "--lora"),
            ("--drop_desc_p 0.1", "--drop_desc_p 0.1", "--merge_text_p is 0"),
            ("--zero 2", "--zero 2", "--parallel fsdp"),
            ("--plan_gpus 8", "--plan_gpus 8", "only --dry_run reads it"),
            ("--dry_run --plan_tflops 100", "--plan_tflops 100", "--plan_gpus"),
            ("--temperature 0 --top_k 5", "--top_k 5", "likeliest"),
            ("--top_p 0.5 --top_k 5", "--top_k 5", "--top_p 0.5 goes before"),
            ("--only valid --out @run --epochs 5", "--epochs 5", "no stage alone"),
            ("--only generate --out @run --tensorboard", "--tensorboard", "no stage alone"),
            ("--only valid --out @run --cfg 2", "--cfg 2", "--only valid does not read it"),
            ("--only evaluate --out @run --updates_per_epoch 9", "--updates_per_epoch 9", "does not read it"),
            ("--only valid --out @run --compile", "--compile", "no stage alone"),
        )
    },
    "train: additions to nothing, of a small model": (
        "train --dataset @music --lora 2", "--lora 2", "give them by --init_from"),
    # train.py: what it reads
    "train: dataset missing": ("train --dataset no/such", "'no/such'", "give a folder"),
    "train: dataset is a song": ("train --dataset @good.wav", "good.wav", "give the folder"),
    "train: dataset folder empty": ("train --dataset @empty_folder", "empty_folder", "found nothing"),
    "train: folder without audio": ("train --dataset @no_audio", "not audio by its name", "cover.jpg"),
    "train: folder of bad audio only": ("train --dataset @only_bad", "zero bytes", "text.wav"),
    "train: folder without captions": ("train --dataset @no_captions", "no captions", "--no_text"),
    "train: captions of white space": ("train --dataset @blank_captions", "no captions", "--no_text"),
    **{
        f"train: {what}{when}": (f"train {flags} {flag}", *says)
        for flag, when in (("", ""), ("--dry_run", ", known to a dry run"))
        for what, flags, *says in (
            ("start without captions", "--dataset @no_captions --init_from @model",
             "no captions", "--no_text"),
            ("validation not finite", "--dataset @music --valid @only_nan", "validation: 11 files in a row",
             "nan.wav", "not finite"),
            ("validation as short as a style", "--dataset @music --valid @only_short --conditions style "
             "--style_seconds 0.2 0.8", "longest validation clip has 0.3 s", "shorter --style_seconds"),
            ("training as short as a style", "--dataset @only_short --conditions style "
             "--style_seconds 0.3 0.8", "longest training clip has 0.3 s", "shorter --style_seconds"),
        )
    },
    "train: valid fraction over 1": ("train --dataset @music --valid 7", "--valid 7", "between 0 and 1"),
    "train: valid fraction nan": ("train --dataset @music --valid nan", "--valid nan", "between 0 and 1"),
    "train: valid folder missing": ("train --dataset @music --valid no/such", "'no/such'", "give a folder"),
    "train: valid is the dataset": ("train --dataset @music --valid @music", "--valid", "nothing is left"),
    "train: cache missing": ("train --cache no/such", "'no/such'", "data.py cache"),
    "train: cache is a folder of songs": ("train --cache @music", "no token cache", "data.py cache"),
    "train: cache without a shard": ("train --cache @cache_no_shard", "cache_no_shard", "run the same"),
    "train: cache without entries": ("train --cache @cache_no_entries", "cache_no_entries", "run the same"),
    "train: cache with a cut shard": ("train --cache @cache_cut", "cache_cut", "run the same"),
    "train: cache with a pickle for a shard": ("train --cache @cache_pickle", "cache_pickle", "run the same"),
    "train: cache with pickled objects in a shard": (
        "train --cache @cache_objects", "cache_objects", "run the same"),
    "train: cache.json is text": ("train --cache @cache_text", "cache_text", "run the same"),
    "train: cache.json is a list": ("train --cache @cache_list", "cache_list", "run the same"),
    "train: cache.json names no codec": ("train --cache @cache_no_codec", "cache_no_codec", "run the same"),
    "train: cache of no shards": ("train --cache @cache_no_shards", "cache_no_shards", "run the same"),
    "train: cache of toy clips": ("train --cache @cache_toy", "cache_toy", "made fresh", "--dataset toy"),
    "train: cache with words for seconds": ("train --cache @cache_times", "cache_times", "run the same"),
    "train: cache with places outside its shard": (
        "train --cache @cache_places", "cache_places", "run the same"),
    "train: cache with a list for metadata": ("train --cache @cache_meta", "cache_meta", "run the same"),
    "train: cache of floats": ("train --cache @cache_floats", "cache_floats", "run the same"),
    "train: cache with codes over card": ("train --cache @cache_codes", "cannot be read", "0 to 255"),
    "train: cache of another codec": (
        "train --cache @cache --codec @codec_other", "fingerprint", "use that codec"),
    "train: cache of fewer codebooks": ("train --cache @cache_K2", "holds 2 codebooks", "not 4"),
    "train: cache of more codes": (
        "train --cache @cache --codec @codec_card128", "fingerprint", "use that codec"),
    "train: codec missing": ("train --codec no_such.pt", "no_such.pt", "no such file"),
    "train: codec unknown": ("train --codec mystery", "'mystery'", "toy, encodec_24khz"),
    "train: codec of 48 kHz": ("train --codec encodec_48khz", "encodec_48khz", "use encodec_24khz"),
    "train: codec empty": ("train --codec @zero.pt", "zero.pt", "damaged"),
    "train: codec is a pickle": ("train --codec @pickle.pt", "pickle.pt", "not a codec file"),
    "train: codec is a pickle in a zip": (
        "train --codec @pickle_zip.pt", "pickle_zip.pt", "not a codec file"),
    "train: codec of fewer codebooks than asked": (
        "train --codec @codec_K2 --num_codebooks 4", "num_codebooks 4", "1 to 2"),
    # train.py: the run folder
    "train: out empty": ("train --out $empty", "--out", "empty"),
    "train: out of white space": ("train --out $blank", "--out", "empty"),
    "train: out empty, a stage alone": ("train --only valid --out $empty", "--out", "empty"),
    "train: out is a file": ("train --out @good.wav", "good.wav", "cannot be written"),
    "train: out below a file": ("train --out @good.wav/run", "good.wav/run", "cannot be written"),
    "train: run folder read-only": ("train --out @run --epochs 2", "run", "cannot be written"),
    "train: resume never, over a run": ("train --out @run --resume never", "--resume never", "another --out"),
    "train: checkpoint of another size": (
        "train --out @run --size tiny", "--size debug there, tiny now", "another --out"),
    "train: checkpoint of other flags": (
        "train --out @run --lr 0.5 --no_text", "--lr 0.008 there, 0.5 now", "--no_text False there"),
}

# The last word stands once in what is printed.
SKIPPED = {
    "train: zero bytes among songs": ("train --dataset @music+zero.wav", "1 zero bytes", "zero.wav"),
    "train: samples not finite among songs": (
        "train --dataset @music+nan.wav --valid_samples 6 --batch_size 6", "not finite", "nan.wav"),
}

# The words stand in what is printed.
FINE = {
    "train: warm-up longer than the run": (
        "train --warmup_steps 9 --lr 0.1", "the learning rate ends at 1.0e-02 of 1.0e-01, still rising"),
    "train: shards of one rank": (
        "train --dry_run --parallel fsdp --cpu_offload", "sharded and --cpu_offload moves nothing"),
    "train: warm-up longer than the run, dry": ("train --dry_run --warmup_steps 9", "still rising"),
    "train: songs of one and of seven channels in stereo": (
        "train --dataset @music+seven.wav --channels 2", "finished"),
    "train: odd captions": (
        "train --dataset @music+surrogate.json+nul.txt+emoji.txt+rtl.txt+binary.txt+words.txt", "finished"),
    "train: one caption of 1,600 words": ("train --dataset @long_caption", "finished"),
    "train: no clip of validation has a caption": (
        "train --dataset @music --valid @no_captions", "no clip of validation has captions", "finished"),
    "train: odd audio": (
        "train --dataset @music+silent.wav+one.wav+seven.wav+u8.wav+double.wav+pcm24.wav", "finished"),
    "train: an old cache with text alone": ("train --cache @cache_no_chroma", "finished"),
}

CASES = bad_input.all_cases(REFUSED, SKIPPED, FINE)


@pytest.mark.parametrize("name", CASES)
def test_case(name, bad_input_folder):
    bad_input.check_case(CASES[name], name, bad_input_folder)


if __name__ == "__main__":
    sys.exit(bad_input.print_table(CASES, *sys.argv[1:]))
