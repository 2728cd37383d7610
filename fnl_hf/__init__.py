"""Factorized neural layers for Hugging Face Transformers: spectral initialisation, Frobenius decay, back to dense."""

from . import loading
from .config import FNLConfig
from .decay import frobenius_decay_
from .factorization import Declares, Factorization, FactorLeaf, factorizations
from .heads import HeadProduct
from .inference import for_inference
from .layers import FactorizedConv1d, FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, PivotedLinear
from .overview import Summary, summary
from .patching import factorize, to_dense, verify
from .plan import Candidate, Plan, Skip, Target, register_family
from .ranks import fix_ranks
from .rules import ImposeNorms, RecordNorms, Rule
from .trainer import FNLSeq2SeqTrainer, FNLTrainer
from .training_arguments import FNLSeq2SeqTrainingArguments, FNLTrainingArguments

__all__ = [
    "Candidate",
    "Declares",
    "FNLConfig",
    "FNLSeq2SeqTrainer",
    "FNLSeq2SeqTrainingArguments",
    "FNLTrainer",
    "FNLTrainingArguments",
    "FactorLeaf",
    "Factorization",
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "HeadProduct",
    "ImposeNorms",
    "PivotedLinear",
    "Plan",
    "RecordNorms",
    "Rule",
    "Skip",
    "Summary",
    "Target",
    "factorizations",
    "factorize",
    "fix_ranks",
    "for_inference",
    "frobenius_decay_",
    "loading",
    "register_family",
    "summary",
    "to_dense",
    "verify",
]
