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

Linear layers whose ranks follow their singular values:

    python scripts/run_translation.py --attention none --target_modules all-linear --rank 0.25 --rank_adaptation dlrt \\
        --output_dir runs/dlrt

Your own corpus, JSON lines such as {"translation": {"de": "...", "en": "..."}}, or pairs of text files (.gz, .xz too);
it is tokenized once, in bounded memory, into `prepared` beside the output directory:

    python scripts/run_translation.py --train_file train.json --test_file test.json --output_dir runs/own
    python scripts/run_translation.py --train_source train.fr --train_target train.en --test_source test.fr \\
        --test_target test.en --source_lang fr --target_lang en --vocab_size 8000 --output_dir runs/fr

Fine-tuning a pretrained checkpoint; languages, T5's prefix and the first token are set for it and stored with it:

    python scripts/run_translation.py --model_name_or_path path/to/opus-mt-de-en --max_steps 500 --output_dir runs/opus
    python scripts/run_translation.py --model_name_or_path path/to/nllb-200-distilled-600M --train_file train.json \\
        --source_lang de --target_lang en --learning_rate 3e-5 --max_tokens 2000 --output_dir runs/nllb

The best checkpoint by BLEU in validation, until six evaluations in a row find no better one:

    python scripts/run_translation.py --predict_with_generate --eval_strategy steps --eval_steps 100 \\
        --metric_for_best_model bleu --load_best_model_at_end --average_checkpoints 1 --early_stopping_patience 6 \\
        --output_dir runs/best

Scoring a finished run on another test set, with two references; results go to runs/best/test-news:

    python scripts/run_translation.py --do_train false --test_source news.de --test_target news.a.en news.b.en \\
        --num_beams 8 --length_penalty 0.6 --output_dir runs/best
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from fnl_hf.tasks.running import (
    InputError,
    Job,
    arguments_of,
    average_checkpoints_,
    check_used,
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
    MAY_CHANGE,
    DataArguments,
    ModelArguments,
    Pair,
    Patience,
    References,
    TranslationArguments,
    TranslationCollator,
    TranslationTrainer,
    bleu_for,
    encode,
    hub_metric,
    metric_scores,
    new_marian,
    own_dropout,
    parse_arguments,
    prefix_of,
    prepare_pairs,
    prepare_vocabulary,
    read_corpus,
    read_pairs,
    read_references,
    sacrebleu_scores,
    set_first_token,
    set_languages,
    split_text,
    steps_of_epochs,
    store_search,
    training_files,
    translate,
    use_languages,
    write_translations,
)

LANGUAGES = ("source_lang", "target_lang")

if TYPE_CHECKING:
    from evaluate import EvaluationModule


def score(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    references: References,
    data_args: DataArguments,
    metric: "EvaluationModule | None",
) -> None:
    """Translate the test set, on all processes; print, save and log its scores and five translations."""
    sources = [source for source, _ in pairs]
    started = time.monotonic()
    options = {**data_args.search, "progress": not job.args.disable_tqdm}
    translations = translate(job.trainer.model, tokenizer, sources, **options)
    seconds = time.monotonic() - started
    if not job.trainer.is_world_process_zero():
        return
    scores = sacrebleu_scores(translations, references, data_args.target_lang)
    metrics: dict[str, Any] = {f"test_{name}": value for name, value in scores.items()}
    metrics |= {"test_samples": len(pairs), "test_references": len(references)}
    metrics |= {"test_runtime": round(seconds, 2), "test_samples_per_second": round(len(pairs) / seconds, 2)}
    job.report("test", metrics)
    write_text(job.output_dir / "generated_predictions.txt", "".join(f"{line}\n" for line in translations))
    write_translations(job.output_dir / "test_translations.tsv", sources, references, translations)
    for i in range(0, len(pairs), max(1, len(pairs) // 5))[:5]:
        print(f"\n  source       {sources[i]}\n  reference    {references[0][i]}\n  translation  {translations[i]}")
    print(f"\nBLEU {scores['bleu']:.2f} on {len(pairs)} sentences ({scores['bleu_signature']})")
    print(f"chrF {scores['chrf']:.2f} ({scores['chrf_signature']})")
    if metric is not None:
        own = metric_scores(metric, translations, references)
        job.report("test", metrics | {f"test_{name}": value for name, value in own.items()})


def trained_languages(
    model_args: ModelArguments, data_args: DataArguments, args: TranslationArguments
) -> dict[str, str]:
    """The languages of a finished run, where they are recorded; those that are not given become the arguments.

    Raises:
        InputError: arguments are given that are not the run's.
    """
    values = arguments_of(model_args, data_args, args)
    given = {name: values[name] for name in model_args.given & values.keys()}
    known = check_used(Path(args.output_dir), given, MAY_CHANGE.union(LANGUAGES, ("max_length", "source_prefix")))
    trained = {name: known[name] for name in LANGUAGES if name in known}
    for name in trained.keys() - model_args.given:
        setattr(data_args, name, trained[name])
    return trained


def load_finished(
    model_args: ModelArguments, data_args: DataArguments, args: TranslationArguments, trained: dict[str, str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a finished run, and its tokenizer; what it wants before every source joins the arguments."""
    model, tokenizer = load_trained(AutoModelForSeq2SeqLM, args.output_dir)
    given = model_args.given.intersection(LANGUAGES)
    use_languages(tokenizer, {name: getattr(data_args, name) for name in LANGUAGES}, given, trained)
    stored = None if given else getattr(model.config, "prefix", None)
    data_args.source_prefix = (
        data_args.source_prefix
        or stored
        or prefix_of(tokenizer, model.config, data_args.source_lang, data_args.target_lang)
    )
    set_first_token(model, tokenizer, data_args.source_prefix)
    return model, tokenizer


def test_name(path: str | None) -> str:
    """What the scores on a test set are called: its file without the ends that tell compression and language."""
    if path is None:
        return "shipped"
    name = Path(path).name.removesuffix(".gz").removesuffix(".xz")
    return name.rpartition(".")[0] or name


def score_finished(model_args: ModelArguments, data_args: DataArguments, args: TranslationArguments) -> None:
    """Score the model of a finished run on a test set; what it had there stays: results get a folder of their own."""
    trained = trained_languages(model_args, data_args, args)
    files = {kind: getattr(data_args, f"test_{kind}") for kind in ("file", "source", "target")}
    text = split_text("test", data_args.source_lang, data_args.target_lang, **files)
    pairs = read_pairs(text, data_args.max_eval_samples)
    references = read_references(data_args, pairs)
    bleu_for(data_args.target_lang)
    metric = hub_metric(data_args.metric) if data_args.metric else None
    model, tokenizer = load_finished(model_args, data_args, args, trained)
    name = test_name(files["file"] or files["source"])
    args.output_dir, args.eval_strategy = str(Path(args.output_dir) / f"test-{name}"), "no"
    job = Job(AutoModelForSeq2SeqLM, model_args, data_args, args, trains=False)
    job.make_trainer(TranslationTrainer, model=model, processing_class=tokenizer)
    score(job, tokenizer, pairs, references, data_args, metric)
    job.report_resources()


def translate_input(model_args: ModelArguments, data_args: DataArguments, args: TranslationArguments) -> None:
    """Print the translations of the sentences that the user gave, by the model of a finished run."""
    if args.world_size > 1:  # each would read a part of standard input
        raise InputError(f"--translate is for one process, and these are {args.world_size}. Start it without torchrun.")
    sentences = given_lines(data_args.translate)
    trained = trained_languages(model_args, data_args, args)
    model, tokenizer = load_finished(model_args, data_args, args, trained)
    for translation in translate(model, tokenizer, sentences, **data_args.search, progress=False):
        say(translation)


def main() -> None:
    model_args, data_args, args = parse_arguments(__doc__)
    if data_args.translate:
        return translate_input(model_args, data_args, args)
    if not args.do_train:
        return score_finished(model_args, data_args, args)

    # Whatever may be wrong with the input is found before anything is trained or written
    job = Job(AutoModelForSeq2SeqLM, model_args, data_args, args, MAY_CHANGE)
    corpus = read_corpus(data_args)
    pairs = {split: read_pairs(corpus[split], data_args.max_eval_samples) for split in corpus.keys() - {"train"}}
    references = read_references(data_args, pairs.get("test", []))
    bleu_for(data_args.target_lang)  # may lack a package
    if args.predict_with_generate and "validation" not in pairs:
        raise InputError(
            "--predict_with_generate scores a validation set, and there is none. Give --validation_file, or "
            "--validation_source and --validation_target."
        )
    metric = hub_metric(data_args.metric) if data_args.metric else None
    prepared = prepared_directory(data_args.prepared_dir, args.output_dir)
    if pretrained := job.checkpoint or model_args.model_name_or_path:
        tokenizer = load(AutoTokenizer, pretrained)
        set_languages(tokenizer, data_args.source_lang, data_args.target_lang)
        config = load(AutoConfig, pretrained)
        data_args.source_prefix = data_args.source_prefix or prefix_of(
            tokenizer, config, data_args.source_lang, data_args.target_lang
        )
    else:
        tokenizer = prepare_vocabulary(corpus["train"], model_args.vocab_size, data_args, prepared)
    train = prepare_pairs(corpus["train"], tokenizer, data_args, prepared, progress=not args.disable_tqdm)
    validation = encode(pairs["validation"], tokenizer, data_args) if "validation" in pairs else None
    steps = steps_of_epochs(train, args)  # refuses sentences that no batch has room for
    if args.max_steps <= 0:
        args.max_steps = steps
    job.announce(training_files(data_args))

    set_seed(args.seed)
    sizes = {name: getattr(model_args, name) for name in ("d_model", "layers", "heads", "ffn_dim")}
    sizes |= {"dropout": model_args.dropout or 0.0, "max_length": data_args.max_length}
    model = job.finished_model() or job.pretrained_or_new(
        lambda: new_marian(tokenizer, **sizes),
        tokenizer,
        data_args.max_length,
        "--max_length",
        **(own_dropout(config, model_args.dropout) if pretrained else {}),
    )
    set_first_token(model, tokenizer, data_args.source_prefix)
    store_search(model, data_args)
    job.check(model)
    say(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")

    def score_validation(model: PreTrainedModel) -> dict[str, float | str]:
        sources, targets = map(list, zip(*pairs["validation"], strict=True))
        translations = translate(model, tokenizer, sources, **data_args.search, progress=False)
        return sacrebleu_scores(translations, [targets], data_args.target_lang)

    patience = args.early_stopping_patience
    trainer = job.make_trainer(
        TranslationTrainer,
        model=model,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=TranslationCollator.of(model, tokenizer),
        processing_class=tokenizer,
        callbacks=[Patience(patience)] if patience else [],
        score_validation=score_validation,
    )
    if metrics := job.train():
        # The Trainer counts samples by a fixed batch size, which batches of tokens do not have
        job.report("train", {key: value for key, value in metrics.items() if "samples" not in key})
    if args.average_checkpoints > 1:
        last = complete_checkpoints(job.output_dir, model.config)[-args.average_checkpoints :]
        if len(last) < args.average_checkpoints:
            say(f"averaging {len(last)} checkpoints, {args.average_checkpoints} were asked for")
        average_checkpoints_(model, last)
    job.save()
    if validation is not None:
        job.report("eval", trainer.evaluate())
    if "test" not in pairs:
        say("Not scored: give --test_file, or --test_source and --test_target.")
    else:
        score(job, tokenizer, pairs["test"], references, data_args, metric)
    job.report_resources()


if __name__ == "__main__":
    run_main(main)
