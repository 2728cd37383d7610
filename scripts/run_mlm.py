"""Pretrain a masked language model with factorized attention and Frobenius decay.

Without arguments: a ModernBERT of the tiny size, from scratch, with FLAMBé, on two novels that ship with the package;
less than four minutes on two CPU cores. The same command resumes a run that was stopped.

    python scripts/run_mlm.py
    python scripts/run_mlm.py --predict "The [MASK] sat on the mat."
    echo "He was [MASK] by the noise." | python scripts/run_mlm.py --predict -

LAMB without decay, and FLAMBé with heads of half their rank:

    python scripts/run_mlm.py --frobenius_decay 0 --output_dir runs/lamb
    python scripts/run_mlm.py --head_rank 0.5 --output_dir runs/half

Your own text: files and folders of plain text, JSON lines such as {"text": "..."} (.gz, .xz too), parquet and arrow. It
is tokenized once, in bounded memory, into `prepared` beside the output directory:

    python scripts/run_mlm.py --train_file wikipedia/ books.jsonl.gz --validation_file valid.txt --vocab_size 30000 \\
        --model_type bert --size base --dropout 0.1 --output_dir runs/base --per_device_train_batch_size 64 \\
        --gradient_accumulation_steps 64 --max_steps 31250 --warmup_steps 0.1 --learning_rate 2e-3 --bf16 \\
        --phase2_steps 3125 --torch_compile

Continued pretraining of a checkpoint; a learning rate as for fine-tuning, and AdamW:

    python scripts/run_mlm.py --model_name_or_path path/to/bert --train_file law/ --fnl_optim none \\
        --learning_rate 5e-5 --max_steps 2000 --output_dir runs/law
"""

import math

from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fnl_hf.tasks.pretraining import (
    MAY_CHANGE,
    SENTENCES,
    Blocks,
    DataArguments,
    FixedMasks,
    Masking,
    MLMArguments,
    MLMTrainer,
    Run,
    TokenStore,
    check_phases,
    data_seed,
    held_out,
    new_model,
    parse_arguments,
    predict_masked,
    prepared_text,
    sequence_lengths,
)
from fnl_hf.tasks.running import Job, given_lines, load_trained, run_main, say


def make_datasets(
    stores: dict[str, TokenStore],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: MLMArguments,
) -> tuple[Run, FixedMasks | None]:
    """The sequences of the whole run, and the masked validation blocks; sets `args.max_steps` from epochs."""
    own_validation = "validation" in stores
    cut = held_out(stores["train"], 0 if own_validation else data_args.validation_split_percentage)
    documents = data_args.respect_documents
    blocks = [Blocks(stores["train"], length, tokenizer, documents, end=cut) for length in sequence_lengths(data_args)]
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(blocks[0]) / per_step)
        check_phases(data_args, args)
    phase2 = data_args.phase2_steps
    sequences = [per_step * steps for steps in (args.max_steps - phase2, phase2)][: len(blocks)]
    run = Run(blocks, sequences, data_seed(args))
    validation = None
    if own_validation or cut < len(stores["train"].tokens):
        store, start = (stores["validation"], 0) if own_validation else (stores["train"], cut)
        masked = Blocks(store, data_args.max_seq_length, tokenizer, documents, start=start)
        validation = FixedMasks(masked, tokenizer, data_args.max_eval_samples)
    return run, validation


def print_predictions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences, top: int) -> None:
    """Print sentences, and below each the likeliest words at its masks."""
    for sentence in sentences:
        print(sentence)
        for guesses in predict_masked(model, tokenizer, sentence, top):
            print("  " + "  ".join(f"{token} {probability:.3f}" for token, probability in guesses))


def main() -> None:
    model_args, data_args, args = parse_arguments(__doc__)
    if data_args.predict:
        model, tokenizer = load_trained(AutoModelForMaskedLM, args.output_dir)
        return print_predictions(model, tokenizer, given_lines(data_args.predict), data_args.top)

    # Whatever may be wrong with the input is found before anything is trained or written
    job = Job(AutoModelForMaskedLM, model_args, data_args, args, MAY_CHANGE)
    tokenizer, stores = prepared_text(job.checkpoint, model_args, data_args, args)
    run, validation = make_datasets(stores, tokenizer, data_args, args)
    job.announce(data_args.train_file or ())

    set_seed(args.seed)
    longest = max(sequence_lengths(data_args))
    model = job.finished_model() or job.pretrained_or_new(
        lambda: new_model(
            model_args.model_type, model_args.size, tokenizer, longest, model_args.dropout, model_args.activation
        ),
        tokenizer,
        longest,
        "--max_seq_length and --phase2_seq_length",
    )
    job.check(model)
    say(
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary; "
        f"{len(stores['train'].tokens):,} tokens of text, {run.passes:.1f} passes over them in {args.max_steps} steps"
    )

    trainer = job.make_trainer(
        MLMTrainer,
        model=model,
        train_dataset=run,
        eval_dataset=validation,
        data_collator=Masking(
            tokenizer,
            data_args.mlm_probability,
            data_args.whole_word_mask,
            data_seed(args),
            pad=data_args.respect_documents,
        ),
        processing_class=tokenizer,
    )
    if metrics := job.train():
        job.report("train", metrics | {"train_passes": round(run.passes, 2)})
    job.save()
    if validation is not None and args.do_eval is not False:
        metrics = trainer.evaluate()
        perplexity = math.exp(min(metrics["eval_loss"], 700))  # beyond, floats end
        job.report("eval", metrics | {"eval_perplexity": perplexity, "eval_labels": validation.labels})
    job.report_resources()
    if trainer.is_world_process_zero() and data_args.train_file is None:
        print_predictions(model, tokenizer, SENTENCES, data_args.top)


if __name__ == "__main__":
    run_main(main)
