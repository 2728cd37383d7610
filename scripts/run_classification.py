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

from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForSequenceClassification, EvalPrediction, set_seed

import fnl_hf
from fnl_hf.tasks.finetuning import (
    METRICS,
    TABLE_MAY_CHANGE,
    FineTuner,
    check_metrics,
    class_names,
    classification_scores,
    encode_table,
    load_model,
    load_tokenizer,
    padding,
    parse_table_arguments,
    read_tables,
    set_max_steps,
)
from fnl_hf.tasks.running import Job, check_best_metric, check_fit, load, run_main, say, write_text


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
    model_args, data_args, args = parse_table_arguments(__doc__)

    # Whatever may be wrong with the input is found before anything is trained or written
    check_metrics()
    tables = read_tables(data_args)
    training = "train" in tables
    job = Job(AutoModelForSequenceClassification, model_args, data_args, args, TABLE_MAY_CHANGE, trains=training)
    tokenizer = load_tokenizer(model_args)
    names = class_names(tables, load(AutoConfig, model_args.model_name_or_path))
    check_best_metric(args, METRICS if len(names) == 2 else METRICS[1:])
    rows = {
        split: encode_table(table, tokenizer, data_args.max_seq_length, names if split != "test" else None)
        for split, table in tables.items()
    }
    if training:
        set_max_steps(args, len(rows["train"]))
    job.announce([data_args.train_file] if training else ())

    set_seed(args.seed)
    model = load_model(
        job,
        tokenizer,
        num_labels=len(names),
        problem_type="single_label_classification",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    check_fit(model, tokenizer, data_args.max_seq_length, "--max_seq_length")
    job.check(model)
    model = job.finished_model() or model
    say(
        f"{model.num_parameters():,} parameters, {len(fnl_hf.factorizations(model))} factorizations; "
        f"{len(names)} classes ({', '.join(names[:6])}{', …' * (len(names) > 6)}); "
        + ", ".join(f"{len(table.texts):,} rows of {split}" for split, table in tables.items())
    )

    trainer = job.make_trainer(
        FineTuner,
        model=model,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        data_collator=padding(tokenizer, data_args.max_seq_length, data_args.pad_to_max_length),
        processing_class=tokenizer,
        compute_metrics=scores,
    )
    if metrics := job.train():
        job.report("train", metrics | {"train_rows": len(rows["train"])})
    job.save()
    for split, prefix, name in (("validation", "eval", "predictions"), ("test", "test", "test_predictions")):
        if split in rows:
            output = trainer.predict(rows[split], metric_key_prefix=prefix)
            job.report(prefix, output.metrics | {f"{prefix}_rows": len(rows[split])})
            if trainer.is_world_process_zero():
                write_predictions(job.output_dir / f"{name}.tsv", logits_of(output.predictions), names)
    job.report_resources()


if __name__ == "__main__":
    run_main(main)
