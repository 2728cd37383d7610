"""Scoring translations: BLEU and chrF with their signatures, several references, metrics of `evaluate`."""

import numbers
from collections.abc import Sequence
from pathlib import Path

import evaluate
import sacrebleu

from ..running import InputError, one_line, one_line_errors, read_lines, write_text
from .arguments import DataArguments
from .corpus import Pair
from .languages import two_letters

References = list[list[str | None]]  # a list for each reference, a sentence of which may lack it


def read_references(data_args: DataArguments, pairs: list[Pair]) -> References:
    """The references of the test set `pairs`: their targets, and the lines of the further files of --test_target.

    Raises:
        InputError: a file has another number of lines than the sources.
    """
    references = [[target for _, target in pairs]]
    if not data_args.test_references:
        return references
    paths = [data_args.test_source, data_args.test_target, *data_args.test_references]
    files = [read_lines(path) for path in paths]
    for path, lines in zip(paths, files, strict=True):
        if len(lines) != len(files[0]):
            raise InputError(
                f"{paths[0]} has {len(files[0])} lines and {path} has {len(lines)}: line i of a reference must "
                "translate line i of the sources. Give files of equal length."
            )
    rows = zip(*files, strict=True)
    # Pairs are the lines in their order, less those that were left out, or came after --max_eval_samples
    further = [next(lines for source, target, *lines in rows if (source, target) == pair) for pair in pairs]
    return references + [[line or None for line in lines] for lines in zip(*further, strict=True)]


def bleu_for(target_lang: str) -> sacrebleu.BLEU:
    """BLEU with sacreBLEU's tokens for a language. Raises `InputError` where these need a package that is missing."""
    with one_line_errors(RuntimeError):
        return sacrebleu.BLEU(trg_lang=two_letters(target_lang))


def sacrebleu_scores(
    translations: Sequence[str], references: References, target_lang: str = ""
) -> dict[str, float | str]:
    """BLEU and chrF (0 to 100) of detokenized text over the corpus, each with sacreBLEU's signature."""
    scores = {}
    for name, metric in (("bleu", bleu_for(target_lang)), ("chrf", sacrebleu.CHRF())):
        scores[name] = metric.corpus_score(list(translations), references).score
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def write_translations(path: Path, sources: Sequence[str], references: References, translations: Sequence[str]) -> None:
    """Write a table of tab-separated values with a header: source, reference(s), translation.

    Tabs and line breaks within a text, as JSON lines may have them, become blanks.
    """
    several = len(references) > 1
    names = [f"reference_{i + 1}" for i in range(len(references))] if several else ["reference"]
    rows = [("source", *names, "translation"), *zip(sources, *references, translations, strict=True)]
    cells = ((" ".join((cell or "").replace("\t", " ").splitlines()) for cell in row) for row in rows)
    write_text(path, "".join("\t".join(row) + "\n" for row in cells))


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
    metric: evaluate.EvaluationModule, translations: Sequence[str], references: References
) -> dict[str, float]:
    """The numbers among what `metric` computes, by name: of one reference each where there is one, else of lists.

    Raises:
        InputError: it cannot score translations.
    """
    given = references[0]
    if len(references) > 1:
        given = [[text for text in texts if text is not None] for texts in zip(*references, strict=True)]
    try:
        scores = metric.compute(predictions=list(translations), references=given)
    except Exception as error:  # any code, and made for any task
        count = "one reference" if len(references) == 1 else f"{len(references)} references"
        raise InputError(
            f"--metric {metric.name} cannot score translations against {count} each ({one_line(error)}). Give "
            "another; the other scores are saved."
        ) from error
    return {f"{metric.name}_{name}": float(value) for name, value in scores.items() if isinstance(value, numbers.Real)}
