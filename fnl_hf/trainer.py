"""`Trainer` and `Seq2SeqTrainer` with Frobenius decay, exact under gradient accumulation."""

import math
import warnings

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Seq2SeqTrainer, Trainer

from .config import FNLConfig
from .decay import add_decay_gradients, decay_step, decay_terms, decayed, of_kinds
from .factorization import factorizations
from .measure import gradient_norms, measurements
from .messages import say
from .normalization import ImposeNorms
from .optim import NAG, Lamb
from .saving import own_names
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
        self._gradient_norms: dict[str, tuple[float, float]] = {}  # of the step to be logged
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
        products = self._decayed_products()
        if any(isinstance(callback, ImposeNorms) for callback in self.callback_handler.callbacks):
            products = factorizations(self.model)  # their norms are imposed
        covered = {parameter for product in products for parameter in product.parameters()}
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
        created = super().create_optimizer(*args, **kwargs)
        # Trained again, or with a smaller batch after memory ran out, it comes back in accelerate's wrapper.
        optimizer = created.optimizer if isinstance(created, AcceleratedOptimizer) else created
        if self._decays is not optimizer:
            self._set_up_decay(optimizer)
            self._decays = optimizer
        return created

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
        if products:
            self._refuse_what_decay_cannot_reach(optimizer, products)
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
        say("fnl_hf: what is decayed")
        if self._waits_for_switch:
            say(f"fnl_hf: the model stays dense until factorize_at = {self.args.factorize_at}")

    def _decay_in_words(self) -> str:
        schedule = self.args.frobenius_decay_schedule
        return f"{self.frobenius_coefficient:g}" + ("" if schedule == "constant" else f", {schedule} to 0")

    def _refuse_what_decay_cannot_reach(self, optimizer, products) -> None:
        """Stop where Frobenius decay would be wrong, or not happen at all."""
        covered = {parameter for product in products for parameter in product.parameters() if parameter.requires_grad}
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        name = f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower()
        remedy = "choose another optimizer, or set frobenius_decay to 0"
        if self.is_deepspeed_enabled:
            raise ValueError(
                "Frobenius decay does not work under DeepSpeed, whose engine holds partitions of its own in place of "
                "parameters and gradients: use FSDP 2, or set frobenius_decay to 0"
            )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) < 2:
            raise ValueError(
                "Frobenius decay does not work under FSDP 1, which flattens parameters: set version 2 in fsdp_config, "
                "or frobenius_decay to 0"
            )
        if any(word in name for word in ("schedulefree", "schedule_free", "lomo", "layerwise")):
            raise ValueError(
                f"Frobenius decay is not proven beside {type(optimizer).__name__}, which does not step a parameter "
                f"from its value and its .grad: {remedy}"
            )
        if outside := covered - held:
            raise ValueError(
                f"{type(optimizer).__name__} does not hold {len(outside)} of the {len(covered)} trainable factors, as "
                f"layer-wise and in-backward optimizers do not: {remedy}, or freeze those factors"
            )
        for product in products:
            for parameter in product.parameters():
                if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                    raise ValueError(
                        f"{product.name} has a factor of {parameter.dtype}: a quantized weight is not what the model "
                        "multiplies by; dequantize the model, or freeze both factors"
                    )
        for group in optimizer.param_groups:
            if group.get("weight_decay") and (both := covered.intersection(group["params"])):
                raise ValueError(
                    f"{len(both)} parameters under Frobenius decay are in an optimizer group with weight_decay "
                    f"{group['weight_decay']}; two decays must not hit one parameter: give them a group with 0.0"
                )

    # -- one step ---------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        """As in `Trainer`; coupled decay joins the gradients once they are summed, before they are clipped."""
        loss = super().training_step(*args, **kwargs)
        products = self._decayed_products() if self.accelerator.sync_gradients else []
        if products:
            # Under fp16 the gradients here are still scaled, by a power of two: scaling the decay alike is exact.
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            if self._logs_this_step():
                self._gradient_norms = gradient_norms(products, self._coefficient_now() * scale)
            if self._couples_decay:
                add_decay_gradients(products, self._coefficient_now() * scale)
        return loss

    def _save_checkpoint(self, model, trial):
        """As in `Trainer`, under the model's own names.

        A model loaded from a checkpoint with older names (LayerNorm.gamma, as bert-base-uncased has them) is saved with
        those, and what the Trainer reads back, to resume or as the best model, knows only the model's own: all
        LayerNorms would silently be lost (transformers issue 48805).
        """
        with own_names(self.model):
            super()._save_checkpoint(model, trial)

    # -- what the user sees -----------------------------------------------------------------------------

    def _logs_this_step(self) -> bool:
        """Whether the step that is about to end will be logged."""
        args, step = self.args, self.state.global_step + 1
        if not args.log_factorizations or args.logging_strategy == "no":
            return False
        if args.logging_strategy == "epoch":
            return self.accelerator.gradient_state.end_of_dataloader
        return step % max(1, self.state.logging_steps) == 0 or (step == 1 and args.logging_first_step)

    def log(self, logs, *args, **kwargs):
        """As in `Trainer`; beside the loss the value of the decay, and norms, rank and balance of the products."""
        if "loss" in logs and self.args.log_factorizations and not self._waits_for_switch:
            logs = logs | self._product_logs()
        super().log(logs, *args, **kwargs)

    def _product_logs(self) -> dict[str, float]:
        products = of_kinds(self.model, self.args.frobenius_decay_kinds)
        try:
            measured = measurements(products)
        except torch.linalg.LinAlgError:  # of weights that are not finite; the loss beside this says so
            return {}
        for kind, (of_decay, of_loss) in self._gradient_norms.items():
            measured[kind]["decay_to_loss_gradient"] = of_decay / of_loss if of_loss else math.inf
        self._gradient_norms = {}
        if measured and self.frobenius_coefficient:
            coefficient = self._coefficient_now()
            measured[""]["decay"] = coefficient / 2 * measured[""]["frobenius_norm"] ** 2
        return {
            f"fnl/{kind}/{name}" if kind else f"fnl/{name}": float(f"{value:.6g}")
            for kind, values in measured.items()
            for name, value in values.items()
        }

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, with the number of labels of the whole step, over micro-batches and processes."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._weights_loss and batches and all(torch.is_tensor(_labels(batch)) for batch in batches):
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
        loss = torch.where(labels == 0, torch.nan_to_num(loss, nan=0.0), loss)  # the mean over no labels is 0/0
        loss = loss * labels * parts / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _count_labels(self, inputs) -> torch.Tensor:
        """How many labels the mean of a batch is over; causal models shift theirs by one."""
        labels = _labels(inputs)
        return (labels[..., 1:] if self._loss_shifts_labels else labels).ne(-100).sum()


def _labels(inputs) -> torch.Tensor | None:
    """What a batch is scored by; a question has one label, where its answer starts."""
    return inputs.get("labels", inputs.get("start_positions"))


class FNLTrainer(FNLTrainerMixin, Trainer):
    """`transformers.Trainer` with Frobenius decay; takes `FNLTrainingArguments`."""


class FNLSeq2SeqTrainer(FNLTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Frobenius decay; takes `FNLSeq2SeqTrainingArguments`."""
