"""The checkpoint that is fine-tuned, with its tokenizer."""

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fnl_hf import factorizations, factorize

from ..running import InputError, Job, load, one_line_errors
from .arguments import ModelArguments

# What configs call the dropout of sub-layers, of attention, and before the new head
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
)


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, which pads on the right.

    Raises:
        InputError: it cannot be loaded, or does not know a padding token.
    """
    path = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = load(AutoTokenizer, path)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{path}: its tokenizer has no padding token. Give one that has, with --tokenizer_name.")
    tokenizer.padding_side = "right"  # positions of tokens are counted from the left
    return tokenizer


def load_model(job: Job, tokenizer: PreTrainedTokenizerBase, **options) -> PreTrainedModel:
    """The checkpoint as a model of the job's class; weights that it does not hold, those of a new head, are random.

    A factorized checkpoint comes back factorized, a dense one as what the job makes of it. A job that does not train
    needs all weights, the head's too.

    Args:
        options: of the config, such as `num_labels`.

    Raises:
        InputError: the checkpoint cannot be loaded, lacks weights of its body or head, has no dropout to set, is
            factorized already, or cannot be factorized in that way.
    """
    path, dropout = job.model_args.model_name_or_path, job.model_args.dropout
    if dropout is not None:
        options |= _dropout(load(AutoConfig, path), dropout, path)
    # Trained in float32, whatever it was saved in: --bf16 and --fp16 are mixed precision
    options |= {"dtype": torch.float32, "ignore_mismatched_sizes": job.trains}  # a head of other classes is new
    model, info = load(job.auto_class, path, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]})
    if missing and not job.trains:
        raise InputError(f"{path} was not trained for this: it has no {missing[0]}. Fine-tune it: give --train_file.")
    body = f"{model.base_model_prefix}."
    if lost := [name for name in missing if name.startswith(body) and ".pooler." not in name]:
        raise InputError(f"{path}: its weights lack {lost[0]}, or have it in another shape. Give a whole checkpoint.")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # as the Trainer will
    if job.factorization is None:
        return model
    if factorizations(model):
        raise InputError(
            f"{path} is factorized already. Drop --factorize, or make it dense first: fnl-hf to-dense {path} DENSE."
        )
    with one_line_errors(ValueError):
        return factorize(model, job.factorization)


def _dropout(config: PreTrainedConfig, dropout: float, path: str) -> dict[str, float]:
    names = [name for name in _DROPOUTS if hasattr(config, name)]
    if not names:
        raise InputError(f"{path}: its config has no dropout that is known. Drop --dropout.")
    return dict.fromkeys(names, dropout)
