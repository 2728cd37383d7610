"""Train a translation model with factorized attention and Frobenius decay, and score it with BLEU.

Without arguments: a small German-English Transformer, from scratch, on the corpus that ships with the package; about
six minutes on two CPU cores. The same command resumes a run that was stopped.

    python scripts/run_translation.py
    python scripts/run_translation.py --translate "Ich habe heute keine Zeit." "Wo wohnst du?"
    echo "Wie geht es dir?" | python scripts/run_translation.py --translate -

Heads of half their rank, without decay:

    python scripts/run_translation.py --head_rank 0.5 --frobenius_decay 0 --output_dir runs/half

A quarter of the run dense, then heads of half their rank:

    python scripts/run_translation.py --head_rank 0.5 --factorize_at 0.25 --output_dir runs/warm

Your own corpus, JSON lines such as {"translation": {"de": "...", "en": "..."}}, or pairs of text files (.gz, .xz too):

    python scripts/run_translation.py --train_file train.json --test_file test.json --output_dir runs/own
    python scripts/run_translation.py --train_source train.fr --train_target train.en --test_source test.fr \
        --test_target test.en --source_lang fr --target_lang en --vocab_size 8000 --output_dir runs/fr

Fine-tuning a pretrained checkpoint; the default learning rate is one for training from scratch:

    python scripts/run_translation.py --model_name_or_path path/to/opus-mt-de-en --learning_rate 3e-5 \
        --max_tokens 2000 --max_steps 500 --output_dir runs/opus
    python scripts/run_translation.py --model_name_or_path path/to/t5-small --learning_rate 1e-4 \
        --source_prefix "translate German to English: " --output_dir runs/t5
"""

import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import fnl_hf
from fnl_hf.tasks.running import (
    InputError,
    announce,
    average_checkpoints_,
    check_decay,
    check_fit,
    check_same_model,
    complete_checkpoints,
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
from fnl_hf.tasks.translation import (
    DataArguments,
    ModelArguments,
    Pair,
    TokenBatches,
    hub_metric,
    metric_scores,
    new_marian,
    parse_arguments,
    read_split,
    sacrebleu_score,
    steps_of_epochs,
    train_tokenizer,
    translate,
)


class TranslationTrainer(TokenBatches, fnl_hf.FNLSeq2SeqTrainer):
    """Frobenius decay, in batches of tokens."""


def read_corpus(data_args: DataArguments) -> dict[str, list[Pair]]:
    """The pairs of every split: the user's files, or all of the shipped corpus where there are none."""
    files = {
        split: {kind: getattr(data_args, f"{split}_{kind}") for kind in ("file", "source", "target")}
        for split in ("train", "validation", "test")
    }
    own = any(any(paths.values()) for paths in files.values())
    if own and not any(files["train"].values()):
        raise InputError("a corpus without training pairs. Give --train_file, or --train_source and --train_target.")
    return {
        split: read_split(split, data_args.source_lang, data_args.target_lang, **paths)[
            : data_args.max_train_samples if split == "train" else data_args.max_eval_samples
        ]
        for split, paths in files.items()
        if not own or any(paths.values())
    }


def make_tokenizer(
    path: str | Path | None, pairs: list[Pair], model_args: ModelArguments, data_args: DataArguments
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in `path`, or else a joint BPE of the corpus."""
    if path is not None:
        return load(AutoTokenizer, path)
    texts = (sentence for pair in pairs for sentence in pair)
    return train_tokenizer(texts, model_args.vocab_size, data_args.max_length)


def make_model(
    tokenizer: PreTrainedTokenizerBase,
    config: fnl_hf.FNLConfig | None,
    model_args: ModelArguments,
    data_args: DataArguments,
) -> PreTrainedModel:
    """The pretrained model or a new one, factorized if there is a config and the checkpoint is not so already."""
    path = model_args.model_name_or_path
    with one_line_errors(ValueError):
        if path:
            model = load(AutoModelForSeq2SeqLM, path, dtype=torch.float32)
            check_fit(model, tokenizer, data_args.max_length, "--max_length")
        else:
            model = new_marian(
                tokenizer,
                d_model=model_args.d_model,
                layers=model_args.layers,
                heads=model_args.heads,
                ffn_dim=model_args.ffn_dim,
                dropout=model_args.dropout,
                max_length=data_args.max_length,
            )
        if config is not None and fnl_hf.factorizations(model):
            say(f"{path} is factorized already, and stays so: --head_rank and --init are unused.")
        elif config is not None:
            fnl_hf.factorize(model, config)
    return model


def encode(pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Dataset:
    """Token ids of both sides, in columns `input_ids` and `labels`."""
    limits = {"truncation": True, "max_length": data_args.max_length}
    sources = tokenizer([data_args.source_prefix + source for source, _ in pairs], **limits)
    targets = tokenizer(text_target=[target for _, target in pairs], **limits)
    return Dataset.from_dict({"input_ids": sources["input_ids"], "labels": targets["input_ids"]})


def score(
    trainer: TranslationTrainer, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], data_args: DataArguments, metric
) -> None:
    """Translate the test set; print, save and log its scores and five translations."""
    sources, references = zip(*pairs, strict=True)
    started = time.monotonic()
    translations = translate(
        trainer.model,
        tokenizer,
        [data_args.source_prefix + source for source in sources],
        num_beams=data_args.num_beams,
        max_length=data_args.max_length,
        batch_size=trainer.args.per_device_eval_batch_size,
    )
    bleu, signature = sacrebleu_score(translations, references)
    metrics = {"test_bleu": bleu, "test_bleu_signature": signature, "test_samples": len(pairs)}
    metrics["test_runtime"] = round(time.monotonic() - started, 2)  # seconds
    report(trainer, "test", metrics)
    lines = "".join(f"{line}\n" for line in translations)
    write_text(Path(trainer.args.output_dir) / "generated_predictions.txt", lines)
    for i in range(0, len(pairs), max(1, len(pairs) // 5))[:5]:
        print(f"\n  source       {sources[i]}\n  reference    {references[i]}\n  translation  {translations[i]}")
    print(f"\nBLEU {bleu:.2f} on {len(pairs)} sentences ({signature})")
    if metric is not None:
        scores = metric_scores(metric, translations, references)
        report(trainer, "test", metrics | {f"test_{name}": value for name, value in scores.items()})


def translate_input(data_args: DataArguments, output_dir: Path) -> None:
    """Print the translations of the sentences that the user gave, by the model of a finished run."""
    if not (output_dir / "config.json").is_file():
        raise InputError(f"--output_dir {output_dir}: no finished run. Train first, or give the directory of one.")
    sentences = data_args.translate if data_args.translate != ["-"] else sys.stdin.read().splitlines()
    model, tokenizer = load(AutoModelForSeq2SeqLM, output_dir), load(AutoTokenizer, output_dir)
    inputs = [data_args.source_prefix + sentence for sentence in sentences]
    for translation in translate(model, tokenizer, inputs, data_args.num_beams, data_args.max_length, progress=False):
        print(translation)


def main() -> None:
    started = time.monotonic()
    model_args, data_args, args = parse_arguments()
    output_dir = Path(args.output_dir)
    if data_args.translate:
        return translate_input(data_args, output_dir)

    # Whatever may be wrong with the input is found before anything is trained or written
    checkpoint = last_complete_checkpoint(output_dir)
    pairs = read_corpus(data_args)
    metric = hub_metric(data_args.metric) if data_args.metric else None

    set_seed(args.seed)
    tokenizer = make_tokenizer(checkpoint or model_args.model_name_or_path, pairs["train"], model_args, data_args)
    config = make_config(model_args)
    datasets = {split: encode(pairs[split], tokenizer, data_args) for split in pairs.keys() - {"test"}}
    if args.max_steps <= 0:
        args.max_steps = steps_of_epochs(datasets["train"], args)
    finished = announce(checkpoint, args.max_steps)
    if finished:
        model = load_finished(AutoModelForSeq2SeqLM, checkpoint, args)
    else:
        model = make_model(tokenizer, None if args.factorize_at else config, model_args, data_args)
    check_decay(args, model)
    if checkpoint is not None:
        check_same_model(model.config, checkpoint, bool(args.factorize_at))
    say(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")

    with one_line_errors(ValueError):
        trainer = TranslationTrainer(
            model=model,
            args=args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            # label smoothing takes the labels from the model, so the decoder's inputs come from the collator
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
            fnl_config=config if args.factorize_at else None,
        )
    if not finished:
        metrics = train(trainer, checkpoint)
        # The Trainer counts samples by a fixed batch size, which batches of tokens do not have
        report(trainer, "train", {key: value for key, value in metrics.items() if "samples" not in key})
    trainer.accelerator.wait_for_everyone()  # until the last checkpoint is written
    if args.average_checkpoints > 1:
        average_checkpoints_(model, complete_checkpoints(output_dir, model.config)[-args.average_checkpoints :])
    trainer.save_model()
    if "validation" in datasets:
        report(trainer, "eval", trainer.evaluate())
    if "test" in pairs and trainer.is_world_process_zero():
        score(trainer, tokenizer, pairs["test"], data_args, metric)
    elif "test" not in pairs:
        say("Not scored: give --test_file, or --test_source and --test_target.")
    report(trainer, "run", resources_used(started))


if __name__ == "__main__":
    run_main(main)
