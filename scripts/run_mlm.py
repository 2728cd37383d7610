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

    python scripts/run_mlm.py --train_file wikipedia/ books.jsonl.gz --validation_file valid.txt --vocab_size 30000 \
        --model_type bert --size base --dropout 0.1 --output_dir runs/base --per_device_train_batch_size 64 \
        --gradient_accumulation_steps 64 --max_steps 31250 --warmup_steps 0.1 --learning_rate 2e-3 --bf16 \
        --phase2_steps 3125 --torch_compile

Continued pretraining of a checkpoint; a learning rate as for fine-tuning, and AdamW:

    python scripts/run_mlm.py --model_name_or_path path/to/bert --train_file law/ --fnl_optim none \
        --learning_rate 5e-5 --max_steps 2000 --output_dir runs/law
"""

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import fnl_hf
from fnl_hf.tasks.pretraining import (
    SENTENCES,
    Blocks,
    DataArguments,
    FixedMasks,
    Masking,
    MLMArguments,
    MLMTrainer,
    ModelArguments,
    Run,
    TokenStore,
    check_phases,
    check_tokenizer,
    corpus_files,
    fingerprint,
    held_out,
    new_model,
    parse_arguments,
    predict_masked,
    prepare_store,
    prepare_tokenizer,
    read_corpus,
    shipped_file,
    tokenizer_digest,
    train_tokenizer,
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
)


def prepared_text(
    checkpoint: Path | None, model_args: ModelArguments, data_args: DataArguments, args: MLMArguments
) -> tuple[PreTrainedTokenizerBase, dict[str, TokenStore]]:
    """The tokenizer, and the tokens of the user's files or of the shipped novels, made now or by an earlier run.

    Args:
        checkpoint: the one to resume from, whose tokenizer is taken.
    """
    if data_args.train_file is None:
        files = {split: [shipped_file(split)] for split in ("train", "validation")}
    else:
        given = {"train": data_args.train_file, "validation": data_args.validation_file}
        files = {split: corpus_files(paths) for split, paths in given.items() if paths}
    reading = {
        "text_column": data_args.text_column,
        "documents": data_args.documents if data_args.train_file else "blank_line",
    }

    def read(split: str):
        progress = tqdm(desc=f"Reading {split}", unit=" lines", disable=args.disable_tqdm)
        for line in read_corpus(files[split], **reading, max_line_length=data_args.max_line_length):
            progress.update()
            yield line
        progress.close()

    directory = Path(data_args.prepared_dir) if data_args.prepared_dir else Path(args.output_dir).parent / "prepared"
    name = checkpoint or model_args.tokenizer_name or model_args.model_name_or_path
    if name is not None:
        tokenizer = load(AutoTokenizer, name)
        check_tokenizer(tokenizer, name)
    else:
        options = {
            "kind": model_args.tokenizer_type,
            "vocab_size": model_args.vocab_size,
            "lowercase": model_args.lowercase,
            "token_types": model_args.model_type in ("bert", "electra"),
            "max_length": max(512, *sequence_lengths(data_args)),
        }
        tokenizer = prepare_tokenizer(
            directory / f"tokenizer-{fingerprint(files['train'], **reading, **options)}",
            lambda: train_tokenizer(lambda: filter(None, read("train")), **options),
        )
    digest = tokenizer_digest(tokenizer)
    return tokenizer, {
        split: prepare_store(
            directory / f"{split}-{fingerprint(paths, **reading, tokenizer=digest)}",
            partial(read, split),
            tokenizer,
            split,
        )
        for split, paths in files.items()
    }


def sequence_lengths(data_args: DataArguments) -> list[int]:
    """Tokens of a block in the phases of training."""
    return [data_args.max_seq_length, *[data_args.phase2_seq_length] * (data_args.phase2_steps > 0)]


def make_model(
    tokenizer: PreTrainedTokenizerBase,
    config: fnl_hf.FNLConfig | None,
    model_args: ModelArguments,
    longest: int,
) -> PreTrainedModel:
    """The pretrained model or a new one, factorized if there is a config and the checkpoint is not so already.

    Args:
        longest: tokens of the longest block.
    """
    if model_args.model_name_or_path:
        model = load(AutoModelForMaskedLM, model_args.model_name_or_path, dtype=torch.float32)
        check_fit(model, tokenizer, longest, "--max_seq_length and --phase2_seq_length")
    else:
        model = new_model(model_args.model_type, model_args.size, tokenizer, longest, model_args.dropout)
    if config is not None and fnl_hf.factorizations(model):
        say(f"{model_args.model_name_or_path} is factorized already, and stays so: --head_rank and --init are unused.")
    elif config is not None:
        with one_line_errors(ValueError):
            fnl_hf.factorize(model, config)
    return model


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


def data_seed(args: MLMArguments) -> int:
    """Of the order of blocks and of the masks."""
    return args.seed if args.data_seed is None else args.data_seed


def print_predictions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences, top: int) -> None:
    for sentence in sentences:
        print(sentence)
        for guesses in predict_masked(model, tokenizer, sentence, top):
            print("  " + "  ".join(f"{token} {probability:.3f}" for token, probability in guesses))


def predict_input(data_args: DataArguments, output_dir: Path) -> None:
    """Print what the model of a finished run predicts in the sentences that the user gave."""
    if not (output_dir / "config.json").is_file():
        raise InputError(f"--output_dir {output_dir}: no finished run. Train first, or give the directory of one.")
    sentences = data_args.predict if data_args.predict != ["-"] else sys.stdin.read().splitlines()
    print_predictions(load(AutoModelForMaskedLM, output_dir), load(AutoTokenizer, output_dir), sentences, data_args.top)


def main() -> None:
    started = time.monotonic()
    model_args, data_args, args = parse_arguments()
    output_dir = Path(args.output_dir)
    if data_args.predict:
        return predict_input(data_args, output_dir)

    # Whatever may be wrong with the input is found before anything is trained or written
    checkpoint = last_complete_checkpoint(output_dir)
    config = make_config(model_args)
    tokenizer, stores = prepared_text(checkpoint, model_args, data_args, args)
    run, validation = make_datasets(stores, tokenizer, data_args, args)
    finished = announce(checkpoint, args.max_steps)

    set_seed(args.seed)
    if finished:
        model = load_finished(AutoModelForMaskedLM, checkpoint, args)
    else:
        longest = max(sequence_lengths(data_args))
        model = make_model(tokenizer, None if args.factorize_at else config, model_args, longest)
    check_decay(args, model)
    if checkpoint is not None:
        check_same_model(model.config, checkpoint, bool(args.factorize_at))
    say(
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary; "
        f"{len(stores['train'].tokens):,} tokens of text, {run.passes:.1f} passes over them in {args.max_steps} steps"
    )

    with one_line_errors(ValueError):
        trainer = MLMTrainer(
            model=model,
            args=args,
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
            fnl_config=config if args.factorize_at else None,
        )
    if not finished:
        report(trainer, "train", train(trainer, checkpoint) | {"train_passes": round(run.passes, 2)})
    trainer.accelerator.wait_for_everyone()  # until the last checkpoint is written
    trainer.save_model()
    if validation is not None:
        metrics = trainer.evaluate()
        perplexity = math.exp(min(metrics["eval_loss"], 700))  # beyond, floats end
        metrics |= {"eval_perplexity": perplexity, "eval_labels": validation.labels}
        report(trainer, "eval", metrics)
    report(trainer, "run", resources_used(started))
    if trainer.is_world_process_zero() and data_args.train_file is None:
        print_predictions(model, tokenizer, SENTENCES, data_args.top)


if __name__ == "__main__":
    run_main(main)
