"""Let a factorized model learn from the dense one that it was made of, on texts without labels.

A model that `fnl-hf compress` or `fnl-hf factorize` made smaller computes something else than before. Here it learns to
give what the dense model gives: its distributions where both have a head, its hidden states and their means where they
have none. Any text of the kind that the model is used on will do, and minutes win back most of what was lost.

    fnl-hf compress my-encoder my-encoder-half --target_ratio 0.5 --calibration texts.txt
    python scripts/run_distillation.py --model_name_or_path my-encoder-half --teacher my-encoder \\
        --train_file texts.txt --max_steps 500 --output_dir my-encoder-taught

Or from the dense model itself, factorized for the purpose:

    python scripts/run_distillation.py --model_name_or_path my-encoder --teacher my-encoder --factorize \\
        --target_modules all-linear --rank 0.25 --train_file texts.txt --max_steps 500 --output_dir my-encoder-taught

A line of the file is a text; JSON lines and tables (.tsv, .csv) may hold pairs, and files in the layout of SQuAD are
known (.gz and .xz too). With labels of your own use `FNLTrainer(teacher=...)` and its distillation_weight.

--output_dir receives the model with its tokenizer, and all_results.json with eval_loss, the distance from the teacher
on --validation_file. The same command resumes a run that was stopped.
"""

from pathlib import Path

from transformers import set_seed

from fnl_hf.checkpoints import carry
from fnl_hf.compression import Learner
from fnl_hf.tasks.distillation import (
    MAY_CHANGE,
    load_student,
    load_teacher,
    model_class,
    parse_distillation_arguments,
    read_texts,
)
from fnl_hf.tasks.finetuning import load_tokenizer
from fnl_hf.tasks.running import Job, run_main, say
from fnl_hf.texts import TextCollator


def main() -> None:
    model_args, data_args, args = parse_distillation_arguments(__doc__)
    job = Job(model_class(model_args.model_name_or_path), model_args, data_args, args, MAY_CHANGE)
    tokenizer = load_tokenizer(model_args)
    teacher = load_teacher(data_args.teacher)
    texts = read_texts(data_args, tokenizer, teacher)
    job.announce([data_args.train_file])

    set_seed(args.seed)
    model = job.finished_model() or load_student(job, tokenizer, data_args.max_seq_length)
    job.check(model)
    say(
        f"{model.num_parameters():,} parameters learn from {teacher.num_parameters():,}, on "
        + ", ".join(f"{len(rows):,} texts of {split}" for split, rows in texts.items())
    )
    trainer = job.make_trainer(
        Learner,
        model=model,
        teacher=teacher,
        train_dataset=texts["train"],
        eval_dataset=texts.get("validation"),
        data_collator=TextCollator(tokenizer, teacher),
        processing_class=tokenizer,
    )
    if metrics := job.train():
        job.report("train", metrics)
    job.save()
    if trainer.is_world_process_zero():
        carry(Path(model_args.model_name_or_path), job.output_dir)  # what a sentence encoder has beside its weights
    if "validation" in texts:
        job.report("eval", trainer.evaluate())
    job.report_resources()


if __name__ == "__main__":
    run_main(main)
