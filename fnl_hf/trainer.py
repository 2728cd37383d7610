"""`Trainer` and `Seq2SeqTrainer` with Frobenius decay, exact under gradient accumulation."""

import warnings

import torch
from transformers import Seq2SeqTrainer, Trainer

from .config import FNLConfig
from .decay import add_decay_gradients, decay_step, decay_terms, decayed
from .factorization import factorizations
from .messages import say
from .optim import NAG, Lamb
from .training_arguments import SCHEDULES, FNLArguments
from .warm_start import WarmStartMixin


class FNLTrainerMixin(WarmStartMixin):
    """Adds Frobenius decay to a `Trainer`, and makes a step's loss the mean over all its labels.

    What is decayed is decided by the identity of parameters: those of a factorization under Frobenius decay get no
    weight decay, all others keep theirs.

    Args:
        fnl_config: What ``factorize_at`` makes of the dense model; see `fnl_hf.warm_start`.
    """

    def __init__(self, *args, fnl_config: FNLConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, FNLArguments):
            raise TypeError(
                f"{type(self).__name__} got {type(self.args).__name__} as args, expected FNLTrainingArguments or "
                "FNLSeq2SeqTrainingArguments"
            )
        # Many models accept **kwargs but ignore num_items_in_batch and return a mean, and the stock Trainer then takes
        # the sum over micro-batches for their mean: N times the gradient, against an unchanged decay. So models are
        # always asked for their mean, and compute_loss weights it by the number of labels behind it.
        self._weights_loss = self.compute_loss_func is None and self.args.n_gpu <= 1
        if self._weights_loss:
            self.model_accepts_loss_kwargs = False
        self._decays = None  # the optimizer that decay is set up for
        self._set_up_warm_start(fnl_config)

    # -- decay ------------------------------------------------------------------------------------------

    @property
    def frobenius_coefficient(self) -> float:
        """λ of the Frobenius decay: ``frobenius_decay``, or ``weight_decay`` where that is not given."""
        return self.args.weight_decay if self.args.frobenius_decay is None else self.args.frobenius_decay

    def _coefficient_now(self) -> float:
        """λ at this step of the run, by the schedule."""
        done = min(1.0, self.state.global_step / max(1, self.state.max_steps))
        return self.frobenius_coefficient * SCHEDULES[self.args.frobenius_decay_schedule](done)

    def _decayed_products(self):
        if not self.frobenius_coefficient or self._waits_for_switch:
            return []
        return decayed(self.model, self.args.frobenius_decay_kinds)

    def get_decay_parameter_names(self, model):
        """Names of the parameters under weight decay: as in `Trainer`, less those under Frobenius decay."""
        covered = {parameter for product in self._decayed_products() for parameter in product.parameters()}
        under_frobenius = {name for name, parameter in model.named_parameters() if parameter in covered}
        return [name for name in super().get_decay_parameter_names(model) if name not in under_frobenius]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As in `Trainer`, and LAMB and NAG for ``fnl_optim``."""
        if args.fnl_optim == "lamb":
            return Lamb, {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
            }
        if args.fnl_optim == "nag":
            pairs = (pair.split("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
            return NAG, {"lr": args.learning_rate, **{name: float(value) for name, value in pairs}}
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args, **kwargs):
        """As in `Trainer`; sets Frobenius decay up and says once what is decayed how."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._decays is not optimizer:
            self._set_up_decay(optimizer)
            self._decays = optimizer
        return optimizer

    def _set_up_decay(self, optimizer) -> None:
        products = self._decayed_products()
        if self.args.frobenius_decay and not products and not self._waits_for_switch:
            raise ValueError(
                f"frobenius_decay is {self.args.frobenius_decay}, but the model has no factorization that trains; "
                "call fnl_hf.factorize(model) before making the trainer"
            )
        if not products and self.args.frobenius_decay is None and factorizations(self.model):
            warnings.warn(
                "the model is factorized but nothing decays it; set frobenius_decay (or weight_decay)", stacklevel=2
            )
        covered = {parameter for product in products for parameter in product.parameters() if parameter.requires_grad}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and (both := covered.intersection(group["params"])):
                raise ValueError(
                    f"{len(both)} parameters under Frobenius decay are in an optimizer group with weight_decay "
                    f"{group['weight_decay']}; two decays must not hit one parameter: give them a group with 0.0"
                )
        mode = self.args.frobenius_decay_mode
        if mode == "auto":
            mode = "coupled" if isinstance(optimizer, (torch.optim.SGD, NAG)) else "decoupled"
        self._couples_decay = mode == "coupled"
        if products and mode == "decoupled" and isinstance(optimizer, Lamb):
            optimizer.frobenius = lambda: decay_terms(self._decayed_products(), self._coefficient_now())
        elif products and mode == "decoupled":
            optimizer.register_step_pre_hook(
                lambda optimizer, *_: decay_step(self._decayed_products(), optimizer, self._coefficient_now())
            )
        l2 = sum(len(group["params"]) for group in optimizer.param_groups if group.get("weight_decay"))
        total = sum(len(group["params"]) for group in optimizer.param_groups)
        frobenius = f" ({mode}, {self.frobenius_coefficient:g}, {len(products)} products)" if products else ""
        say(
            f"fnl_hf: {l2} tensors under L2 decay ({self.args.weight_decay:g}), "
            f"{len(covered)} under Frobenius decay{frobenius}, {total - l2 - len(covered)} under none"
        )

    # -- one step ---------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        """As in `Trainer`; coupled decay joins the gradients once they are summed, before they are clipped."""
        loss = super().training_step(*args, **kwargs)
        if self._couples_decay and self.accelerator.sync_gradients and self.frobenius_coefficient:
            # Under fp16 the gradients here are still scaled, by a power of two: scaling the decay alike is exact.
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            add_decay_gradients(self._decayed_products(), self._coefficient_now() * scale)
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, with the number of labels of the whole step, over micro-batches and processes."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._weights_loss and batches and all(torch.is_tensor(batch.get("labels")) for batch in batches):
            count = sum(self._count_labels(batch) for batch in batches).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`; in training the mean of a micro-batch enters with the share of labels that is behind it."""
        if not self._weights_loss or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        labels = self._count_labels(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # DDP averages over processes and the Trainer over micro-batches what should be summed.
        parts = self.current_gradient_accumulation_steps
        if self.args.average_tokens_across_devices:
            parts = parts * self.accelerator.num_processes
        loss = torch.nan_to_num(loss, nan=0.0) if labels == 0 else loss  # the mean over no labels is 0/0
        loss = loss * labels * parts / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _count_labels(self, inputs) -> torch.Tensor:
        """How many labels the mean of a batch is over; causal models shift theirs by one."""
        labels = inputs["labels"]
        return (labels[..., 1:] if self._loss_shifts_labels else labels).ne(-100).sum()


class FNLTrainer(FNLTrainerMixin, Trainer):
    """`transformers.Trainer` with Frobenius decay; takes `FNLTrainingArguments`."""


class FNLSeq2SeqTrainer(FNLTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Frobenius decay; takes `FNLSeq2SeqTrainingArguments`."""
