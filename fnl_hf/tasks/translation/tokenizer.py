"""A joint byte-pair encoding of both languages, as a tokenizer that `AutoTokenizer` reloads."""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..running import InputError, learn_tokens

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the names that byte fallback looks for


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Learn a BPE of at most `vocab_size` tokens, all 256 bytes among them, from sentences of both languages.

    Characters never seen fall back to their UTF-8 bytes, so every text with single blanks decodes to itself (after
    Unicode NFC). Words are split at blanks and around punctuation; an apostrophe stays with its letters ("don", "'t"
    are then learned as pieces of one word). Encoding ends with `</s>`; there is no begin token, as in Marian.

    Raises:
        InputError: `vocab_size` does not even hold the special tokens, the bytes and the alphabet.
    """
    bpe = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^▁\p{L}\p{M}\p{N}'’]"), behavior="isolated"),
        ]
    )
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(BYTES), special_tokens=[PAD, EOS, UNK], show_progress=False
    )
    learn_tokens(bpe, texts, trainer)
    bpe.model = _with_bytes(bpe)
    if (least := bpe.get_vocab_size()) > vocab_size:
        raise InputError(
            f"--vocab_size {vocab_size}: special tokens, bytes and the characters of the corpus alone are {least}. "
            "Give more than these."
        )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, bpe.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _with_bytes(bpe: Tokenizer) -> models.BPE:
    """The trained model with the 256 bytes behind its tokens: the trainer itself can only add them as special tokens,
    which decoding would skip."""
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"] | {byte: len(trained["vocab"]) + i for i, byte in enumerate(BYTES)}
    merges = [tuple(merge) for merge in trained["merges"]]
    return models.BPE(vocab=vocab, merges=merges, unk_token=UNK, byte_fallback=True)
