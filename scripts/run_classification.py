"""Fine-tune a checkpoint to classify texts or pairs of texts, from tab-separated tables, with scikit-learn's metrics.

Any table whose first line names its columns (.gz, .xz too), and any encoder with its tokenizer: a masked language model
of run_mlm.py, factorized or dense, or one of the hub on disk. The columns of GLUE's tasks are known by their names;
labels are words or whole numbers. The same command resumes a run that was stopped.

    # one text: SST-2 has the columns sentence and label
    python scripts/run_classification.py --model_name_or_path runs/mlm --train_file SST-2/train.tsv \\
        --validation_file SST-2/dev.tsv --output_dir runs/sst2

    # pairs: RTE has the columns index, sentence1, sentence2 and label
    python scripts/run_classification.py --model_name_or_path runs/mlm --train_file RTE/train.tsv \\
        --validation_file RTE/dev.tsv --max_seq_length 256 --output_dir runs/rte

    # columns of other names; a table to predict needs no labels
    python scripts/run_classification.py --model_name_or_path runs/mlm --train_file reviews.tsv --text_column review \\
        --label_column stars --test_file new.tsv --output_dir runs/reviews

A dense checkpoint, factorized for its fine-tuning: heads of half their rank, and the decay of the products. A
factorized checkpoint stays as it is, and needs no such arguments.

    python scripts/run_classification.py --model_name_or_path path/to/bert --factorize --head_rank 0.5 \\
        --frobenius_decay 0.01 --train_file SST-2/train.tsv --validation_file SST-2/dev.tsv --output_dir runs/half

Evaluate what is fine-tuned already:

    python scripts/run_classification.py --model_name_or_path runs/sst2 --validation_file other.tsv \\
        --output_dir runs/other

--output_dir receives the model, predictions.tsv of the validation rows (index, prediction and its probability), with
--test_file also test_predictions.tsv, and all_results.json with eval_accuracy, eval_f1_macro and eval_matthews, and for
two classes eval_f1, that of the second one.
"""

import time
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

import fnl_hf
from fnl_hf.tasks.finetuning import (
    FineTuner,
    Table,
    TableArguments,
    check_metrics,
    classification_scores,
    label_ids,
    label_names,
    load_model,
    load_tokenizer,
    padding,
    parse_table_arguments,
    read_table,
    set_max_steps,
)
from fnl_hf.tasks.running import (
    InputError,
    announce,
    check_decay,
    check_fit,
    check_same_model,
    last_complete_checkpoint,
    load,
    load_finished,
    make_config,
    one_line_errors,
    report,
    resources_used,
    run_main,
    say,
    train,
    write_text,
)


def read_tables(data_args: TableArguments) -> dict[str, Table]:
    """The tables that were given, by split."""
    columns = (data_args.text_column, data_args.text_pair_column, data_args.label_column)
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples, "test": None}
    tables = {
        split: read_table(path, *columns, labelled=split != "test").first(limit)
        for split, limit in limits.items()
        if (path := getattr(data_args, f"{split}_file"))
    }
    widths = {len(table.texts[0]): table.path for table in tables.values()}
    if len(widths) > 1:
        raise InputError(f"{widths[1]} has single texts, and {widths[2]} has pairs. Name the columns that are meant.")
    return tables


def class_names(tables: dict[str, Table], config: PreTrainedConfig) -> list[str]:
    """The classes in the order of their ids: those of a checkpoint that knows the same ones, else the table's."""
    known = [config.id2label[i] for i in range(config.num_labels)]
    if "train" in tables:
        names = label_names(tables["train"].labels, tables["train"].path)
        return known if sorted(known) == sorted(names) else names
    if known == [f"LABEL_{i}" for i in range(len(known))]:  # nobody has named them: the table has numbers
        return [str(i) for i in range(len(known))]
    return known


def encode(
    table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, names: list[str] | None = None
) -> Dataset:
    """Token ids in the columns `input_ids` and, if the tokenizer makes them, `token_type_ids`.

    Args:
        names: classes; with them there is a column `labels`.
    """
    encoded = tokenizer(*map(list, zip(*table.texts, strict=True)), truncation=True, max_length=max_length)
    columns = {name: ids for name, ids in encoded.items() if name != "attention_mask"}  # the collator makes it
    return Dataset.from_dict(columns if names is None else columns | {"labels": label_ids(table, names)})


def scores(output: EvalPrediction) -> dict[str, float]:
    """The Trainer's `compute_metrics`."""
    logits = logits_of(output.predictions)
    return classification_scores(output.label_ids, logits.argmax(-1), logits.shape[-1])


def logits_of(predictions: np.ndarray | tuple) -> np.ndarray:
    """(rows, classes); some models return more than these."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def write_predictions(path: Path, logits: np.ndarray, names: list[str]) -> None:
    """A line for every row: its index from 0, the class, and the probability of that class."""
    best = logits.argmax(-1)
    probabilities = 1.0 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    lines = [f"{i}\t{names[name]}\t{p:.6f}" for i, (name, p) in enumerate(zip(best, probabilities, strict=True))]
    write_text(path, "\n".join(["index\tprediction\tprobability", *lines]) + "\n")


def main() -> None:
    started = time.monotonic()
    model_args, data_args, args = parse_table_arguments(__doc__)
    output_dir = Path(args.output_dir)

    # Whatever may be wrong with the input is found before anything is trained or written
    check_metrics()
    tables = read_tables(data_args)
    training = "train" in tables
    checkpoint = last_complete_checkpoint(output_dir) if training else None
    config = make_config(model_args)
    tokenizer = load_tokenizer(model_args)
    names = class_names(tables, load(AutoConfig, model_args.model_name_or_path))
    rows = {
        split: encode(table, tokenizer, data_args.max_seq_length, names if split != "test" else None)
        for split, table in tables.items()
    }

    set_seed(args.seed)
    model = load_model(
        AutoModelForSequenceClassification,
        model_args,
        tokenizer,
        factorization=None if args.factorize_at else config,
        needs_head=not training,
        num_labels=len(names),
        problem_type="single_label_classification",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    check_fit(model, tokenizer, data_args.max_seq_length, "--max_seq_length")
    check_decay(args, model)
    if training:
        set_max_steps(args, len(rows["train"]))
    finished = announce(checkpoint, args.max_steps)
    if checkpoint is not None:
        check_same_model(model.config, checkpoint, bool(args.factorize_at))
    if finished:
        model = load_finished(AutoModelForSequenceClassification, checkpoint, args)
    say(
        f"{model.num_parameters():,} parameters, {len(fnl_hf.factorizations(model))} factorizations; "
        f"{len(names)} classes ({', '.join(names[:6])}{', …' * (len(names) > 6)}); "
        + ", ".join(f"{len(table.texts):,} rows of {split}" for split, table in tables.items())
    )

    with one_line_errors(ValueError):
        trainer = FineTuner(
            model=model,
            args=args,
            train_dataset=rows.get("train"),
            eval_dataset=rows.get("validation"),
            data_collator=padding(tokenizer, data_args.max_seq_length, data_args.pad_to_max_length),
            processing_class=tokenizer,
            compute_metrics=scores,
            fnl_config=config if args.factorize_at else None,
        )
    if training and not finished:
        report(trainer, "train", train(trainer, checkpoint) | {"train_rows": len(rows["train"])})
    if training:
        trainer.save_model()
    for split, prefix, name in (("validation", "eval", "predictions"), ("test", "test", "test_predictions")):
        if split in rows:
            output = trainer.predict(rows[split], metric_key_prefix=prefix)
            report(trainer, prefix, output.metrics | {f"{prefix}_rows": len(rows[split])})
            if trainer.is_world_process_zero():
                write_predictions(output_dir / f"{name}.tsv", logits_of(output.predictions), names)
    report(trainer, "run", resources_used(started))


if __name__ == "__main__":
    run_main(main)
