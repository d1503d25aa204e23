#!/usr/bin/env bash
# sentencepiece 0.2.3: a Unigram vocabulary trained on the same sentences is another file for another num_threads.
#
# Seen (sentencepiece==0.2.3, CPython 3.11, 3,000 sentences, 800 pieces): with 1 thread and with 2, 4, 8 or 16 the pieces
# are the same, but 66 to 78 of their scores differ, by up to 3e-6. With one number of threads training repeats to the
# last bit; BPE gives the same pieces and scores for all. num_threads is 16 by default, whatever the machine has. So a
# vocabulary that must be the same wherever it is made needs a stated num_threads.
#
# Run: bash findings/unigram_scores_depend_on_threads.sh     (installs into a temporary folder; fails if this changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "sentencepiece==0.2.3"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import random

import sentencepiece

rng = random.Random(0)
syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
frequency = [1 / rank for rank in range(1, len(words) + 1)]
sentences = [" ".join(rng.choices(words, frequency, k=12)) for _ in range(3000)]


def train(kind, threads):
    """[(piece, score)] of a vocabulary of 800 pieces."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=file, model_type=kind, vocab_size=800,
        num_threads=threads, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]


print("sentencepiece", sentencepiece.__version__)
for kind in ("unigram", "bpe"):
    one = train(kind, 1)
    assert train(kind, 1) == one, "one thread does not repeat"
    for threads in (2, 4, 8, 16):
        many = train(kind, threads)
        assert train(kind, threads) == many, f"{threads} threads do not repeat"
        scores = dict(many)
        shared = [(score, scores[piece]) for piece, score in one if piece in scores]
        differ = [abs(a - b) for a, b in shared if a != b]
        print(f"{kind}, {threads} threads: {len(differ)} of {len(one)} scores differ from one thread's, "
              f"by at most {max(differ, default=0):.1e}; {len(one) - len(shared)} other pieces")
        assert bool(differ) == (kind == "unigram"), "this finding is out of date"
PYTHON
