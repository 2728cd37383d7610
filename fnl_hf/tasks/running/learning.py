"""Learning the tokens of a tokenizer."""

from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.trainers import Trainer

_LONGEST_WORD = 1000  # characters


def learn_tokens(tokenizer: Tokenizer, texts: Iterable[str], trainer: Trainer) -> None:
    """Train a tokenizer in place, with words of more than 1000 characters cut into several.

    The time that BPE and WordPiece take to learn from a word grows with the square of its length: one of 3,000,000
    characters (a line without blanks) would take an hour. Encoding cuts no words: it takes seconds for such a line.
    """
    splitting = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitting, pre_tokenizers.FixedLength(length=_LONGEST_WORD)])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = splitting
