"""Masked-LM pretraining: text, tokenizers, packed blocks, masks and presets of models, for `scripts/`."""

from .arguments import (
    MAY_CHANGE,
    DataArguments,
    MLMArguments,
    ModelArguments,
    check_phases,
    data_seed,
    parse_arguments,
    sequence_lengths,
)
from .demonstration import SENTENCES, shipped_file
from .masking import FixedMasks, Masking
from .model import new_model
from .packing import Blocks, Run, held_out
from .preparation import TokenStore, fingerprint, prepare_store, prepare_tokenizer, prepared_text, tokenizer_digest
from .text import corpus_files, read_corpus
from .tokenizer import check_tokenizer, train_tokenizer
from .training import MLMTrainer, predict_masked

__all__ = [
    "MAY_CHANGE",
    "SENTENCES",
    "Blocks",
    "DataArguments",
    "FixedMasks",
    "MLMArguments",
    "MLMTrainer",
    "Masking",
    "ModelArguments",
    "Run",
    "TokenStore",
    "check_phases",
    "check_tokenizer",
    "corpus_files",
    "data_seed",
    "fingerprint",
    "held_out",
    "new_model",
    "parse_arguments",
    "predict_masked",
    "prepare_store",
    "prepare_tokenizer",
    "prepared_text",
    "read_corpus",
    "sequence_lengths",
    "shipped_file",
    "tokenizer_digest",
    "train_tokenizer",
]
