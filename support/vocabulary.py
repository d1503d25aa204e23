"""The pieces of the text: a vocabulary fitted to captions with sentencepiece, and what one cannot say.

    "Slow Organ, 138 BPM" ─folded─► "slow organ, 138 bpm" ─pieces─► ▁slow ▁organ , ▁ 1 3 8 ▁bpm </s>

Capitals and wide characters are folded: another spelling of a text is the same text. Each digit is a piece of
its own. A character that no caption had is spelled in its bytes, so that two texts are never one. The pieces
are those of a Unigram (Kudo 2018, arXiv:1804.10959), as T5's are. Vocabularies of older runs, and T5's, fold
no capitals and have one piece for all that is unknown; they stay as they are.
"""

import io
import re

import sentencepiece

from support import common

PAD, EOS, UNK = 0, 1, 2                        # ids, T5's
BYTES = 256                                    # pieces of one byte each, beside those fitted to captions
NO_CAPTIONS = ("no captions to fit the text encoder's vocabulary on, or to train it with: add captions (a "
               ".txt or .json beside each audio file, or a table) or train without text (--no_text)")
FOLDING = "nmt_nfkc_cf"                        # sentencepiece's name of: NFKC, then case folding


def clean_text(text: str | None) -> str:
    """One line of text without control characters; at most common.MAX_TEXT characters."""
    if not text:
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:common.MAX_TEXT]).split())


def fit_sentencepiece(captions, vocab: int = 2000) -> bytes:
    """Trains a vocabulary on captions and returns it as a serialized sentencepiece model.

    vocab: the most pieces, beside the bytes; fewer come out where the captions do not hold that many.
    Errors: ValueError if there is no text, or more characters in it than pieces are allowed."""
    texts = [t for t in (clean_text(c) for c in captions) if t]
    if not texts:
        raise ValueError(NO_CAPTIONS)
    # A Unigram takes for a piece only what stands in two places that differ. In captions of few words a word
    # always stands the same, and would fall apart into letters: each is shown in one place more.
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
    shown = [*texts, *(f"{word} {word}," for word in words)]
    out = io.BytesIO()
    try:
        # num_threads: another number gives other pieces. max_sentence_length is in bytes; its default of
        # 4,192 would silently drop longer captions.
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(shown), model_writer=out, vocab_size=vocab + BYTES, model_type="unigram",
            normalization_rule_name=FOLDING, byte_fallback=True, split_digits=True, hard_vocab_limit=False,
            pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1, num_threads=1, minloglevel=2,
            max_sentence_length=4 * common.MAX_TEXT)
    except (RuntimeError, ValueError):         # every character needs a piece of its own
        folded = sentencepiece.SentencePieceNormalizer(rule_name=FOLDING).normalize("".join(texts))
        characters = len(set(folded) | set("▁,"))
        raise ValueError(f"text_vocab {vocab}: the captions hold {characters} different characters, give at "
                         f"least {characters + 3}") from None
    return out.getvalue()


def vocabulary_size(pieces: bytes) -> int:
    """Number of pieces of a serialized sentencepiece model."""
    return sentencepiece.SentencePieceProcessor(model_proto=pieces).vocab_size()


def spells_bytes(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a vocabulary has a piece for each byte, so that it can say any text."""
    return any(map(processor.is_byte, range(processor.vocab_size())))


def unknown_words(processor: sentencepiece.SentencePieceProcessor, text: str) -> list:
    """Words of a text with characters for which a vocabulary has no piece, each once."""
    def is_unknown(word: str) -> bool:
        return any(processor.is_unknown(i) or processor.is_byte(i) for i in processor.encode(word))
    return list(dict.fromkeys(word for word in clean_text(text).split() if is_unknown(word)))


def reading_notes(processor: sentencepiece.SentencePieceProcessor, text: str, max_tokens: int) -> list:
    """Lines on what of a text a model does not read: words outside its vocabulary, and what is cut off."""
    notes = []
    if words := unknown_words(processor, text):
        shown = ", ".join(words[:10]) + (f" and {len(words) - 10} more" if len(words) > 10 else "")
        how = "all one unknown piece to this model"
        if spells_bytes(processor):
            how = "spelled in bytes, which few captions had"
        notes.append(f"not in the vocabulary: {shown} ({how})")
    ids = processor.encode(clean_text(text))
    if len(ids) >= max_tokens:                 # one is for the end
        heard = processor.decode(ids[:max_tokens - 1])
        notes.append(f"cut off: {len(ids)} pieces of {max_tokens - 1}, read only up to \"..{heard[-40:]}\"")
    return notes


def caption_notes(pieces: bytes, captions: list, max_tokens: int) -> list:
    """Lines on captions that a model does not read as they are, counted; see `reading_notes`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    rows = processor.encode([clean_text(text) for text in captions])
    notes = []
    if count := sum(len(ids) >= max_tokens for ids in rows):
        notes.append(f"text: {count} of {len(rows)} captions are longer than {max_tokens - 1} pieces; the "
                     "rest of them is not read")
    if count := sum(any(map(processor.is_unknown, ids)) for ids in rows):
        notes.append(f"text: {count} of {len(rows)} captions hold words that the vocabulary has no piece for")
    return notes
