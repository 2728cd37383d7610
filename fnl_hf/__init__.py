"""Factorized neural layers for Hugging Face Transformers: spectral initialisation, Frobenius decay, back to dense."""

from . import loading
from .config import FNLConfig
from .decay import frobenius_decay_
from .factorization import Factorization, HeadProduct, factorizations
from .overview import Summary, summary
from .patching import factorize, to_dense, verify
from .rules import ImposeNorms, RecordNorms, Rule
from .trainer import FNLSeq2SeqTrainer, FNLTrainer
from .training_arguments import FNLSeq2SeqTrainingArguments, FNLTrainingArguments

__all__ = [
    "FNLConfig",
    "FNLSeq2SeqTrainer",
    "FNLSeq2SeqTrainingArguments",
    "FNLTrainer",
    "FNLTrainingArguments",
    "Factorization",
    "HeadProduct",
    "ImposeNorms",
    "RecordNorms",
    "Rule",
    "Summary",
    "factorizations",
    "factorize",
    "frobenius_decay_",
    "loading",
    "summary",
    "to_dense",
    "verify",
]
