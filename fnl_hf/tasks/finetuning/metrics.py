"""Metrics of classification, from scikit-learn."""

from collections.abc import Sequence

from ..running import InputError

METRICS = ("f1", "accuracy", "f1_macro", "matthews")  # the first of two classes only


def check_metrics() -> None:
    """Raises `InputError` if scikit-learn is not installed."""
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise InputError("metrics need scikit-learn. Install it: pip install 'fnl-hf[tasks]'.") from error


def classification_scores(labels: Sequence[int], predictions: Sequence[int], classes: int) -> dict[str, float]:
    """Metrics of predicted class ids, each at most 1.

    Returns:
        accuracy; f1_macro, the mean over all classes; matthews, the correlation; and for two classes f1, that of
        class 1.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    scores = {
        "accuracy": accuracy_score(labels, predictions),
        "f1_macro": f1_score(labels, predictions, labels=range(classes), average="macro", zero_division=0),
        "matthews": matthews_corrcoef(labels, predictions),
    }
    if classes == 2:
        scores["f1"] = f1_score(labels, predictions, pos_label=1, zero_division=0)
    return {name: float(score) for name, score in scores.items()}
