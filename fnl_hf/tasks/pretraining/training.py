"""The Trainer of masked language models, and what it predicts."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf import FNLTrainer

from ..running import InputError
from .masking import FixedMasks

Guess = tuple[str, float]  # a token and its probability


class MLMTrainer(FNLTrainer):
    """`FNLTrainer` for a `Run`, with a head that sees masked tokens only and an evaluation by labels.

    The head: 85 % of the tokens have no label, and in a small model their logits cost more than all layers. Where
    `args.head_at_masks` is set, a hook behind the model's encoder leaves only hidden states with a label, (1, labels,
    width), to the head. The loss is the same; BERT's own code gathers alike.

    The evaluation: the loss is the mean over all labels of a `FixedMasks` dataset. The Trainer's is the mean of the
    means of batches, which depends on how blocks fall into batches, and on several processes counts some blocks twice.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._chosen = None  # of the tokens of a batch, those that have a label
        self._evaluated = self.eval_dataset
        # `DataParallel` cuts batches behind the hook's back; a model that is its own encoder has no place for one
        self._at_masks = self.args.head_at_masks and self.args.n_gpu <= 1 and self.model.base_model is not self.model
        if self._at_masks:
            self.model.base_model.register_forward_hook(self._keep_chosen)

    def _keep_chosen(self, encoder, inputs, output):
        if self._chosen is not None:
            output["last_hidden_state"] = output["last_hidden_state"].flatten(0, 1)[self._chosen][None]
        return output

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in `FNLTrainer`, from the logits of masked tokens."""
        if not self._at_masks:
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = inputs["labels"].flatten()
        self._chosen = labels.ne(-100).nonzero().squeeze(1)
        try:
            return super().compute_loss(model, {**inputs, "labels": labels[self._chosen][None]}, *args, **kwargs)
        finally:
            self._chosen = None

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; on several processes a `FixedMasks` dataset is filled up first."""
        self._evaluated = dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, FixedMasks) and self.args.world_size > 1:
            dataset.fill_up(self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(eval_dataset)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; the loss enters by its labels, against those of an average block."""
        loss, *outputs = super().prediction_step(model, inputs, *args, **kwargs)
        dataset = self._evaluated
        if loss is not None and isinstance(dataset, FixedMasks):
            here = inputs["labels"].ne(-100).sum()
            share = here * len(dataset) / (dataset.labels * len(inputs["labels"]))
            loss = torch.where(here == 0, 0.0, loss * share)  # the mean over no labels is 0/0
        return loss, *outputs


@torch.inference_mode()
def predict_masked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, top: int = 5
) -> list[list[Guess]]:
    """For each mask in a sentence the `top` likeliest tokens with their probabilities, likeliest first.

    A mask is written `[MASK]`, or as the tokenizer has it. Special tokens are not among the guesses.

    Raises:
        InputError: the sentence has no mask, or too many tokens for the model.
    """
    text = sentence.replace("[MASK]", tokenizer.mask_token)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    masks = inputs["input_ids"][0] == tokenizer.mask_token_id
    if not masks.any():
        raise InputError(f"{sentence!r}: nothing to predict. Write [MASK] where a token is missing.")
    if len(masks) > tokenizer.model_max_length:
        raise InputError(
            f"{sentence[:60]!r}: {len(masks)} tokens, more than the {tokenizer.model_max_length} of the model."
        )
    model.eval()
    logits = model(**inputs).logits[0, masks]  # (masks, vocabulary)
    logits[:, tokenizer.all_special_ids] = -torch.inf
    likeliest = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    return [
        [(tokenizer.decode([token]).strip(), probability) for token, probability in zip(tokens, row, strict=True)]
        for tokens, row in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
