"""Exact match and F1 of answers, by the definitions of the official SQuAD scripts (Rajpurkar et al. 2016 and 2018).

Both compare normalized answers: lower case, without ASCII punctuation, without the words a, an and the, and with
single blanks. Exact match asks whether they are the same, F1 how many of their words they share. A prediction scores
the best of its comparisons with the gold answers. The two versions differ in what has no words:

- v1.1: no words in common is an F1 of 0, even where both have none ("the" against "The" is an exact match of F1 0).
  A question without prediction scores 0.
- v2: two answers without words agree, F1 1. Gold answers without words do not count, and where none is left, the gold
  answer is "". Every question needs a prediction.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from .squad import Question

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize(answer: str) -> str:
    """What counts of an answer. Punctuation goes before articles do, so that "a." is nothing and "a-b" the word ab."""
    return " ".join(_ARTICLE.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1.0 if the two are the same once normalized, else 0.0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str, version_2: bool = False) -> float:
    """Harmonic mean of the shares of words, repeated ones included, that prediction and gold answer have in common."""
    predicted, expected = normalize(prediction).split(), normalize(gold).split()
    if version_2 and not (predicted and expected):
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def question_scores(prediction: str, golds: Sequence[str], version_2: bool = False) -> tuple[float, float]:
    """Exact match and F1 of one prediction, each the maximum over the gold answers.

    Raises:
        ValueError: v1.1 without gold answers, which it does not define.
    """
    if version_2:
        golds = [gold for gold in golds if normalize(gold)] or [""]
    elif not golds:
        raise ValueError("SQuAD v1.1 scores a question by its gold answers, and there are none")
    return (
        max(exact_match(prediction, gold) for gold in golds),
        max(f1(prediction, gold, version_2) for gold in golds),
    )


def squad_scores(
    questions: Sequence[Question], predictions: Mapping[str, str], version_2: bool = False
) -> dict[str, float]:
    """The numbers of the official script for a file of predictions (id -> answer, "" for none).

    Returns:
        exact_match and f1 in percent, and total, the number of questions. In v2 also those of the questions with and
        without an answer (HasAns_*, NoAns_*), where there are any.

    Raises:
        KeyError: v2 without a prediction for one of the questions (the official script breaks off there too).
    """
    scores = {
        question.id: question_scores(predictions[question.id], question.answers, version_2)
        if version_2 or question.id in predictions
        else (0.0, 0.0)
        for question in questions
    }
    results = _means(list(scores.values()))
    if version_2:
        for name, answerable in (("HasAns", True), ("NoAns", False)):
            part = [scores[question.id] for question in questions if bool(question.answers) == answerable]
            if part:
                results |= {f"{name}_{key}": value for key, value in _means(part).items()}
    return results


def _means(scores: list[tuple[float, float]]) -> dict[str, float]:
    exact, overlap = zip(*scores, strict=True)
    return {
        "exact_match": 100.0 * sum(exact) / len(scores),
        "f1": 100.0 * sum(overlap) / len(scores),
        "total": len(scores),
    }
