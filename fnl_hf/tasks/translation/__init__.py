"""Translation: parallel corpora, a joint BPE tokenizer, token-sized batches and scoring, for `scripts/`."""

from .arguments import (
    MAY_CHANGE,
    DataArguments,
    ModelArguments,
    TranslationArguments,
    parse_arguments,
    training_files,
)
from .batching import TokenBatchSampler, TranslationTrainer, steps_of_epochs
from .collating import TranslationCollator
from .corpus import Pair, ParallelText, read_corpus, read_pairs, split_text
from .encoding import PairStore, encode, prepare_pairs, prepare_vocabulary, tokenize_pairs
from .generation import store_search, translate
from .languages import languages_of, prefix_of, set_first_token, set_languages, target_ids, use_languages
from .model import new_marian, own_dropout
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
    "MAY_CHANGE",
    "DataArguments",
    "ModelArguments",
    "Pair",
    "PairStore",
    "ParallelText",
    "Patience",
    "References",
    "TokenBatchSampler",
    "TranslationArguments",
    "TranslationCollator",
    "TranslationTrainer",
    "bleu_for",
    "encode",
    "hub_metric",
    "languages_of",
    "metric_scores",
    "new_marian",
    "own_dropout",
    "parse_arguments",
    "prefix_of",
    "prepare_pairs",
    "prepare_vocabulary",
    "read_corpus",
    "read_pairs",
    "read_references",
    "sacrebleu_scores",
    "set_first_token",
    "set_languages",
    "split_text",
    "steps_of_epochs",
    "store_search",
    "target_ids",
    "tokenize_pairs",
    "train_tokenizer",
    "training_files",
    "translate",
    "use_languages",
    "write_translations",
]
