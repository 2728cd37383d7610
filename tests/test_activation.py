"""``init="activation"``: on its own calibration no worse than spectral in any product, exact at full rank."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTModel,
)

import fnl_hf
from fnl_hf.cli import main
from fnl_hf.texts import encoded_texts, text_batches
from tests.families import build

CONFIG = {"target_modules": "all", "head_rank": 0.5, "rank": 0.3, "attention": ("qk", "ov")}


def narrow_data(model, count=6, length=12, seed=0):
    """Batches that use few tokens, so that their moments are far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 12, (4, length), generator=generator)} for _ in range(count)]


def outputs(model, batches, name):
    """What a module puts out on all batches, in one tensor."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    handle.remove()
    return torch.cat([out.flatten(0, -2) for out in seen])


def factorized(model, batches=None, **settings):
    init = "activation" if batches is not None else "spectral"
    return fnl_hf.factorize(copy.deepcopy(model), fnl_hf.FNLConfig(init=init, **settings), calibration=batches)


def errors(model, batches, name, **settings):
    """Mean squared errors of what a module puts out, factorized by the batches and spectral."""
    wanted = outputs(model, batches, name)
    for data in (batches, None):
        yield float((outputs(factorized(model, data, **settings), batches, name) - wanted).square().mean())


def bert(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes | settings))
    for parameter in model.parameters():  # spectra as trained ones have, biases that are no zeros
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        (
            {"attention": (), "target_modules": ["0.intermediate.dense"], "rank": 5},
            "bert.encoder.layer.0.intermediate.dense",
        ),
        ({"attention": (), "target_modules": ["0.output.dense"], "rank": 5}, "bert.encoder.layer.0.output.dense"),
        ({"attention": (), "target_modules": ["word_embeddings"], "rank": 5}, "bert.embeddings.word_embeddings"),
        ({"attention": ("layer.0.attention.ov",), "head_rank": 3}, "bert.encoder.layer.0.attention.output.dense"),
    ],
)
def test_what_a_layer_puts_out_is_nearer_than_spectral(settings, module):
    model, batches = bert(), narrow_data(None)
    by_data, spectral = errors(model, batches, module, **settings)
    assert by_data < 0.9 * spectral


def test_scores_are_nearer_than_spectral():
    model, batches = bert(), narrow_data(None)

    def scores(model):
        query, key = (outputs(model, batches, f"bert.encoder.layer.0.attention.self.{n}") for n in ("query", "key"))
        return torch.einsum("ihd,jhd->hij", query.unflatten(-1, (4, -1)), key.unflatten(-1, (4, -1)))

    wanted = scores(model)
    settings = {"attention": ("layer.0.attention.self.qk",), "head_rank": 3}
    errors = [float((scores(factorized(model, d, **settings)) - wanted).square().mean()) for d in (batches, None)]
    assert errors[0] < 0.9 * errors[1], errors


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5"])
def test_at_full_rank_nothing_changes(family):
    model, inputs = build(family)
    model = model.double().eval()
    with torch.no_grad():
        before = model(**inputs)[0]
        fnl_hf.factorize(model, fnl_hf.FNLConfig(init="activation"), calibration=[inputs])
        assert_close(model(**inputs)[0], before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5"])
def test_every_family_is_made_smaller_saved_and_loaded(family, tmp_path):
    model, inputs = build(family)
    model = fnl_hf.factorize(model.eval(), fnl_hf.FNLConfig(init="activation", **CONFIG), calibration=[inputs])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["init"] == "activation"


def test_grouped_heads_and_rotation():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    batches = narrow_data(None)
    small = factorized(model, batches, attention=("qk", "ov"), head_rank=4)
    ranks = {product.kind: product.size()[1] for product in fnl_hf.factorizations(small)}
    assert ranks == {"rotary-qk": 8, "ov": 4}
    name = "model.layers.0.self_attn.o_proj"
    wanted = outputs(model, batches, name)
    spectral = factorized(model, attention=("qk", "ov"), head_rank=4)
    errors = [float((outputs(m, batches, name) - wanted).square().mean()) for m in (small, spectral)]
    assert errors[0] < errors[1]


def test_convolutions_by_their_patches():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4), add_pooling_layer=False).eval()
    name = "embeddings.patch_embeddings.projection"
    nn.init.normal_(model.get_submodule(name).weight)
    smooth = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": nn.functional.interpolate(smooth, 16, mode="bilinear")}]
    settings = {"attention": (), "target_modules": ["projection"], "rank": 4}
    by_data, spectral = errors(model, batches, name, **settings)
    assert by_data < 0.9 * spectral


def test_what_ties_an_embedding_to_the_output_counts_both():
    model, batches = bert(), narrow_data(None)
    small = factorized(model, batches, attention=(), target_modules="all", rank=0.25)
    embedding, output = small.get_input_embeddings(), small.get_output_embeddings()
    assert embedding.stored("weight") is output.stored("weight")
    shown = torch.arange(3, 12)
    table = model.get_input_embeddings().weight
    spectral = factorized(model, attention=(), target_modules="all", rank=0.25).get_input_embeddings()
    errors = [float((e(shown) - table[shown]).square().mean().detach()) for e in (embedding, spectral)]
    assert errors[0] < errors[1]


def test_ranks_by_error_follow_the_data():
    model, batches = bert(), narrow_data(None)
    settings = {"target_ratio": 0.5, "rank_allocation": "error"}
    sizes = []
    for data in (batches, None):
        small = factorized(model, data, **settings)
        products = fnl_hf.factorizations(small)
        sizes.append({product.name: product.size()[1] for product in products})
        total = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        assert 0.4 < total <= 0.5
    assert sizes[0] != sizes[1]


def test_half_precision_and_what_no_batch_reaches(capsys):
    model, inputs = build("bert")
    model = model.bfloat16()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(init="activation", head_rank=0.5), calibration=[inputs])
    assert all(parameter.isfinite().all() and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    model, inputs = build("bart")
    model.forward = lambda input_ids: model.encoder(input_ids)
    batches = [{"input_ids": inputs["input_ids"]}]
    fnl_hf.factorize(model, fnl_hf.FNLConfig(init="activation", head_rank=0.5), calibration=batches, check=False)
    told = capsys.readouterr()
    assert "calibration does not reach decoder.layers.0" in told.out + told.err


# -- texts, and the command line ------------------------------------------------------------------------


def test_texts_become_batches(tmp_path):
    model, tokenizer = bert(), tiny_tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("a b c\n\nb c\n")
    (tmp_path / "a.jsonl").write_text('{"question": "a b", "context": "c", "id": 3}\n')
    (tmp_path / "a.tsv").write_text("a b\tc\t0.5\n")
    (lines,) = text_batches(tmp_path / "a.txt", tokenizer, model)
    assert lines["input_ids"].shape[0] == 2 and lines["attention_mask"].sum(1).tolist() == [4, 5]
    (pair,) = text_batches(tmp_path / "a.jsonl", tokenizer, model)
    (other,) = text_batches(tmp_path / "a.tsv", tokenizer, model)
    assert torch.equal(pair["input_ids"], other["input_ids"]) and pair["token_type_ids"].any()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"n": 3}\n')
    for name, message in (("empty.txt", "holds no texts"), ("bad.jsonl", "line 1: has no text under any name, only n")):
        with pytest.raises(ValueError, match=message):
            text_batches(tmp_path / name, tokenizer, model)


def test_tables_give_their_texts_and_no_labels(tmp_path):
    model, tokenizer = bert(), tiny_tokenizer(tmp_path)
    pair = [["a b", "c"], ["d", "e f"]]
    tables = {
        "rte.tsv": ("index\tsentence1\tsentence2\tlabel\n0\ta b\tc\tyes\n1\td\te f\tno\n", pair),
        "plain.tsv": ("0\ta b\tc\t1.5\n1\td\te f\t2\n", pair),
        "sst.tsv": ("sentence\tlabel\na b\t1\nd\t0\n", [["a b"], ["d"]]),
        "other.tsv": ("review\tstars\na b\t1\nd\t0\n", [["review"], ["a b"], ["d"]]),
        "scored.csv": ('"a b",c,5.0\nd,"e f",0\n', pair),
        "quotes.tsv": ('"a b\tc\nd\te f\n', [['"a b', "c"], ["d", "e f"]]),
    }
    for name, (text, texts) in tables.items():
        (tmp_path / name).write_text(text)
        given = sorted(row["input_ids"] for row in encoded_texts(tmp_path / name, tokenizer, model))
        assert given == sorted(tokenizer(*row)["input_ids"] for row in texts), name
    (chosen,) = encoded_texts(tmp_path / "rte.tsv", tokenizer, model, samples=1, fields=["sentence2"])
    assert chosen["input_ids"] in [tokenizer(text)["input_ids"] for text in ("c", "e f")]
    with pytest.raises(ValueError, match="has no column 'text', only 'sentence', 'label'"):
        encoded_texts(tmp_path / "sst.tsv", tokenizer, model, fields=["text"])


def test_calibrating_leaves_tokenizer_and_config_as_they_are(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    config.pad_token_id = None
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    (tmp_path / "a.txt").write_text("a b c\nb c\n")
    lm = LlamaForCausalLM(config)
    (batch,) = text_batches(tmp_path / "a.txt", tokenizer, lm)
    assert batch["attention_mask"].sum(1).tolist() == [4, 5]
    assert tokenizer.pad_token is None and lm.config.pad_token_id is None
    classifier = LlamaForSequenceClassification(config)
    text_batches(tmp_path / "a.txt", tokenizer, classifier)
    classifier(**{name: batch[name] for name in ("input_ids", "attention_mask")})  # which takes no batch without it


def tiny_tokenizer(path):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl"]
    (path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(path / "vocab.txt"))


def test_the_command_takes_a_file_of_texts(tmp_path, capsys):
    model = bert()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path).save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a b c d e\nb c a\n" * 20)
    command = ["factorize", str(tmp_path / "model"), str(tmp_path / "out"), "--head_rank", "0.5"]
    assert main([*command, "--init", "activation"]) == 2
    assert "--init activation looks at data: give --calibration FILE" in capsys.readouterr().err
    assert main([*command, "--calibration", str(tmp_path / "texts.txt")]) == 2
    assert "--calibration is for --init activation or functional, not spectral" in capsys.readouterr().err
    assert main([*command, "--init", "activation", "--calibration", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--init", "activation", "--calibration", str(tmp_path / "texts.txt")]) == 0
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert {product.size()[1] for product in fnl_hf.factorizations(loaded)} == {4}
