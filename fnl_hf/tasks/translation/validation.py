"""What validation adds to the loss: scores of translations, and the patience with which they are watched."""

from collections.abc import Callable

from transformers import EarlyStoppingCallback, PreTrainedModel

Scores = dict[str, float | str]


class ScoredValidation:
    """The part of a trainer that adds scores to the loss of `evaluate`, with `args.predict_with_generate`.

    Args:
        score_validation: makes the scores of a model on the text of `eval_dataset`, the same on every process. Those
            that are text, such as signatures, are returned but not logged.
    """

    def __init__(self, *args, score_validation: Callable[[PreTrainedModel], Scores] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._score_validation = score_validation
        self._scores: Scores | None = None  # of the evaluation that runs; None: it has no scores

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> Scores:
        """As in `Seq2SeqTrainer`, with the scores. Another dataset than the trainer's own has none."""
        scored = self.args.predict_with_generate and self._score_validation is not None and eval_dataset is None
        self._scores = {} if scored else None
        metrics = super().evaluate(eval_dataset, *args, **kwargs) | (self._scores or {})
        self._scores = None
        return metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in `Trainer`. The scores join the loss here, before callbacks and the search for the best see it."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._scores is not None:
            scores = self._score_validation(self.model)
            self._scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            output.metrics.update({name: value for name, value in self._scores.items() if not isinstance(value, str)})
        return output


class Patience(EarlyStoppingCallback):
    """Early stopping that goes on counting in a resumed run, and saves the step that it stops at."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        # A run that was begun without patience has no count, and the Trainer writes only those that it finds
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_save = True
