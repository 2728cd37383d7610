"""Fine-tune a checkpoint for question answering and score it by the official rule of SQuAD (exact match and F1).

Any file in the SQuAD layout, v1.1 or v2 (.gz, .xz too), and any encoder with its tokenizer: a masked language model of
run_mlm.py, factorized or dense, or one of the hub on disk. The same command resumes a run that was stopped.

    python scripts/run_qa.py --model_name_or_path runs/mlm --train_file train-v1.1.json \\
        --validation_file dev-v1.1.json --output_dir runs/squad

    # SQuAD v2: some questions have no answer
    python scripts/run_qa.py --model_name_or_path runs/mlm --train_file train-v2.0.json \\
        --validation_file dev-v2.0.json --version_2_with_negative --num_train_epochs 2 --output_dir runs/squad2

    # a small model: a higher learning rate, and dropout if it was pretrained without (on a GPU also --bf16)
    python scripts/run_qa.py --model_name_or_path runs/mlm --train_file train-v1.1.json.xz \\
        --validation_file dev-v1.1.json.xz --learning_rate 3e-4 --dropout 0.1 --output_dir runs/small

A dense checkpoint, factorized for its fine-tuning: heads of half their rank, and the decay of the products. A
factorized checkpoint stays as it is, and needs no such arguments.

    python scripts/run_qa.py --model_name_or_path path/to/bert --factorize --head_rank 0.5 --frobenius_decay 0.01 \\
        --train_file train-v1.1.json --validation_file dev-v1.1.json --output_dir runs/half

Evaluate what is fine-tuned already, or score a file of predictions (id -> answer) without any model:

    python scripts/run_qa.py --model_name_or_path runs/squad --validation_file other.json --output_dir runs/other
    python scripts/run_qa.py --score runs/squad/predictions.json --validation_file dev-v1.1.json

--output_dir receives the model, predictions.json (as the official script takes it), nbest_predictions.json, with v2
null_odds.json, and all_results.json with eval_exact_match and eval_f1 in percent. Answers that are not at their
answer_start are counted; no model is trained on them.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForQuestionAnswering, EvalPrediction, set_seed

import fnl_hf
from fnl_hf.tasks.finetuning import (
    QA_MAY_CHANGE,
    FineTuner,
    Predictions,
    QAArguments,
    Question,
    Window,
    encode_questions,
    load_model,
    load_tokenizer,
    padding,
    parse_qa_arguments,
    predict_answers,
    read_predictions,
    set_max_steps,
    squad_scores,
    training_questions,
    validation_questions,
)
from fnl_hf.tasks.running import InputError, Job, check_fit, run_main, say, write_json


class Scoring:
    """The Trainer's `compute_metrics`: answers and their scores from logits. Keeps the last answers."""

    def __init__(self, questions: list[Question], windows: list[Window], data_args: QAArguments):
        self.questions, self.windows, self.data_args = questions, windows, data_args
        self.predictions = Predictions()

    def __call__(self, output: EvalPrediction) -> dict[str, float]:
        start_logits, end_logits = output.predictions[:2]
        version_2 = self.data_args.version_2_with_negative
        self.predictions = predict_answers(
            self.questions,
            self.windows,
            start_logits,
            end_logits,
            n_best=self.data_args.n_best_size,
            max_answer_length=self.data_args.max_answer_length,
            version_2=version_2,
            null_threshold=self.data_args.null_score_diff_threshold,
        )
        return squad_scores(self.questions, self.predictions.answers, version_2)


def score_file(data_args: QAArguments) -> None:
    """Print the scores of a file of predictions."""
    questions, _ = validation_questions(data_args)
    predictions = read_predictions(data_args.score)
    missing = [question.id for question in questions if question.id not in predictions]
    if missing and data_args.version_2_with_negative:
        raise InputError(f"{data_args.score}: no answer to {len(missing)} questions, the first {missing[0]!r}.")
    if missing:
        print(f"{len(missing)} questions have no prediction, and score 0", file=sys.stderr)
    print(json.dumps(squad_scores(questions, predictions, data_args.version_2_with_negative), indent=2))


def write_answers(predictions: Predictions, output_dir: Path) -> None:
    write_json(output_dir / "predictions.json", predictions.answers)
    write_json(output_dir / "nbest_predictions.json", predictions.nbest)
    if predictions.null_odds:
        write_json(output_dir / "null_odds.json", predictions.null_odds)


def main() -> None:
    model_args, data_args, args = parse_qa_arguments(__doc__)
    if data_args.score:
        return score_file(data_args)

    # Whatever may be wrong with the input is found before anything is trained or written
    training, validation = data_args.train_file is not None, data_args.validation_file is not None
    job = Job(AutoModelForQuestionAnswering, model_args, data_args, args, QA_MAY_CHANGE, trains=training)
    tokenizer = load_tokenizer(model_args)
    train_questions, train_about = training_questions(data_args) if training else ([], {})
    eval_questions, eval_about = validation_questions(data_args) if validation else ([], {})
    sizes = (data_args.max_seq_length, data_args.doc_stride, data_args.max_question_length)
    train_rows = eval_rows = scoring = None
    if validation:
        eval_rows, windows = encode_questions(eval_questions, tokenizer, *sizes)
        scoring = Scoring(eval_questions, windows, data_args)
        eval_about["eval_windows"] = len(eval_rows)
    if training:
        train_rows, _ = encode_questions(train_questions, tokenizer, *sizes, keep_windows=False)
        train_about["train_windows"] = len(train_rows)
        set_max_steps(args, len(train_rows))
    job.announce([data_args.train_file] if training else ())

    set_seed(args.seed)
    model = load_model(job, tokenizer)
    check_fit(model, tokenizer, data_args.max_seq_length, "--max_seq_length")
    job.check(model)
    model = job.finished_model() or model
    say(
        f"{model.num_parameters():,} parameters, {len(fnl_hf.factorizations(model))} factorizations; "
        f"{len(train_questions):,} questions to train on for {max(0, args.max_steps):,} steps, "
        f"{len(eval_questions):,} to evaluate on"
    )

    trainer = job.make_trainer(
        FineTuner,
        model=model,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=padding(tokenizer, data_args.max_seq_length, data_args.pad_to_max_length),
        processing_class=tokenizer,
        compute_metrics=scoring,
    )
    if metrics := job.train():
        job.report("train", metrics | train_about)
    job.save()
    if validation:
        job.report("eval", trainer.predict(eval_rows, metric_key_prefix="eval").metrics | eval_about)
        if trainer.is_world_process_zero():
            write_answers(scoring.predictions, job.output_dir)
    job.report_resources()


if __name__ == "__main__":
    run_main(main)
