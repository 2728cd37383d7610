"""From questions to model inputs: a long paragraph becomes several windows that overlap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from ..running import InputError
from .squad import Question

_BATCH = 1000  # questions that are tokenized at once


@dataclass(frozen=True, slots=True)
class Window:
    """Where a piece of a paragraph stands in its input.

    Attributes:
        question: index of its question.
        null: position of the token that stands for "no answer here": [CLS], or else the first.
        begin: position of the piece's first token.
        offsets: (tokens, 2) characters of the paragraph that each token of the piece covers.
    """

    question: int
    null: int
    begin: int
    offsets: np.ndarray

    def label(self, start: int | None, text: str) -> tuple[int, int]:
        """Positions of the first and last token of the answer `text` at character `start`.

        Both are `null` if the answer is not whole in this piece, or if there is none.
        """
        if start is None or not len(self.offsets):
            return self.null, self.null
        begin, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())  # characters
        first = int(np.searchsorted(self.offsets[:, 1], begin, side="right"))
        last = int(np.searchsorted(self.offsets[:, 0], end, side="left")) - 1
        whole = self.offsets[0, 0] <= begin and end <= self.offsets[-1, 1]
        return (self.begin + first, self.begin + last) if whole and first <= last else (self.null, self.null)


def encode_questions(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 384,
    stride: int = 128,
    max_question_length: int = 64,
    keep_windows: bool = True,
) -> tuple[Dataset, list[Window]]:
    """Token ids of `question, paragraph` in windows of at most `max_length` tokens, and where answers are in them.

    A window in which the answer is not whole is labelled with its null position, as in BERT.

    Args:
        stride: tokens that two windows of a paragraph share.
        max_question_length: tokens of a question; longer ones are cut.
        keep_windows: False returns no windows, to save memory: training does not need them.

    Returns:
        dataset: columns `input_ids`, `token_type_ids` if the tokenizer makes them, `start_positions` and
            `end_positions`; a row for every window, in the order of the questions.
        windows: the same rows.

    Raises:
        InputError: the tokenizer does not know where its tokens come from; no room for a stride beside a question.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets. Give a checkpoint with tokenizer.json."
        )
    room = max_length - max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < room:
        raise InputError(
            f"--doc_stride {stride}: --max_seq_length {max_length} leaves {max(0, room)} tokens of a paragraph beside "
            f"the longest question (--max_question_length {max_question_length}), and windows must share fewer. "
            "Lower --doc_stride or --max_question_length, or raise --max_seq_length."
        )
    names = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
    columns = Features(
        {name: ListOf(Value("int32")) for name in names}
        | {name: Value("int64") for name in ("start_positions", "end_positions")}
    )
    parts, kept = [], []
    for first in range(0, len(questions), _BATCH):
        batch = questions[first : first + _BATCH]
        encoded = tokenizer(
            _shortened([question.question.strip() for question in batch], tokenizer, max_question_length),
            [question.context for question in batch],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = [
            _window(encoded, row, first + index, tokenizer)
            for row, index in enumerate(encoded["overflow_to_sample_mapping"])
        ]
        labels = [window.label(questions[window.question].start, questions[window.question].text) for window in windows]
        starts, ends = zip(*labels, strict=True)
        rows = {name: encoded[name] for name in names} | {"start_positions": starts, "end_positions": ends}
        parts.append(Dataset.from_dict(rows, features=columns))
        kept += windows if keep_windows else []
    return concatenate_datasets(parts), kept


def _shortened(texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[str]:
    """Each text cut to at most `limit` tokens. (The tokenizer itself cannot shorten both sides of a pair.)"""

    def offsets(text):
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]

    short = []
    for text, spans in zip(texts, offsets(texts), strict=True):
        while len(spans) > limit:  # what is cut may be tokenized in another way, hence again
            text = text[: min(spans[limit - 1][1], len(text) - 1)]
            spans = offsets(text)
        short.append(text)
    return short


def _window(encoded, row: int, question: int, tokenizer: PreTrainedTokenizerBase) -> Window:
    sides = encoded.sequence_ids(row)  # 0: the question's tokens, 1: the paragraph's, None: special ones
    length = sides.count(1)
    begin = sides.index(1) if length else len(sides)
    ids = encoded["input_ids"][row]
    null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
    offsets = np.array(encoded["offset_mapping"][row][begin : begin + length], np.int32).reshape(length, 2)
    return Window(question, null, begin, offsets)
