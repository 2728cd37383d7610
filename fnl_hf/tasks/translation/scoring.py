"""Translating with beam search, and scoring the translations."""

import numbers
from collections.abc import Sequence

import evaluate
import sacrebleu
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..running import InputError, longest_input, one_line


@torch.inference_mode()
def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    num_beams: int = 5,
    max_length: int = 128,
    batch_size: int = 64,
    progress: bool = True,
) -> list[str]:
    """Translations of `sentences`, in their order. Inputs are cut to `max_length` tokens, or to what the model takes.

    The sentences are translated in batches of similar length. An output has at most `max_length` tokens, and at most
    twice as many as the longest input of its batch and ten more, so that one translation that does not end cannot
    hold up the others.
    """
    if not sentences:
        return []
    model.eval()
    max_length = min(max_length, longest_input(model.config) or max_length)
    inputs = tokenizer(list(sentences), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]), reverse=True)
    translations = [""] * len(inputs)
    with tqdm(total=len(inputs), desc="Translating", unit="sentence", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]  # longest first: memory is needed at once or never
            batch = tokenizer.pad({"input_ids": [inputs[i] for i in chosen]}, return_tensors="pt").to(model.device)
            longest = batch["input_ids"].shape[1]
            limit = min(max_length, 2 * longest + 10)
            ids = model.generate(**batch, num_beams=num_beams, max_length=limit)  # (sentences, tokens)
            for i, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                translations[i] = text.strip()
            bar.update(len(chosen))
    return translations


def sacrebleu_score(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU (0 to 100) of detokenized text against one reference each, and sacreBLEU's signature."""
    bleu = sacrebleu.BLEU()
    score = bleu.corpus_score(list(translations), [list(references)]).score
    return score, str(bleu.get_signature())


def hub_metric(name_or_path: str) -> evaluate.EvaluationModule:
    """A metric of `evaluate`: a name on the hub, or a local script or directory. Raises `InputError` if it fails."""
    try:
        return evaluate.load(name_or_path)
    except Exception as error:  # a metric runs its own imports: anything can be missing
        raise InputError(
            f"--metric {name_or_path}: cannot be loaded ({one_line(error)}). Give the path of a metric "
            "script, or a name that evaluate can download; without --metric, sacreBLEU needs neither."
        ) from error


def metric_scores(
    metric: evaluate.EvaluationModule, translations: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """The numbers among what `metric` computes, by name. Raises `InputError` if it cannot score translations."""
    try:
        scores = metric.compute(predictions=list(translations), references=list(references))
    except Exception as error:  # any code, and made for any task
        raise InputError(
            f"--metric {metric.name} cannot score translations against one reference each ({one_line(error)}). Give "
            "another; the other scores are saved."
        ) from error
    return {f"{metric.name}_{name}": float(value) for name, value in scores.items() if isinstance(value, numbers.Real)}
