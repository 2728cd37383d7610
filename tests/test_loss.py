"""One batch of 8, four of 2 and two of 4 make the same update, whatever the loss of a model is a mean over."""

import contextlib
import copy

import pytest
import torch
import transformers as tf
from torch import nn

from fnl_hf.loss import LabelCount
from scripts.coverage.building import NotBuilt
from scripts.coverage.losses import EXACT, classes, examine
from tests.families import BART, BERT
from tests.test_trainer import TOKENS, train

SHORT = {k: BERT[k] for k in list(BERT)[:5]}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BART_QUIET = BART | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
GPT2 = {
    "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
SPEECH = {
    **{k: BERT[k] for k in list(BERT)[:4]}, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4),
    "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 4, "vocab_size": 20, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip
SEGFORMER = {
    "depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 16], "num_attention_heads": [2, 2],
    "sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [1, 1], "decoder_hidden_size": 16,
    "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}  # fmt: skip

# what is trained -> (class, config, kind of rows, the loss is float64)
LOSSES = {
    "causal, unknown name": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(**GPT2), "tokens", True),
    "causal, unknown name, bert": (
        tf.BertLMHeadModel, lambda: tf.BertConfig(**BERT, **QUIET, is_decoder=True), "tokens", True,
    ),
    "causal": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**SHORT), "tokens", True),
    "called causal, unshifted": (tf.BartForCausalLM, lambda: tf.BartConfig(**BART_QUIET), "tokens", True),
    "called causal, unshifted, trocr": (
        tf.TrOCRForCausalLM, lambda: tf.TrOCRConfig(**{k: v for k, v in BART_QUIET.items() if "encoder" not in k}),
        "tokens", True,
    ),
    "masked": (tf.BertForMaskedLM, lambda: tf.BertConfig(**BERT, **QUIET), "tokens", True),
    "sequence to sequence": (tf.MarianMTModel, lambda: tf.MarianConfig(**BART_QUIET), "pairs", True),
    "sequence to sequence, t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, vocab_size=50, dropout_rate=0.0),
        "pairs", True,
    ),
    "classes of tokens": (tf.BertForTokenClassification, lambda: tf.BertConfig(**BERT, **QUIET), "classes", True),
    "classes of rows": (tf.BertForSequenceClassification, lambda: tf.BertConfig(**BERT, **QUIET), "row", True),
    "numbers": (
        tf.BertForSequenceClassification, lambda: tf.BertConfig(**BERT, **QUIET, num_labels=1), "number", True,
    ),
    "answers": (tf.BertForQuestionAnswering, lambda: tf.BertConfig(**BERT, **QUIET), "answer", True),
    "spoken, a mean": (
        tf.Wav2Vec2ForCTC, lambda: tf.Wav2Vec2Config(**SPEECH, ctc_loss_reduction="mean"), "speech", False,
    ),
    "spoken, a sum": (
        tf.Wav2Vec2ForCTC, lambda: tf.Wav2Vec2Config(**SPEECH, ctc_loss_reduction="sum"), "speech", False,
    ),
    "pixels": (tf.SegformerForSemanticSegmentation, lambda: tf.SegformerConfig(**SEGFORMER), "pixels", True),
}  # fmt: skip


def rows_of(kind):
    """Eight rows with unequal numbers of labels; the first label of some is one."""
    torch.manual_seed(3)
    rows = []
    for row, count in enumerate(TOKENS):
        ids = torch.randint(5, 50, (10,))
        labels = torch.full((10,), -100)
        start = 0 if row % 3 else 1
        labels[start : start + count] = torch.randint(5, 50, (count,)) if kind != "classes" else row % 2
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if kind == "pairs":
            made["decoder_input_ids"] = torch.randint(5, 50, (10,))
        elif kind in ("row", "number"):
            made["labels"] = torch.tensor(row % 2) if kind == "row" else torch.tensor(row / 3, dtype=torch.float64)
        elif kind == "answer":
            del made["labels"]
            made |= {"start_positions": torch.tensor(row % 5), "end_positions": torch.tensor(5 + row % 3)}
        elif kind == "speech":
            said = torch.where(torch.arange(10) < count, torch.randint(1, 20, (10,)), -100)
            made = {"input_values": torch.randn(600, dtype=torch.float64), "labels": said}
        elif kind == "pixels":
            drawn = torch.randint(0, 3, (16, 16))
            drawn[count:] = 255  # what of an image does not count
            made = {"pixel_values": torch.randn(3, 16, 16, dtype=torch.float64), "labels": drawn}
        rows.append(made)
    return rows


@pytest.fixture
def float64(monkeypatch):
    """Loss functions cast to float32 by ``.float()``, where the last digits would hide what is asked here."""
    cast = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype is torch.float64 else cast(x))


def updates(start, rows, tmp_path, **arguments):
    """What one step changes, for 1 x 8, 4 x 2, 2 x 4 and 8 x 1."""
    found = []
    for batch, accumulate in ((8, 1), (2, 4), (4, 2), (1, 8)):
        model = copy.deepcopy(start)
        train(
            model, tmp_path, rows, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            frobenius_decay=0.0, **arguments,
        )  # fmt: skip
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        found.append(torch.cat([(p - q).detach().flatten() for p, q in pairs]))
    assert found[0].norm() > 0
    return found


def assert_equal(found, tolerance=1e-10):
    for other in found[1:]:
        assert (other - found[0]).norm() < tolerance * found[0].norm()


@pytest.mark.parametrize("what", LOSSES)
def test_how_rows_are_batched_changes_nothing(what, tmp_path, float64):
    cls, config, kind, exact = LOSSES[what]
    torch.manual_seed(0)
    start = cls(config()).double()
    if kind == "pixels":
        start.decode_head.batch_norm = nn.Identity()  # which couples the rows of a batch
    assert_equal(updates(start, rows_of(kind), tmp_path), 1e-10 if exact else 1e-5)


@pytest.mark.parametrize("what", ["causal, unknown name", "called causal, unshifted", "masked", "sequence to sequence"])
def test_nor_does_it_under_label_smoothing(what, tmp_path, float64):
    """Which the Trainer computes, and shifts labels by the name of the class."""
    cls, config, kind, _ = LOSSES[what]
    torch.manual_seed(0)
    # The smoother sums its uniform part in float32 by its own choice.
    assert_equal(updates(cls(config()).double(), rows_of(kind), tmp_path, label_smoothing_factor=0.1), 1e-6)


def test_a_step_is_the_mean_over_all_labels(tmp_path, float64):
    """And not only the same for every split: against one backward of the model's own loss of all rows."""
    torch.manual_seed(0)
    start, rows = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)).double(), rows_of("tokens")
    by_hand = copy.deepcopy(start)
    by_hand(**tf.default_data_collator(rows)).loss.backward()
    expected = torch.cat([-0.1 * p.grad.flatten() for p in by_hand.parameters()])
    for update in updates(start, rows, tmp_path):
        assert (update - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_adapters_are_looked_at_with_what_they_add(kind, tmp_path, float64):
    """A prompt stands before the first label, which counts then, although the loss is causal."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))
    if kind == "lora":
        adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    else:
        adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model, adapter).double()
    assert_equal(updates(model, rows_of("tokens"), tmp_path))


@pytest.mark.slow
def test_a_compiled_model_is_looked_at_as_it_is(tmp_path, float64):
    torch.manual_seed(0)
    start = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)).double()
    eager = updates(start, rows_of("tokens"), tmp_path)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert_equal([eager[0], *updates(start, rows_of("tokens"), tmp_path, **options)])


def test_a_batch_without_labels_adds_nothing(tmp_path, float64):
    torch.manual_seed(0)
    start, rows = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)).double(), rows_of("tokens")
    for row in rows[:3]:
        row["labels"] = torch.where(torch.arange(10) < 1, 7, -100)  # the one label of a row is void
    assert_equal(updates(start, rows, tmp_path))


def test_labels_that_come_shifted_are_counted_as_they_are(tmp_path, float64):
    torch.manual_seed(0)
    start, rows = tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)).double(), rows_of("tokens")
    for row in rows:
        row["shift_labels"] = torch.where(row["labels"] == -100, -100, row["input_ids"])
    assert_equal(updates(start, rows, tmp_path))


# -- how labels are counted --------------------------------------------------------------------------


class Toy(nn.Module):
    """A mean over labels, shifted or not, with what makes measuring hard."""

    def __init__(self, shift, extra=0.0, raises=False, blind=False):
        super().__init__()
        self.embed, self.dropout, self.logits = nn.Embedding(50, 8), nn.Dropout(0.5), nn.Linear(8, 50)
        nn.init.zeros_(self.logits.weight)  # all labels are as likely: to change one changes nothing
        nn.init.zeros_(self.logits.bias)
        self.shift, self.extra, self.raises, self.blind, self.calls = shift, extra, raises, blind, 0

    def forward(self, input_ids, labels):
        self.calls += 1
        assert not self.training
        logits = self.logits(self.dropout(self.embed(input_ids)))
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != -100
        if self.raises and kept.sum() < 3:
            raise RuntimeError("too few labels")
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        mean = loss / (kept.sum().clamp_min(1) if self.extra else kept.sum())
        return {"loss": mean * torch.nan if self.blind else mean + self.extra}


BATCH = {
    "input_ids": torch.randint(5, 50, (3, 6), generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([[7, 8, 9, -100, -100, -100], [-100, 8, -100, 9, 4, 5], [3, -100, -100, -100, -100, -100]]),
}


def count(model, batch=BATCH, **settings):
    counter = LabelCount(model, **settings)
    if not counter.knows(batch):
        counter.learn(batch)
    assert counter.knows(batch)
    return counter.of(batch).item()


@pytest.mark.parametrize("extra", [0.0, 0.3])
def test_it_is_measured_on_a_model_of_any_kind(extra):
    """With logits that know nothing, and terms beside that are there without labels, too."""
    assert count(Toy(True, extra)) == 6 and count(Toy(False, extra)) == 8


def test_measuring_leaves_no_trace():
    model = Toy(True)
    model.train()
    model.dropout.eval()
    state = torch.get_rng_state()
    assert count(model) == 6 and model.calls == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.dropout.training and all(p.grad is None for p in model.parameters())


def test_where_it_cannot_be_measured_the_class_decides():
    for model in (Toy(True, raises=True), Toy(True, blind=True)):
        assert count(model) == 8  # no class of transformers: nothing says that it shifts
        model.loss_function = tf.loss.loss_utils.ForCausalLMLoss
        assert count(model) == 6


def test_what_needs_no_measuring():
    model = Toy(True)
    assert count(model, BATCH | {"labels": torch.tensor([1, 0, -100])}) == 2
    assert count(model, BATCH | {"labels": torch.zeros(3, 4)}) == 12
    assert count(model, {"input_ids": BATCH["input_ids"], "start_positions": torch.tensor([0, 5, 6])}) == 2
    assert count(model, smoothed=True) == 6 and count(model, smoothed=False) == 8
    model.loss_type = "ForMaskedLM"
    assert count(model) == 8 and model.calls == 0
    model._loss_function = None  # a loss of the user's own
    assert count(model) == 6


def test_padding_does_not_hide_the_first_label():
    class Masks(Toy):
        def forward(self, input_ids, labels, attention_mask):
            return super().forward(input_ids, labels.where(attention_mask.bool(), -100))

    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).repeat(3, 1)
    assert count(Masks(False), BATCH | {"attention_mask": mask}) == 8


FAMILIES = [
    "bart", "bert", "bloom", "ctrl", "falcon", "gemma", "git", "gpt2", "gptj", "llama", "mamba", "marian", "mixtral",
    "musicgen", "openai-gpt", "opt", "prophetnet", "qwen2", "reformer", "rwkv", "t5gemma", "trocr", "xlnet",
]  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) & classes("CAUSAL_LM").keys()))
def test_causal_classes_of_transformers(model_type):
    row = examine(model_type, "CAUSAL_LM")
    assert row["off"] < EXACT[row["dtype"]], row


@pytest.mark.slow
def test_every_causal_class_of_transformers():
    """All that can be built tiny; `python -m scripts.coverage.losses` does other tasks, too."""
    wrong, built, differ = [], 0, set()
    for model_type in classes("CAUSAL_LM"):
        with contextlib.suppress(NotBuilt):
            row = examine(model_type, "CAUSAL_LM")
            built += 1
            if not row["off"] < EXACT[row["dtype"]]:
                wrong.append(row)
            if row["off by transformers' count"] > 1e-3:
                differ.add(row["class"])
    assert not wrong and built >= 0.95 * len(classes("CAUSAL_LM"))
    assert {"GPT2LMHeadModel", "BertLMHeadModel", "OpenAIGPTLMHeadModel"} <= differ  # why it is measured
