"""Translation: parallel corpora, a joint BPE tokenizer, token-sized batches and scoring, for `scripts/`."""

from .arguments import (
    MAY_CHANGE,
    DataArguments,
    ModelArguments,
    TranslationArguments,
    parse_arguments,
    training_files,
)
from .batching import TokenBatchSampler, TranslationTrainer, encode, steps_of_epochs
from .corpus import Pair, read_corpus
from .model import new_marian
from .scoring import hub_metric, metric_scores, sacrebleu_score, translate
from .tokenizer import train_tokenizer

__all__ = [
    "MAY_CHANGE",
    "DataArguments",
    "ModelArguments",
    "Pair",
    "TokenBatchSampler",
    "TranslationArguments",
    "TranslationTrainer",
    "encode",
    "hub_metric",
    "metric_scores",
    "new_marian",
    "parse_arguments",
    "read_corpus",
    "sacrebleu_score",
    "steps_of_epochs",
    "train_tokenizer",
    "training_files",
    "translate",
]
