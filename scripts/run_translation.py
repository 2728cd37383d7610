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

Your own corpus, JSON lines such as {"translation": {"de": "...", "en": "..."}}, or pairs of text files (.gz, .xz too);
it is tokenized once, in bounded memory, into `prepared` beside the output directory:

    python scripts/run_translation.py --train_file train.json --test_file test.json --output_dir runs/own
    python scripts/run_translation.py --train_source train.fr --train_target train.en --test_source test.fr \\
        --test_target test.en --source_lang fr --target_lang en --vocab_size 8000 --output_dir runs/fr

Fine-tuning a pretrained checkpoint; the default learning rate is one for training from scratch:

    python scripts/run_translation.py --model_name_or_path path/to/opus-mt-de-en --learning_rate 3e-5 \\
        --max_tokens 4000 --max_steps 500 --output_dir runs/opus
    python scripts/run_translation.py --model_name_or_path path/to/t5-small --learning_rate 1e-4 \\
        --source_prefix "translate German to English: " --output_dir runs/t5
"""

import time

from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    set_seed,
)

from fnl_hf.tasks.running import (
    Job,
    average_checkpoints_,
    complete_checkpoints,
    given_lines,
    load,
    load_trained,
    prepared_directory,
    run_main,
    say,
    write_text,
)
from fnl_hf.tasks.translation import (
    DataArguments,
    Pair,
    TranslationTrainer,
    encode,
    hub_metric,
    metric_scores,
    new_marian,
    parse_arguments,
    prepare_pairs,
    prepare_vocabulary,
    read_corpus,
    read_pairs,
    sacrebleu_score,
    steps_of_epochs,
    translate,
)


def score(job: Job, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], data_args: DataArguments, metric) -> None:
    """Translate the test set; print, save and log its scores and five translations."""
    sources, references = zip(*pairs, strict=True)
    started = time.monotonic()
    translations = translate(
        job.trainer.model,
        tokenizer,
        [data_args.source_prefix + source for source in sources],
        num_beams=data_args.num_beams,
        max_length=data_args.max_length,
        batch_size=job.args.per_device_eval_batch_size,
    )
    bleu, signature = sacrebleu_score(translations, references)
    metrics = {"test_bleu": bleu, "test_bleu_signature": signature, "test_samples": len(pairs)}
    metrics["test_runtime"] = round(time.monotonic() - started, 2)  # seconds
    job.report("test", metrics)
    write_text(job.output_dir / "generated_predictions.txt", "".join(f"{line}\n" for line in translations))
    for i in range(0, len(pairs), max(1, len(pairs) // 5))[:5]:
        print(f"\n  source       {sources[i]}\n  reference    {references[i]}\n  translation  {translations[i]}")
    print(f"\nBLEU {bleu:.2f} on {len(pairs)} sentences ({signature})")
    if metric is not None:
        scores = metric_scores(metric, translations, references)
        job.report("test", metrics | {f"test_{name}": value for name, value in scores.items()})


def translate_input(data_args: DataArguments, output_dir: str) -> None:
    """Print the translations of the sentences that the user gave, by the model of a finished run."""
    model, tokenizer = load_trained(AutoModelForSeq2SeqLM, output_dir)
    inputs = [data_args.source_prefix + sentence for sentence in given_lines(data_args.translate)]
    for translation in translate(model, tokenizer, inputs, data_args.num_beams, data_args.max_length, progress=False):
        print(translation)


def main() -> None:
    model_args, data_args, args = parse_arguments(__doc__)
    if data_args.translate:
        return translate_input(data_args, args.output_dir)

    # Whatever may be wrong with the input is found before anything is trained or written
    job = Job(AutoModelForSeq2SeqLM, model_args, args)
    corpus = read_corpus(data_args)
    pairs = {split: read_pairs(corpus[split], data_args.max_eval_samples) for split in corpus.keys() - {"train"}}
    metric = hub_metric(data_args.metric) if data_args.metric else None
    prepared = prepared_directory(data_args.prepared_dir, args.output_dir)
    if pretrained := job.checkpoint or model_args.model_name_or_path:
        tokenizer = load(AutoTokenizer, pretrained)
    else:
        tokenizer = prepare_vocabulary(corpus["train"], model_args.vocab_size, data_args, prepared)
    train = prepare_pairs(corpus["train"], tokenizer, data_args, prepared, progress=not args.disable_tqdm)
    validation = encode(pairs["validation"], tokenizer, data_args) if "validation" in pairs else None
    steps = steps_of_epochs(train, args)  # refuses sentences that no batch has room for
    if args.max_steps <= 0:
        args.max_steps = steps
    job.announce()

    set_seed(args.seed)
    sizes = {name: getattr(model_args, name) for name in ("d_model", "layers", "heads", "ffn_dim", "dropout")}
    sizes["max_length"] = data_args.max_length
    model = job.finished_model() or job.pretrained_or_new(
        lambda: new_marian(tokenizer, **sizes), tokenizer, data_args.max_length, "--max_length"
    )
    job.check(model)
    say(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")

    trainer = job.make_trainer(
        TranslationTrainer,
        model=model,
        train_dataset=train,
        eval_dataset=validation,
        # label smoothing takes the labels from the model, so the decoder's inputs come from the collator
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    if metrics := job.train():
        # The Trainer counts samples by a fixed batch size, which batches of tokens do not have
        job.report("train", {key: value for key, value in metrics.items() if "samples" not in key})
    if args.average_checkpoints > 1:
        average_checkpoints_(model, complete_checkpoints(job.output_dir, model.config)[-args.average_checkpoints :])
    job.save()
    if validation is not None:
        job.report("eval", trainer.evaluate())
    if "test" not in pairs:
        say("Not scored: give --test_file, or --test_source and --test_target.")
    elif trainer.is_world_process_zero():
        score(job, tokenizer, pairs["test"], data_args, metric)
    job.report_resources()


if __name__ == "__main__":
    run_main(main)
