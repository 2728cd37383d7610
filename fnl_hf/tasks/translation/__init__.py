"""Translation: parallel corpora, a joint BPE tokenizer, token-sized batches and scoring, for `scripts/`."""

from .arguments import DataArguments, ModelArguments, TranslationArguments, parse_arguments
from .batching import TokenBatchSampler, TranslationTrainer, encode, steps_of_epochs
from .corpus import Pair, read_corpus, read_split
from .generation import translate
from .model import new_marian
from .scoring import (
    References,
    bleu_for,
    hub_metric,
    metric_scores,
    read_references,
    sacrebleu_scores,
    write_translations,
)
from .tokenizer import train_tokenizer
from .validation import Patience

__all__ = [
    "DataArguments",
    "ModelArguments",
    "Pair",
    "Patience",
    "References",
    "TokenBatchSampler",
    "TranslationArguments",
    "TranslationTrainer",
    "bleu_for",
    "encode",
    "hub_metric",
    "metric_scores",
    "new_marian",
    "parse_arguments",
    "read_corpus",
    "read_references",
    "read_split",
    "sacrebleu_scores",
    "steps_of_epochs",
    "train_tokenizer",
    "translate",
    "write_translations",
]
