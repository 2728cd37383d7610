"""Tiny translation checkpoints of the real classes, with tokenizers of the real kinds learned from a few sentences."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import torch
import transformers as tf
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers

WIDTH = 48
SIZES = {
    "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": 0.1,
}  # fmt: skip
Built = tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase]


def spm(texts: Iterable[str], folder: Path, kind: str = "unigram", size: int = 300) -> Path:
    """A sentencepiece model learned from texts: <unk>, <s> and </s> are its first three pieces."""
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / kind), vocab_size=size, model_type=kind,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return folder / f"{kind}.model"


def pieces(model: Path) -> list[tuple[str, float]]:
    """(piece, score) of a sentencepiece model, without its three special pieces."""
    loaded = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [(loaded.id_to_piece(i), loaded.get_score(i)) for i in range(3, len(loaded))]


def marian(texts, folder, codes=()) -> Built:
    path = spm(texts, folder)
    vocab = ["</s>", "<unk>", *(piece for piece, _ in pieces(path)), *codes, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocab)}))
    tokenizer = tf.MarianTokenizer(str(path), str(path), str(folder / "vocab.json"), source_lang="de", target_lang="en")
    pad = tokenizer.pad_token_id
    config = tf.MarianConfig(
        **SIZES, vocab_size=len(vocab), pad_token_id=pad, decoder_start_token_id=pad, eos_token_id=0,
        forced_eos_token_id=0,
    )  # fmt: skip
    return tf.MarianMTModel(config), tokenizer


def multilingual_marian(texts, folder) -> Built:
    return marian(texts, folder, (">>eng<<", ">>fra<<"))


def fsmt(texts, folder) -> Built:
    bpe = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, end_of_word_suffix="</w>", show_progress=False),
    )
    vocab = [token for token, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1])]
    merges = json.loads(bpe.to_str())["model"]["merges"]
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZäöüÄÖÜß.,?!'&;0123456789"
    vocab += [mark for char in characters for mark in (char, f"{char}</w>") if mark not in vocab]
    # The vocabularies of the two sides differ in order and in size, as those of wmt19-ru-en do
    other = [*special, *reversed(vocab[4:]), "only-here</w>"]
    for name, tokens in (("source", vocab), ("target", other)):
        (folder / f"{name}.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges").write_text("".join(f"{a} {b} 1\n" for a, b in merges))
    tokenizer = tf.FSMTTokenizer(
        ["de", "en"], str(folder / "source.json"), str(folder / "target.json"), str(folder / "merges")
    )
    config = tf.FSMTConfig(
        **SIZES, langs=["de", "en"], src_vocab_size=len(vocab), tgt_vocab_size=len(other), bos_token_id=0,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.FSMTForConditionalGeneration(config), tokenizer


def t5(texts, folder, model=tf.T5ForConditionalGeneration, config=tf.T5Config) -> Built:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces(spm(texts, folder))]
    tokenizer = tf.T5Tokenizer(vocab, extra_ids=4)
    tasks = {"translation_de_to_en": {"prefix": "translate German to English: "}}
    made = config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=WIDTH // 4, num_heads=4, num_layers=1, num_decoder_layers=1,
        d_ff=96, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    if config is tf.T5Config:
        made.task_specific_params = tasks
    return model(made), tokenizer


def mt5(texts, folder) -> Built:
    return t5(texts, folder, tf.MT5ForConditionalGeneration, tf.MT5Config)


def mbart50(texts, folder) -> Built:
    head = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    codes = [(code, 0.0) for code in tf.models.mbart50.tokenization_mbart50.FAIRSEQ_LANGUAGE_CODES]
    vocab = [*head, *pieces(spm(texts, folder)), *codes, ("<mask>", 0.0)]
    tokenizer = tf.MBart50Tokenizer(vocab)
    config = tf.MBartConfig(**SIZES, vocab_size=len(tokenizer), decoder_start_token_id=2, forced_eos_token_id=2)
    return tf.MBartForConditionalGeneration(config), tokenizer


def mbart(texts, folder) -> Built:
    head = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    codes = [(code, 0.0) for code in tf.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES]
    tokenizer = tf.MBartTokenizer([*head, *pieces(spm(texts, folder)), *codes, ("<mask>", 0.0)])
    config = tf.MBartConfig(**SIZES, vocab_size=len(tokenizer), forced_eos_token_id=2)
    return tf.MBartForConditionalGeneration(config), tokenizer


def m2m100(texts, folder) -> Built:
    path = spm(texts, folder)
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *(piece for piece, _ in pieces(path))]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocab)}))
    codes = tf.models.m2m_100.tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"]
    tokenizer = tf.M2M100Tokenizer(
        str(folder / "vocab.json"), str(path), additional_special_tokens=[f"__{code}__" for code in codes]
    )
    config = tf.M2M100Config(**SIZES, vocab_size=len(vocab) + 120, decoder_start_token_id=2)
    return tf.M2M100ForConditionalGeneration(config), tokenizer


def nllb(texts, folder) -> Built:
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = tf.NllbTokenizer(vocab=bpe.get_vocab(), merges=merges)
    config = tf.M2M100Config(**SIZES, vocab_size=len(tokenizer), decoder_start_token_id=2)
    return tf.M2M100ForConditionalGeneration(config), tokenizer


def bart(texts, folder) -> Built:
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=special, show_progress=False)
    merges = [tuple(merge) for merge in json.loads(bpe._tokenizer.to_str())["model"]["merges"]]
    tokenizer = tf.BartTokenizer(vocab=bpe.get_vocab(), merges=merges)
    config = tf.BartConfig(**SIZES, vocab_size=len(tokenizer), decoder_start_token_id=2, forced_bos_token_id=0)
    return tf.BartForConditionalGeneration(config), tokenizer


def pegasus(texts, folder) -> Built:
    head = [("<pad>", 0.0), ("</s>", 0.0), ("<mask_1>", 0.0), ("<mask_2>", 0.0), ("<unk_2>", 0.0), ("<unk_3>", 0.0)]
    tokenizer = tf.PegasusTokenizer([*head, ("<unk>", 0.0), *pieces(spm(texts, folder))], offset=4)
    config = tf.PegasusConfig(**SIZES, vocab_size=len(tokenizer), forced_eos_token_id=1)
    return tf.PegasusForConditionalGeneration(config), tokenizer


def two_berts(texts, folder) -> Built:
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    wordpiece.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    tokenizer = tf.BertTokenizer(vocab=wordpiece.get_vocab(), do_lower_case=False)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**sizes), tf.BertConfig(**sizes))
    return tf.EncoderDecoderModel(config), tokenizer


BUILDERS: dict[str, Callable[[Iterable[str], Path], Built]] = {
    builder.__name__: builder
    for builder in (
        marian, multilingual_marian, fsmt, t5, mt5, mbart, mbart50, m2m100, nllb, bart, pegasus, two_berts,
    )
}  # fmt: skip


def save(name: str, texts: Iterable[str], folder: Path) -> Path:
    """A checkpoint of this name, as it could lie on the hub."""
    torch.manual_seed(0)
    folder.mkdir()
    made = folder / "made"
    made.mkdir()
    model, tokenizer = BUILDERS[name](list(texts), made)
    tokenizer.save_pretrained(folder / "checkpoint")
    model.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"
