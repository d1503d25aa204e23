#!/usr/bin/env bash
# transformers 5.24.0: T5Tokenizer gives other ids than sentencepiece for a BPE spiece.model, without a word.
#
# Seen (transformers==5.24.0, sentencepiece==0.2.3, protobuf, CPython 3.11): a folder with a spiece.model of kind BPE is
# read as if its scores, which are ranks of merges, were log-probabilities of a Unigram: most sentences get other ids
# than sentencepiece gives them. transformers==4.57.1 gives sentencepiece's ids for all of them, and 5.24.0 does so for a
# spiece.model of kind Unigram, which is what T5's own is. A model that was trained on BPE ids then reads other words.
#
# Run: bash findings/t5_tokenizer_reads_bpe_as_unigram.sh     (installs into a temporary folder; fails if this changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/compare.py" <<'PYTHON'
import io
import pathlib
import random
import sys

import sentencepiece
import transformers

rng = random.Random(0)
syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(300)]
sentences = [" ".join(rng.choices(words, k=8)) for _ in range(2000)]
for kind in ("unigram", "bpe"):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=file, model_type=kind, vocab_size=400, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    folder = pathlib.Path(sys.argv[1], kind)
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(file.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    tokenizer = transformers.T5Tokenizer.from_pretrained(str(folder), extra_ids=0, legacy=False)
    other = sum(tokenizer(text).input_ids != [*model.encode(text), 1] for text in sentences[:500])
    print(f"transformers {transformers.__version__}: {kind}: {other} of 500 sentences have other ids "
          "than sentencepiece's")
    newer = transformers.__version__.startswith("5.")
    assert (other > 250) if (kind, newer) == ("bpe", True) else other == 0, "this finding is out of date"
PYTHON
for version in 4.57.1 5.24.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "transformers==$version" "sentencepiece==0.2.3" "protobuf==7.36.1"
    "$folder/$version/bin/python" "$folder/compare.py" "$folder" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
done
