"""`Trainer` and `Seq2SeqTrainer` with a list of rules, Frobenius decay first, and losses exact under accumulation."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .config import FNLConfig
from .distillation import Teacher
from .divergence import check_finite
from .factorization import factorizations
from .layers import hidden_matrices
from .loss import LabelCount, labels_of
from .optim import NAG, Lamb
from .rules import FrobeniusDecay, LogFactorizations, LossSoFar, RankAdaptation, Rule
from .rules.rank_adaptation import is_of_adapting_run
from .saving import own_names
from .spectron import Spectron
from .training_arguments import FNLArguments
from .warm_start import WarmStartMixin


class FNLTrainerMixin(WarmStartMixin):
    """Lets rules act in the steps of a `Trainer`, and makes a step's loss the mean over all its labels.

    Args:
        fnl_config: What ``factorize_at`` makes of the dense model; see `fnl_hf.warm_start`.
        teacher: A model whose outputs are learned, with ``distillation_weight`` and no need of labels; see
            `fnl_hf.distillation`. It is no part of what is trained, saved or wrapped.
    """

    _attached_to = None  # the optimizer that rules are attached to
    _labels: LabelCount | None = None

    def __init__(self, *args, fnl_config: FNLConfig | None = None, teacher: nn.Module | None = None, **kwargs):
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
        self._set_up_teacher(teacher)
        self._set_up_rules()
        self._set_up_warm_start(fnl_config)

    def _set_up_teacher(self, teacher: nn.Module | None) -> None:
        """Raises a ValueError where the teacher is what is trained, or a weight is given without a teacher."""
        self._teacher = None
        if teacher is None:
            if self.args.distillation_weight != 1.0:
                raise ValueError(
                    f"distillation_weight is {self.args.distillation_weight}, but there is no teacher: pass "
                    "FNLTrainer(teacher=a dense model), or drop it"
                )
            return
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"teacher is a {type(teacher).__name__}, expected a model: AutoModelForX.from_pretrained(...)"
            )
        if not set(teacher.parameters()).isdisjoint(self.model.parameters()):
            raise ValueError(
                "the teacher holds parameters of the model that is trained: keep a copy of the dense model, "
                "teacher = copy.deepcopy(model), before factorizing"
            )
        self._teacher = Teacher(teacher, self.args.distillation_temperature, self.compute_loss_context_manager)
        self.can_return_loss = True  # in evaluation, where there are no labels

    # -- rules ------------------------------------------------------------------------------------------

    @property
    def rules(self) -> list[Rule]:
        """What acts in a training step, in this order: the trainer's own, then those among its callbacks."""
        rules = [callback for callback in self.callback_handler.callbacks if isinstance(callback, Rule)]
        for rule in rules:
            if rule.run is not self:  # it has just joined: given, added, or restored from a checkpoint
                rule.bind(self)
                if self._attached_to is not None:
                    rule.attach(self._attached_to)
        return rules

    def _set_up_rules(self) -> None:
        decay = next((rule for rule in self.rules if isinstance(rule, FrobeniusDecay)), None)
        own = [] if decay else [decay := FrobeniusDecay()]
        self._decay, self._losses = decay, LossSoFar()
        # First of all what gives the factors of this step: the others measure and decay these.
        adapting = [RankAdaptation()] if self.args.rank_adaptation is not None else []
        self.callback_handler.callbacks[:0] = [*adapting, LogFactorizations(decay), *own, self._losses]
        _ = self.rules  # binds them

    def add_callback(self, callback):
        """As in `Trainer`; a rule is bound, and attached if there is an optimizer."""
        super().add_callback(callback)
        _ = self.rules

    def train(self, *args, **kwargs):
        """As in `Trainer`; rules prepare the model before anything is made for it."""
        try:
            for rule in self.rules:
                rule.prepare()
            return super().train(*args, **kwargs)
        finally:
            for rule in self.rules:
                rule.leave()

    @property
    def frobenius_coefficient(self) -> float:
        """λ of the Frobenius decay: ``frobenius_decay``, or ``weight_decay`` where that is not given."""
        return self._decay.coefficient

    def get_decay_parameter_names(self, model):
        """Names of the parameters under weight decay: as in `Trainer`, less those that a rule covers."""
        covered = set().union(*(rule.covered() for rule in self.rules))
        by_rules = {name for name, parameter in model.named_parameters() if parameter in covered}
        return [name for name in super().get_decay_parameter_names(model) if name not in by_rules]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As in `Trainer`, and LAMB, NAG and Spectron for ``fnl_optim``.

        Raises:
            ValueError: ``optim_args`` say of an optimizer of ours what it does not take.
        """
        if args.fnl_optim == "lamb":
            return Lamb, {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
            }
        if args.fnl_optim == "nag":
            return NAG, {"lr": args.learning_rate, **_momentum(args)}
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.fnl_optim == "spectron":
            if args.factor_learning_rate is not None:
                options["factor_lr"] = args.factor_learning_rate
            if model is not None:
                options |= {"products": lambda: factorizations(model), "matrices": hidden_matrices(model)}
            return Spectron, options | _momentum(args)
        return kind, options

    def create_optimizer(self, *args, **kwargs):
        """As in `Trainer`; every rule is attached to what is made."""
        created = super().create_optimizer(*args, **kwargs)
        # Trained again, or with a smaller batch after memory ran out, it comes back in accelerate's wrapper.
        optimizer = created.optimizer if isinstance(created, AcceleratedOptimizer) else created
        if self._attached_to is not optimizer:
            for rule in self.rules:
                rule.attach(optimizer)
            self._attached_to = optimizer
        return created

    def training_step(self, *args, **kwargs):
        """As in `Trainer`; rules see the gradients once they are summed, before they are clipped."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            scaler, logged = self.accelerator.scaler, self._logs_this_step()
            scale = 1.0 if scaler is None else scaler.get_scale()
            for rule in self.rules:
                rule.after_backward(scale, logged)
        return loss

    def _logs_this_step(self) -> bool:
        """Whether the step that is about to end will be logged."""
        args, step = self.args, self.state.global_step + 1
        if args.logging_strategy == "no":
            return False
        if args.logging_strategy == "epoch":
            return self.accelerator.gradient_state.end_of_dataloader
        return step % max(1, self.state.logging_steps) == 0 or (step == 1 and args.logging_first_step)

    def log(self, logs, *args, **kwargs):
        """As in `Trainer`; what rules measure joins the loss, and ``train_loss`` is that of all steps, resumed or not.

        Raises:
            FloatingPointError: Training has diverged: the Trainer itself leaves losses that are NaN out of the log.
        """
        if "train_loss" in logs:
            logs["train_loss"] = self._losses.mean()  # in place: these are also the metrics that `train` returns
            for rule in self.rules:
                logs.update(rule.results())
        if "loss" in logs:
            check_finite(self.model, self.state.global_step)
            for rule in self.rules:
                logs = logs | rule.logs()
        super().log(logs, *args, **kwargs)

    # -- the weighting of the loss ----------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, with the number of labels of the whole step, over micro-batches and processes."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._teacher is not None and batches:
            self._learned = self._over_processes(sum(self._teacher.count(batch) for batch in batches).to(device))
        if self._weights_loss and batches and all(torch.is_tensor(labels_of(batch)) for batch in batches):
            if self._labels is None:
                self._labels = LabelCount(self.model, self._smoother_shifts(), self.compute_loss_context_manager)
            if not self._labels.knows(batches[0]):
                self._labels.learn(self._prepare_inputs(batches[0]))
            count = self._over_processes(sum(self._labels.of(batch) for batch in batches).to(device))
        return batches, count

    def _over_processes(self, count: torch.Tensor) -> torch.Tensor:
        """The sum over processes of what is counted on each."""
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            return self.accelerator.gather(count).sum()
        return count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`; in training the mean of a micro-batch enters with the share of labels that is behind it.

        With a teacher ``distillation_weight`` of the loss is the distance from what that makes of the batch.
        """
        if self._teacher is None:
            return self._own_loss(model, inputs, return_outputs, num_items_in_batch)
        weight = self.args.distillation_weight
        if weight < 1 and labels_of(inputs) is None and self.compute_loss_func is None:
            raise ValueError(
                f"distillation_weight is {weight}, which leaves the rest to a loss from labels, and the batch has none "
                f"({', '.join(inputs)}): leave distillation_weight at 1, or add labels"
            )
        if weight < 1:
            own, outputs = self._own_loss(model, dict(inputs), True, num_items_in_batch)
        else:
            own, outputs = 0.0, model(**inputs)
        loss = self._teacher.loss(outputs, inputs)
        if torch.is_grad_enabled() and self.args.n_gpu <= 1:
            loss = loss * self._teacher.count(inputs) * self._parts() / self._learned
        loss = weight * loss + (1 - weight) * own
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; with a teacher there is a loss without labels too."""
        names = self.label_names
        if self._teacher is not None and not any(inputs.get(name) is not None for name in names):
            self.label_names = []
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.label_names = names

    def _parts(self) -> int:
        """How many losses are averaged in a step: DDP averages over processes and the Trainer over micro-batches."""
        sums = self.compute_loss_func is not None  # then the Trainer leaves micro-batches to it
        parts = 1 if sums else self.current_gradient_accumulation_steps
        return parts * self.accelerator.num_processes if self.args.average_tokens_across_devices else parts

    def _own_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """The loss of the model or of the Trainer, from labels."""
        if not self._weights_loss or num_items_in_batch is None or self._labels is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        labels = self._labels.of(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        parts = self._parts()  # averaged, where they should be summed
        loss = torch.where(labels == 0, torch.nan_to_num(loss, nan=0.0), loss)  # the mean over no labels is 0/0
        loss = loss * parts if self._labels.sums else loss * labels * parts / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _smoother_shifts(self) -> bool | None:
        """Whether label smoothing, which `Trainer` computes from logits instead of the model, shifts the labels.

        It goes by the name of the class; None without smoothing.
        """
        if self.label_smoother is None:
            return None
        model = self.accelerator.unwrap_model(self.model_wrapped)
        if type(model).__module__.startswith("peft."):
            model = getattr(model.base_model, "model", model)
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    # -- checkpoints ------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As in `Trainer`; rules prepare the model for the checkpoint.

        Raises:
            ValueError: Ranks have adapted in the run that it is of, and do not in this one; or what rules refuse.
        """
        if self.args.rank_adaptation is None and is_of_adapting_run(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is of a run with rank_adaptation='dlrt', and here it is None: set it, or "
                "load the model by from_pretrained, fix its ranks (fnl_hf.fix_ranks), and train it in a new run"
            )
        for rule in self.rules:
            rule.before_load(resume_from_checkpoint)
        return super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        """As in `Trainer`; rules prepare the model for the checkpoint."""
        for rule in self.rules:
            rule.before_load(self.state.best_model_checkpoint)
        return super()._load_best_model()

    def _finalize_training(self, *args, **kwargs):
        """As in `Trainer`, which divides by the steps of this call; see `log`."""
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _save_checkpoint(self, model, trial):
        """As in `Trainer`, under the model's own names.

        A model loaded from a checkpoint with older names (LayerNorm.gamma, as bert-base-uncased has them) is saved with
        those, and what the Trainer reads back, to resume or as the best model, knows only the model's own: all
        LayerNorms would silently be lost (transformers issue 48805).

        Raises:
            FloatingPointError: Training has diverged: no run is to go on from that.
        """
        check_finite(self.model, self.state.global_step)
        self._losses.before_save()
        with own_names(self.model):
            super()._save_checkpoint(model, trial)


class FNLTrainer(FNLTrainerMixin, Trainer):
    """`transformers.Trainer` with Frobenius decay and other rules; takes `FNLTrainingArguments`."""


class FNLSeq2SeqTrainer(FNLTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with Frobenius decay and other rules; takes `FNLSeq2SeqTrainingArguments`."""


def _momentum(args) -> dict[str, float]:
    """What ``optim_args`` may say of an optimizer of ours: momentum=0.9.

    Raises:
        ValueError: It says something else.
    """
    pairs = [pair.partition("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    try:
        given = {name: float(value) for name, _, value in pairs}
    except ValueError:
        given = {"": 0.0}
    if given.keys() - {"momentum"}:
        raise ValueError(
            f"optim_args is {args.optim_args!r}, but fnl_optim={args.fnl_optim!r} takes momentum=... there and nothing "
            "else: rates, betas and epsilon are arguments of their own"
        )
    return given
