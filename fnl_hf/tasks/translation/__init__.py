"""Translation: parallel corpora, a joint BPE tokenizer, token-sized batches and scoring, for `scripts/`."""

from .arguments import DataArguments, ModelArguments, TranslationArguments, parse_arguments
from .batching import TokenBatchSampler, TranslationTrainer, encode, steps_of_epochs
from .collating import TranslationCollator
from .corpus import Pair, read_corpus
from .languages import prefix_of, set_first_token, set_languages, target_ids
from .model import new_marian, own_dropout
from .scoring import hub_metric, metric_scores, sacrebleu_score, translate
from .tokenizer import train_tokenizer

__all__ = [
    "DataArguments",
    "ModelArguments",
    "Pair",
    "TokenBatchSampler",
    "TranslationArguments",
    "TranslationCollator",
    "TranslationTrainer",
    "encode",
    "hub_metric",
    "metric_scores",
    "new_marian",
    "own_dropout",
    "parse_arguments",
    "prefix_of",
    "read_corpus",
    "sacrebleu_score",
    "set_first_token",
    "set_languages",
    "steps_of_epochs",
    "target_ids",
    "train_tokenizer",
    "translate",
]
