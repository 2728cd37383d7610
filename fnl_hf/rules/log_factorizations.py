"""What training does to the factorizations, in the log beside the loss."""

import math

from ..decay import of_kinds
from ..measure import gradient_norms, measurements
from ..messages import say
from ..spectron import Spectron
from .frobenius_decay import FrobeniusDecay
from .rule import Rule


class LogFactorizations(Rule):
    """Norms, rank and balance of the products, the value of their decay and its gradient's share; changes nothing.

    Every `FNLTrainer` has this rule; ``log_factorizations=False`` keeps it out of the log. At start it says what
    Spectron steps how.

    Args:
        decay: The rule that decays, for its coefficient.
    """

    def __init__(self, decay: FrobeniusDecay):
        self.decay = decay
        self._gradient_norms: dict[str, tuple[float, float]] = {}  # of the step to be logged

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """When rates are settled: those of a checkpoint count."""
        super().on_train_begin(args, state, control, **kwargs)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
        if isinstance(optimizer, Spectron):
            say(optimizer.table())

    def after_backward(self, scale: float, logged: bool) -> None:
        """Both gradients are measured while they are still apart: this rule comes before the one that adds them."""
        if logged and self.run.args.log_factorizations and (products := self.decay.products()):
            self._gradient_norms = gradient_norms(products, self.decay.coefficient_now() * scale)

    def logs(self) -> dict[str, float]:
        """``fnl/<name>`` over all products and ``fnl/<kind>/<name>``; see `fnl_hf.measure.measurements`."""
        if not self.run.args.log_factorizations or self.run.waits_for_switch:
            return {}
        measured = measurements(of_kinds(self.run.model, self.decay.kinds()))
        for kind, (of_decay, of_loss) in self._gradient_norms.items():
            measured[kind]["decay_to_loss_gradient"] = of_decay / of_loss if of_loss else math.inf
        self._gradient_norms = {}
        if measured and self.decay.coefficient:
            measured[""]["decay"] = self.decay.coefficient_now() / 2 * measured[""]["frobenius_norm"] ** 2
        return {
            f"fnl/{kind}/{name}" if kind else f"fnl/{name}": float(f"{value:.6g}")
            for kind, values in measured.items()
            for name, value in values.items()
        }
