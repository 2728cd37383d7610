"""From logits to answers: the best spans of every question, over all its windows."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .squad import Question
from .windows import Window

_NOTHING_ELSE = 1e30  # odds of "no answer" where a paragraph has no tokens; JSON knows no infinity


@dataclass
class Predictions:
    """What a model answers.

    Attributes:
        answers: question id -> text, "" for none.
        nbest: question id -> the best answers, most probable first; each with its text, probability (among these) and
            the logits of its first and last token.
        null_odds: question id -> score of "no answer" less that of the best answer; in v2 only.
    """

    answers: dict[str, str] = field(default_factory=dict)
    nbest: dict[str, list[dict]] = field(default_factory=dict)
    null_odds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Span:
    """An answer by its first and last character (exclusive), scored by the sum of its two logits."""

    begin: int
    end: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


def best_spans(
    window: Window, start_logits: np.ndarray, end_logits: np.ndarray, n_best: int, max_answer_length: int
) -> list[Span]:
    """The `n_best` spans of a window with the highest scores, among all of at most `max_answer_length` tokens.

    Args:
        start_logits, end_logits: (length,) of the whole input; padding behind it does not matter.
    """
    tokens = len(window.offsets)
    if not tokens:
        return []
    starts, ends = (logits[window.begin : window.begin + tokens].astype(float) for logits in (start_logits, end_logits))
    longest = min(max_answer_length, tokens)
    beyond = np.full(longest - 1, -np.inf)
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(np.append(ends, beyond), longest)
    scores = scores.ravel()  # (tokens * longest): all first tokens with all lengths
    kept = np.argpartition(-scores, n_best - 1)[:n_best] if n_best < len(scores) else np.arange(len(scores))
    spans = []
    for index in kept[np.isfinite(scores[kept])]:
        first, more = divmod(int(index), longest)
        begin, end = int(window.offsets[first, 0]), int(window.offsets[first + more, 1])
        if begin < end:
            spans.append(Span(begin, end, float(starts[first]), float(ends[first + more])))
    return spans


def predict_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best: int = 20,
    max_answer_length: int = 30,
    version_2: bool = False,
    null_threshold: float = 0.0,
) -> Predictions:
    """The answers of a model, from its logits for every window.

    The score of "no answer" is the lowest of any window's null token, as in BERT: a window where the answer is not must
    not outvote the one where it is.

    Args:
        windows: in the order of the questions.
        start_logits, end_logits: (windows, length).
        n_best: how many answers of each question are kept.
        max_answer_length: tokens of the longest answer.
        version_2: whether there may be no answer.
        null_threshold: answer "" if the score of that is higher than the best answer's by more than this.
    """
    predictions = Predictions()
    rows = itertools.groupby(range(len(windows)), key=lambda row: windows[row].question)
    for index, group in rows:
        question, spans, nulls = questions[index], {}, []
        for row in group:
            window, starts, ends = windows[row], start_logits[row], end_logits[row]
            nulls.append(Span(0, 0, float(starts[window.null]), float(ends[window.null])))
            for span in best_spans(window, starts, ends, n_best, max_answer_length):
                if not _text(question, span):  # byte-level tokens may be blanks
                    continue
                place = span.begin, span.end  # windows overlap: the same words may come twice
                if place not in spans or spans[place].score < span.score:
                    spans[place] = span
        ranked = sorted(spans.values(), key=lambda span: (-span.score, span.begin, span.end))[:n_best]
        answer = _text(question, ranked[0]) if ranked else ""
        if version_2:
            null = min(nulls, key=lambda span: span.score)
            odds = null.score - ranked[0].score if ranked else _NOTHING_ELSE
            predictions.null_odds[question.id] = odds
            answer = "" if odds > null_threshold else answer
            ranked = sorted([*ranked, null], key=lambda span: -span.score)
        predictions.answers[question.id] = answer
        predictions.nbest[question.id] = _with_probabilities(question, ranked)
    return predictions


def _text(question: Question, span: Span) -> str:
    return question.context[span.begin : span.end].strip()


def _with_probabilities(question: Question, spans: list[Span]) -> list[dict]:
    weights = np.exp([span.score - spans[0].score for span in spans])
    return [
        {
            "text": _text(question, span),
            "probability": float(weight / weights.sum()),
            "start_logit": span.start_logit,
            "end_logit": span.end_logit,
        }
        for span, weight in zip(spans, weights, strict=True)
    ]
