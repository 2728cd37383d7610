"""Translation: parallel corpora, a joint BPE tokenizer, token-sized batches and scoring, for `scripts/`."""

from .arguments import DataArguments, ModelArguments, TranslationArguments, parse_arguments
from .batching import TokenBatchSampler, TranslationTrainer, steps_of_epochs
from .corpus import Pair, ParallelText, read_corpus, read_pairs
from .encoding import PairStore, encode, prepare_pairs, prepare_vocabulary, tokenize_pairs
from .model import new_marian
from .scoring import hub_metric, metric_scores, sacrebleu_score, translate
from .tokenizer import train_tokenizer

__all__ = [
    "DataArguments",
    "ModelArguments",
    "Pair",
    "PairStore",
    "ParallelText",
    "TokenBatchSampler",
    "TranslationArguments",
    "TranslationTrainer",
    "encode",
    "hub_metric",
    "metric_scores",
    "new_marian",
    "parse_arguments",
    "prepare_pairs",
    "prepare_vocabulary",
    "read_corpus",
    "read_pairs",
    "sacrebleu_score",
    "steps_of_epochs",
    "tokenize_pairs",
    "train_tokenizer",
    "translate",
]
