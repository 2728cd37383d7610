"""Fine-tuning: question answering on the SQuAD layout and classification of tables, for `scripts/`."""

from .answers import Predictions, predict_answers
from .arguments import (
    QA_MAY_CHANGE,
    TABLE_MAY_CHANGE,
    FineTuningArguments,
    ModelArguments,
    QAArguments,
    TableArguments,
    parse_qa_arguments,
    parse_table_arguments,
)
from .metrics import METRICS, check_metrics, classification_scores
from .model import load_model, load_tokenizer
from .scoring import squad_scores
from .squad import Question, SquadFile, read_predictions, read_squad, training_questions, validation_questions
from .tables import Table, class_names, encode_table, label_ids, label_names, read_table, read_tables
from .training import FineTuner, padding, set_max_steps
from .windows import Window, encode_questions

__all__ = [
    "METRICS",
    "QA_MAY_CHANGE",
    "TABLE_MAY_CHANGE",
    "FineTuner",
    "FineTuningArguments",
    "ModelArguments",
    "Predictions",
    "QAArguments",
    "Question",
    "SquadFile",
    "Table",
    "TableArguments",
    "Window",
    "check_metrics",
    "class_names",
    "classification_scores",
    "encode_questions",
    "encode_table",
    "label_ids",
    "label_names",
    "load_model",
    "load_tokenizer",
    "padding",
    "parse_qa_arguments",
    "parse_table_arguments",
    "predict_answers",
    "read_predictions",
    "read_squad",
    "read_table",
    "read_tables",
    "set_max_steps",
    "squad_scores",
    "training_questions",
    "validation_questions",
]
