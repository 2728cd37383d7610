"""WordPiece and byte-level BPE, learned from a corpus, as tokenizers that `AutoTokenizer` reloads."""

from collections import Counter
from collections.abc import Callable, Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..running import InputError, learn_tokens

TOKENIZER_TYPES = ("wordpiece", "bpe")
_CONTINUES = "##"  # a piece that continues a word, in WordPiece
_BEGINS = ("Ġ", "▁")  # a piece behind a blank, in byte-level BPE and in SentencePiece
_ALPHABET = 1000  # characters of a WordPiece vocabulary, as in BERT's


def train_tokenizer(
    lines: Callable[[], Iterable[str]],
    kind: str,
    vocab_size: int,
    lowercase: bool = True,
    token_types: bool = True,
    max_length: int = 512,
) -> PreTrainedTokenizerFast:
    """Learn at most `vocab_size` tokens from the lines of a corpus; the same lines give the same tokens and ids.

    Args:
        lines: gives the lines; called twice for "wordpiece".
        kind: "wordpiece", with BERT's special tokens and its splitting at blanks and punctuation; or "bpe", on bytes,
            with RoBERTa's special tokens, a blank before every line.
        lowercase: fold case and accents, as in BERT's uncased models; of "wordpiece" only.
        token_types: give `token_type_ids`, which tell the first sentence of a pair from the second, as BERT and ELECTRA
            take them.
        max_length: tokens that the model takes.

    Raises:
        InputError: there is no line, or `vocab_size` does not even hold the special tokens and the alphabet.
    """
    if next(iter(lines()), None) is None:
        raise InputError("the training files hold no text. Give a corpus with at least one line.")
    if kind == "wordpiece":
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        tokenizer = _train_wordpiece(lines, vocab_size, list(special.values()), lowercase)
    else:
        special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
        tokenizer = _train_bpe(lines, vocab_size, list(special.values()))
        special |= {"bos": special["cls"], "eos": special["sep"]}
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1" if token_types else f"{cls} $A {sep} {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in special.items()},
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", *["token_type_ids"] * token_types, "attention_mask"],
    )


def _train_wordpiece(lines, vocab_size: int, special: list[str], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer.

    The trainer numbers the pieces of one character that continue a word in the order of a hash map, another in every
    process, and breaks ties by these numbers. So they are counted here first, and given to it in their order, as if
    they were special tokens.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    characters = Counter()
    for line in lines():
        characters.update(normalizer.normalize_str(line))
    frequent = sorted(filter(str.strip, characters), key=lambda char: (-characters[char], char))
    alphabet = sorted(frequent[:_ALPHABET])
    continuing = [_CONTINUES + char for char in alphabet]
    _check_vocab_size(vocab_size, len(special) + 2 * len(alphabet))

    def with_splitting(model) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    trained = with_splitting(models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special + continuing,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learn_tokens(trained, lines(), trainer)
    tokenizer = with_splitting(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    return tokenizer


def _train_bpe(lines, vocab_size: int, special: list[str]) -> Tokenizer:
    """RoBERTa's tokenizer; the mask takes the blank before it, so that it stands for a piece with its blank."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_vocab_size(vocab_size, len(special) + len(alphabet))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    mask = AddedToken(special[-1], lstrip=True, normalized=False, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*special[:-1], mask],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learn_tokens(tokenizer, lines(), trainer)
    return tokenizer


def _check_vocab_size(vocab_size: int, least: int) -> None:
    if vocab_size <= least:
        raise InputError(
            f"--vocab_size {vocab_size}: special tokens and alphabet alone are {least}. Give more than these."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Raises `InputError` if a tokenizer lacks what masked language modelling needs: mask, begin, end and padding."""
    missing = [name for name in ("mask", "cls", "sep", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise InputError(
            f"{origin}: its tokenizer has no {missing[0]} token. Give the tokenizer of a masked language model, such "
            "as BERT's or RoBERTa's."
        )


def word_beginnings(tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Of each token id whether it begins a word: no `##` before it in WordPiece, a blank before it in the others.

    So punctuation is a word of its own in WordPiece, and belongs to the word before it in BPE, as in BERT's and in
    fairseq's whole-word masking.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    begins, continues = ([token.startswith(marks) for token in tokens] for marks in (_BEGINS, _CONTINUES))
    if not any(begins) and not any(continues):
        raise InputError(
            "--whole_word_mask: the tokenizer marks neither tokens that begin a word (Ġ, ▁) nor those that continue "
            "one (##). Drop it."
        )
    # The signs of the other kind may be tokens too: a few of thousands
    return begins if sum(begins) > sum(continues) else [not token for token in continues]
