"""The trainers: decay where it belongs, the same update under accumulation, clear errors at start."""

import copy
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import fnl_hf
from fnl_hf.rules import FrobeniusDecay
from tests.families import BART, BERT

TOKENS = [3, 9, 2, 7, 5, 4, 8, 6]  # labels per example: unequal on purpose


def examples(model_type):
    torch.manual_seed(3)
    rows = []
    for count in TOKENS:
        ids = torch.randint(5, 50, (10,))
        labels = torch.full((10,), -100)
        labels[1 : 1 + count] = torch.randint(5, 50, (count,))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if model_type in ("marian", "bart", "t5"):
            row["decoder_input_ids"] = torch.randint(5, 50, (10,))
        rows.append(row)
    return rows


def make_model(model_type):
    torch.manual_seed(0)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    if model_type == "bert":
        config = tf.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return tf.BertForMaskedLM(config)
    if model_type == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                n_embd=32,
                n_layer=2,
                n_head=4,
                vocab_size=50,
                bos_token_id=0,
                eos_token_id=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )  # fmt: skip
        )
    if model_type == "t5":
        return tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, vocab_size=50, dropout_rate=0.0)
        )
    cls, config = (
        (tf.MarianMTModel, tf.MarianConfig)
        if model_type == "marian"
        else (tf.BartForConditionalGeneration, tf.BartConfig)
    )
    return cls(config(**BART, **quiet))


def train(model, tmp_path, rows, **arguments):
    arguments = {
        "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, **arguments,
    }  # fmt: skip
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **arguments)
    trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows)
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        rows, batch_size=args.per_device_train_batch_size, collate_fn=trainer.data_collator
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("model_type", ["marian", "bart", "t5", "bert", "gpt2"])
def test_accumulation_gives_the_same_update(model_type, smoothing, tmp_path):
    start = fnl_hf.factorize(
        make_model(model_type), fnl_hf.FNLConfig()
    ).double()  # so that p - q is exact; models compute losses in float32
    rows, results = examples(model_type), []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        model = copy.deepcopy(start)
        train(
            model, tmp_path, rows, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            frobenius_decay=0.05, label_smoothing_factor=smoothing,
        )  # fmt: skip
        results.append(
            {n: p.detach() - q.detach() for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True)}
        )
    scale = max(update.norm() for update in results[0].values())
    for other in results[1:]:
        for name, update in results[0].items():
            assert (update - other[name]).norm() < 1e-6 * scale, name


def test_the_step_is_loss_gradient_plus_decay(tmp_path):
    """One SGD step against a hand-made one: mean over all labels, plus λ times the dense penalty's gradient."""
    start = fnl_hf.factorize(make_model("marian"), fnl_hf.FNLConfig())
    rows = examples("marian")
    by_hand = copy.deepcopy(start)
    batch = tf.default_data_collator(rows)
    loss = by_hand(**batch).loss
    penalty = sum(f.matrix().square().sum() for f in fnl_hf.factorizations(by_hand)) / 2
    (loss + 0.05 * penalty).backward()
    model = copy.deepcopy(start)
    train(model, tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, frobenius_decay=0.05)
    for (name, p), q, s in zip(model.named_parameters(), by_hand.parameters(), start.parameters(), strict=True):
        if q.grad is not None:
            assert_close(p.detach() - s.detach(), -0.1 * q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_coupled_decay_is_inside_the_clip(tmp_path):
    start = fnl_hf.factorize(make_model("marian"), fnl_hf.FNLConfig())
    model = copy.deepcopy(start)
    train(model, tmp_path, examples("marian"), frobenius_decay=10.0, max_grad_norm=0.5)
    update = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
    assert update.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_auto_decouples_adamw(tmp_path):
    """AdamW's own step does not see the decay: the difference of two runs is the decoupled term alone."""
    start = fnl_hf.factorize(
        make_model("bert"), fnl_hf.FNLConfig()
    ).double()  # so that p - q is exact; models compute losses in float32
    rows, models = examples("bert"), []
    for decay in (0.0, 0.5):
        model = copy.deepcopy(start)
        train(model, tmp_path, rows, optim="adamw_torch", learning_rate=1e-3, frobenius_decay=decay)
        models.append(model)
    expected = {id(p): torch.zeros_like(p) for p in start.parameters()}
    for product in fnl_hf.factorizations(start):
        for view, gradient in product.decay_gradients():
            view.read(expected[id(view.parameter)]).sub_(gradient, alpha=1e-3 * 0.5)
    for s, plain, decayed in zip(start.parameters(), *(m.parameters() for m in models), strict=True):
        assert_close(decayed.detach() - plain.detach(), expected[id(s)], rtol=1e-6, atol=1e-12)


def test_two_decays_never_hit_one_parameter(tmp_path, capsys):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    trainer = train(model, tmp_path, examples("bert"), weight_decay=0.01, frobenius_decay=0.1)
    covered = {p for f in fnl_hf.factorizations(model) for p in f.parameters()}
    groups = [(group["weight_decay"], set(group["params"])) for group in trainer.optimizer.optimizer.param_groups]
    assert all(not covered & params for decay, params in groups if decay)
    assert model.bert.embeddings.word_embeddings.weight in groups[0][1] and groups[0][0] == 0.01
    printed = [line.split() for line in capsys.readouterr().err.splitlines()]
    others = groups[0][1]
    assert ["L2", "0.01", str(len(others)), f"{sum(p.numel() for p in others):,}"] in printed
    assert ["Frobenius,", "coupled", "0.1", "2", "qk", "4", "4,096"] in printed
    assert ["Frobenius,", "coupled", "0.1", "2", "ov", "4", "4,096"] in printed


def test_frobenius_decay_defaults_to_the_weight_decay(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    assert train(model, tmp_path, examples("bert"), weight_decay=0.03).frobenius_coefficient == 0.03


def test_zero_frobenius_decay_leaves_weight_decay_everywhere(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    trainer = train(model, tmp_path, examples("bert"), weight_decay=0.01, frobenius_decay=0.0)
    (decayed, _) = trainer.optimizer.optimizer.param_groups
    assert {p for f in fnl_hf.factorizations(model) for p in f.parameters()} <= set(decayed["params"])


def test_nothing_decays_is_a_warning_that_names_the_argument(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    with pytest.warns(UserWarning, match="set frobenius_decay"):
        train(model, tmp_path, examples("bert"))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_bad_coefficient_is_refused_by_the_arguments(value, tmp_path):
    with pytest.raises(ValueError, match="frobenius_decay is"):
        fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), frobenius_decay=value)


def test_decay_without_a_factorization_is_refused(tmp_path):
    with pytest.raises(ValueError, match="call fnl_hf.factorize"):
        train(make_model("bert"), tmp_path, examples("bert"), frobenius_decay=0.1)


def test_a_users_optimizer_with_weight_decay_on_factors_is_refused(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    args = fnl_hf.FNLTrainingArguments(
        output_dir=str(tmp_path), frobenius_decay=0.1, use_cpu=True, report_to="none", max_steps=1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=examples("bert"), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="two decays must not hit one parameter"):
        trainer.train()


def test_resumed_equals_uninterrupted(tmp_path):
    start = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    rows = examples("bert")
    common = {
        "optim": "adamw_torch", "learning_rate": 1e-3, "frobenius_decay": 0.3, "weight_decay": 0.1,
        "per_device_train_batch_size": 4, "lr_scheduler_type": "linear",
    }  # fmt: skip
    whole = copy.deepcopy(start)
    train(whole, tmp_path / "a", rows, max_steps=6, **common)
    first = copy.deepcopy(start)
    args = fnl_hf.FNLTrainingArguments(
        output_dir=str(tmp_path / "b"), max_steps=6, save_steps=3, use_cpu=True, report_to="none", disable_tqdm=True,
        max_grad_norm=0.0, **common,
    )  # fmt: skip
    for model, resume in ((first, None), (copy.deepcopy(start), str(tmp_path / "b" / "checkpoint-3"))):
        trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows)
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            rows, batch_size=4, collate_fn=tf.default_data_collator
        )
        trainer.train(resume_from_checkpoint=resume)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "mode", "said"),
    [
        ({"fnl_optim": "lamb"}, "auto", "Frobenius, decoupled"),
        ({"fnl_optim": "lamb"}, "coupled", "Frobenius, coupled"),
        ({"fnl_optim": "nag", "optim_args": "momentum=0.9"}, "auto", "Frobenius, coupled"),
        ({"optim": "adafactor"}, "auto", "Frobenius, decoupled"),
        ({"optim": "adamw_torch_fused"}, "auto", "Frobenius, decoupled"),
        ({"optim": "rmsprop"}, "auto", "Frobenius, decoupled"),
        ({"optim": "adagrad"}, "auto", "Frobenius, decoupled"),
        ({"optim": "sgd"}, "decoupled", "Frobenius, decoupled"),
    ],
)
def test_products_shrink_under_every_optimizer_when_the_data_says_nothing(optimizer, mode, said, tmp_path, capsys):
    """With a loss that does not depend on the factors, a step of decay lowers every product's norm."""
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    for parameter in model.bert.encoder.parameters():
        parameter.data.mul_(3)  # norms worth decaying
    norms = [f.squared_norm().item() for f in fnl_hf.factorizations(model)]
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in examples("bert")]
    train(model, tmp_path, rows, learning_rate=1e-2, frobenius_decay=0.1, frobenius_decay_mode=mode, **optimizer)
    assert said in capsys.readouterr().err
    for before, product in zip(norms, fnl_hf.factorizations(model), strict=True):
        assert product.squared_norm().item() < before


@pytest.mark.parametrize(("schedule", "share"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_the_schedule_scales_the_coefficient(schedule, share, tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    trainer = train(model, tmp_path, examples("bert"), frobenius_decay=0.2, frobenius_decay_schedule=schedule)
    trainer.state.global_step, trainer.state.max_steps = 5, 10
    (decay,) = (rule for rule in trainer.rules if isinstance(rule, FrobeniusDecay))
    assert decay.coefficient_now() == pytest.approx(0.2 * share)


def test_plain_training_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="expected FNLTrainingArguments"):
        fnl_hf.FNLTrainer(
            model=make_model("bert"), args=tf.TrainingArguments(output_dir=str(tmp_path), report_to="none")
        )


@pytest.mark.parametrize("factorized", [False, True])
def test_older_names_of_weights_survive_resuming_and_loading_the_best(factorized, tmp_path):
    """As in bert-base-uncased, whose LayerNorms are called gamma and beta."""
    make_model("bert").save_pretrained(tmp_path / "new")
    weights = load_file(tmp_path / "new" / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    save_file(older, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}

    def trainer(out, **more):
        model = tf.BertForMaskedLM.from_pretrained(tmp_path / "old")
        if factorized:
            fnl_hf.factorize(model)
        args = fnl_hf.FNLTrainingArguments(
            str(tmp_path / out),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            frobenius_decay=0.0,
            **options,
            **more,
        )
        return fnl_hf.FNLTrainer(model, args, train_dataset=examples("bert"), eval_dataset=examples("bert"))

    whole = trainer("out")
    whole.train()
    resumed = trainer("out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_close(dict(resumed.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0)
    resumed.save_model()  # as everywhere, under the names that it came with
    assert any("gamma" in name for name in load_file(tmp_path / "out" / "model.safetensors"))

    best = trainer("best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    best.train()
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = fnl_hf.factorize(make_model("bert"))
    trainer = train(model, tmp_path, examples("bert"), frobenius_decay=0.1)
    trainer.log({"loss": 1.0})
    assert "fnl/nuclear_norm" in trainer.state.log_history[-1]
    with torch.no_grad():
        fnl_hf.factorizations(model)[0].factors()[0].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"weights of bert\S+ are not finite at step 1: training has diverged"):
        trainer.log({"loss": float("nan")})
