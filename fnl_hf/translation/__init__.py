"""Translation: parallel corpora, a joint BPE tokenizer, token-sized batches and scoring, for `scripts/`.

A side wing: beside transformers it uses the library's training arguments, and nothing in the library imports it.
"""

from .arguments import DataArguments, ModelArguments, TranslationArguments, parse_arguments, parse_head_rank
from .batching import TokenBatches, TokenBatchSampler
from .corpus import InputError, Pair, one_line, read_split
from .model import new_marian
from .resume import (
    average_checkpoints_,
    check_same_model,
    complete_checkpoints,
    is_finished,
    last_complete_checkpoint,
)
from .scoring import hub_metric, metric_scores, sacrebleu_score, translate
from .tokenizer import train_tokenizer

__all__ = [
    "DataArguments",
    "InputError",
    "ModelArguments",
    "Pair",
    "TokenBatchSampler",
    "TokenBatches",
    "TranslationArguments",
    "average_checkpoints_",
    "check_same_model",
    "complete_checkpoints",
    "hub_metric",
    "is_finished",
    "last_complete_checkpoint",
    "metric_scores",
    "new_marian",
    "one_line",
    "parse_arguments",
    "parse_head_rank",
    "read_split",
    "sacrebleu_score",
    "train_tokenizer",
    "translate",
]
