"""Learning from a teacher: what is compared, what is counted, and that steps do not depend on how they are split."""

import copy

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from torch.testing import assert_close

import fnl_hf
from fnl_hf.distillation import Teacher
from tests.families import BERT, build

CONFIG = {"head_rank": 0.5, "target_modules": "all-linear", "rank": 0.4}


def bert(kind=tf.BertForMaskedLM, **settings):
    torch.manual_seed(0)
    return kind(tf.BertConfig(**BERT, **settings)).eval()


def small(model):
    return fnl_hf.factorize(copy.deepcopy(model), fnl_hf.FNLConfig(**CONFIG))


def texts(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 50, (length,), generator=generator)} for length in lengths]


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return batch | ({"labels": torch.stack([row["labels"] for row in rows])} if "labels" in rows[0] else {})


def summed(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def trained(model, teacher, tmp_path, rows=None, steps=3, loss=None, **settings):
    options = {"max_steps": steps, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "use_cpu": True}
    options |= {"per_device_train_batch_size": 8, "label_names": [], "remove_unused_columns": False}
    args = fnl_hf.FNLTrainingArguments(str(tmp_path), **options | settings)
    trainer = fnl_hf.FNLTrainer(
        model, args, collate, train_dataset=rows or texts(), teacher=teacher, compute_loss_func=loss
    )
    trainer.train()
    return trainer


# -- what is compared --------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [5, 6])
def test_labels_are_no_positions_however_many_there_are(labels):
    """Texts padded to as many tokens as there are labels."""
    model = bert(tf.BertForSequenceClassification, num_labels=labels, problem_type="multi_label_classification")
    student, teacher = copy.deepcopy(model), Teacher(model)
    torch.nn.init.normal_(student.classifier.weight)
    ids = torch.randint(3, 50, (4, 4))
    losses = []
    for length in (4, 5, 6, 7):
        padded = F.pad(ids, (0, length - 4))
        batch = {"input_ids": padded, "attention_mask": (padded != 0).long()}
        with torch.no_grad():
            losses.append(float(teacher.loss(student(**batch), batch)))
    assert_close(losses, losses[:1] * 4, rtol=1e-5, atol=0)
    assert losses[0] > 0


def test_padding_that_no_mask_shows_is_refused():
    """Of sounds, frames are fewer than what the mask is of."""
    config = tf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=12,
        conv_dim=(8,), conv_kernel=(4,), conv_stride=(2,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    for kind in (tf.Wav2Vec2ForCTC, tf.Wav2Vec2Model):
        model = kind(config).eval()
        batch = {"input_values": torch.randn(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
        teacher = Teacher(model)
        assert float(teacher.loss(teacher.outputs(batch), batch)) < 1e-6
        batch["attention_mask"][0, 20:] = 0
        with pytest.raises(ValueError, match=r"the attention mask \(2, 40\), so padding cannot be left out"):
            teacher.loss(teacher.outputs(batch), batch)


def test_outputs_without_names_are_refused():
    model = bert()
    model.config.return_dict = False
    with pytest.raises(ValueError, match="BertForMaskedLM gives a tuple.*set return_dict to True"):
        Teacher(model).outputs(collate(texts(2)))


def test_logits_are_compared_where_nothing_is_padded():
    model, batch = bert(), collate(texts(4))
    student, teacher = small(model), Teacher(model, temperature=2.0)
    with torch.no_grad():
        loss = teacher.loss(student(**batch), batch)
        kept = batch["attention_mask"].bool()
        p = F.log_softmax(model(**batch).logits[kept] / 2, -1)
        q = F.log_softmax(student(**batch).logits[kept] / 2, -1)
    assert_close(loss, 4 * (p.exp() * (p - q)).sum(-1).mean())
    assert int(teacher.count(batch)) == int(kept.sum())
    assert float(teacher.loss(model(**batch), batch)) == pytest.approx(0, abs=1e-6)


def test_hidden_states_and_their_means_where_there_is_no_head():
    model, batch = bert(tf.BertModel), collate(texts(4))
    student, teacher = small(model), Teacher(model)
    with torch.no_grad():
        loss = teacher.loss(student(**batch), batch)
        given, wanted = student(**batch).last_hidden_state, model(**batch).last_hidden_state
    of_positions, of_texts, lengths = [], [], batch["attention_mask"].sum(1).tolist()
    for row, length in enumerate(lengths):
        s, t = given[row, :length], wanted[row, :length]
        of_positions += [(s - t).square().sum(-1) / t.square().sum(-1)]
        of_texts += [length * (s.mean(0) - t.mean(0)).square().sum() / t.mean(0).square().sum()]
    assert_close(loss, (torch.cat(of_positions).sum() + sum(of_texts)) / sum(lengths))


@pytest.mark.parametrize(
    ("kind", "settings", "rows"),
    [
        (tf.BertForSequenceClassification, {"num_labels": 3}, True),
        (tf.BertForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}, True),
        (tf.BertForTokenClassification, {"num_labels": 3}, False),
        (tf.BertForQuestionAnswering, {}, True),
        (tf.BertForSequenceClassification, {"num_labels": 3, "problem_type": "multi_label_classification"}, True),
    ],
)
def test_other_heads(kind, settings, rows):
    model, batch = bert(kind, **settings), collate(texts(4))
    teacher, student = Teacher(model), small(model)
    loss = teacher.loss(student(**batch), batch)
    assert 0 < float(loss) < 10 and loss.requires_grad
    assert int(teacher.count(batch)) == (4 if rows else int(batch["attention_mask"].sum()))
    assert float(teacher.loss(model(**batch), batch)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["bart", "t5", "gpt2"])
def test_of_translations_the_target_counts(family):
    model, inputs = build(family)
    model = {"bart": tf.BartForConditionalGeneration, "t5": tf.T5ForConditionalGeneration}.get(
        family, tf.GPT2LMHeadModel
    )(model.config).eval()
    teacher = Teacher(model)
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    assert int(teacher.count(inputs)) == ids.numel()
    assert float(teacher.loss(small(model)(**inputs), inputs)) > 0
    if family != "gpt2":
        labels = ids.clone()
        labels[0, -1] = -100
        assert int(teacher.count({"input_ids": inputs["input_ids"], "labels": labels})) == ids.numel() - 1


def test_other_shapes_are_refused():
    model, batch = bert(), collate(texts(4))
    other = tf.BertForMaskedLM(tf.BertConfig(**{**BERT, "vocab_size": 60}))
    with pytest.raises(ValueError, match="the teacher's logits have the shape .*50.*the student's .*60"):
        Teacher(model).loss(other(**batch), batch)


def electra():
    torch.manual_seed(0)
    return tf.ElectraForPreTraining(tf.ElectraConfig(**BERT, embedding_size=24)).eval()


def shifted(model, bias):
    """A copy whose last bias differs: what it says differs, though softmax over the wrong things would not see it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        [module for module in other.modules() if getattr(module, "bias", None) is not None][-1].bias.add_(bias)
    return other


def test_yes_or_no_is_no_choice_among_positions_or_labels():
    """ELECTRA's discriminator, several labels, and pixels whose classes are channels."""
    batch = collate(texts(4))
    labels = bert(tf.BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    for model in (electra(), labels):
        assert float(Teacher(model).loss(shifted(model, 5.0)(**batch), batch)) > 0.5
    teacher = Teacher(bert(tf.BertForSequenceClassification, num_labels=3))
    pixels = {"logits": torch.randn(2, 5, 4, 6)}
    teacher._rows = True
    assert float(teacher.distance({"logits": pixels["logits"] + torch.randn(2, 1, 4, 6)}, pixels, batch)) < 1e-5
    assert float(teacher.distance({"logits": pixels["logits"] + torch.randn(2, 5, 1, 1)}, pixels, batch)) > 0.1


@pytest.mark.parametrize("kind", ["qa", "electra", "bart"])
def test_what_stands_under_padding_does_not_count(kind):
    batch = collate(texts(4))
    if kind == "bart":
        torch.manual_seed(0)
        model = tf.BartForConditionalGeneration(build("bart")[0].config).eval()
        batch = {name: value[:, :9] for name, value in batch.items()}
    else:
        model = electra() if kind == "electra" else bert(tf.BertForQuestionAnswering)
    student, teacher, losses = small(model), Teacher(model), []
    for filler in (0, 7):
        ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], filler)
        losses.append(float(teacher.loss(student(**batch | {"input_ids": ids}), batch | {"input_ids": ids}).detach()))
    assert losses[0] > 0 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_split_does_not_count_texts_as_much_as_tokens():
    model = bert(tf.BertForPreTraining)
    student, teacher = small(model), Teacher(model)
    rows = [{"input_ids": torch.arange(5, 12)}, {"input_ids": torch.arange(7, 9)}]
    whole, *parts = (collate(part) for part in (rows, rows[:1], rows[1:]))
    counts = [int(teacher.count(part)) for part in parts]
    with torch.no_grad():
        halves = [float(teacher.loss(student(**part), part)) * n for part, n in zip(parts, counts, strict=True)]
        assert float(teacher.loss(student(**whole), whole)) == pytest.approx(sum(halves) / sum(counts), rel=1e-4)


def test_the_teacher_keeps_its_mode():
    model, batch = bert().train(), collate(texts(4))
    Teacher(model).outputs(batch)
    assert model.training


# -- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tf.BertForMaskedLM, tf.BertModel])
def test_it_learns_without_labels(kind, tmp_path):
    model = bert(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = small(model)
    trainer = trained(student, model, tmp_path, steps=30, logging_steps=5)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    trainer.label_names = ["labels"]  # which the texts lack
    assert trainer.evaluate(texts(8, seed=1))["eval_loss"] < losses[0]


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("own_loss", [False, True])
def test_steps_do_not_depend_on_how_they_are_split(weight, own_loss, tmp_path):
    """1 x 8 is 4 x 2, though the texts are of unequal lengths: another loss than the mean of the parts' means."""
    kind, settings = (tf.BertForMaskedLM, {}) if weight == 1 else (tf.BertForSequenceClassification, {"num_labels": 3})
    model = bert(kind, **settings, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = texts(24)
    if weight < 1:
        rows = [row | {"labels": torch.tensor(i % 3)} for i, row in enumerate(rows)]
    ends = []
    for batch, parts in ((8, 1), (2, 4)):
        student = small(model)
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "optim": "sgd"}
        loss = summed if own_loss else None
        trained(student, model, tmp_path, rows, distillation_weight=weight, max_grad_norm=0.0, loss=loss, **split)
        ends.append(student)
    for one, other in zip(*(end.parameters() for end in ends), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_half_of_the_loss_is_the_model_s_own(tmp_path):
    model = bert(tf.BertForSequenceClassification, num_labels=3)
    student, rows = small(model), [row | {"labels": torch.tensor(i % 3)} for i, row in enumerate(texts())]
    args = fnl_hf.FNLTrainingArguments(str(tmp_path), distillation_weight=0.25, report_to=[], use_cpu=True)
    trainer = fnl_hf.FNLTrainer(student.eval(), args, collate, teacher=model)
    batch = collate(rows[:6])
    with torch.no_grad():
        loss, own = trainer.compute_loss(student, batch), student(**batch).loss
        assert_close(loss, 0.25 * Teacher(model).loss(student(**batch), batch) + 0.75 * own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_weight": 0.0}, r"distillation_weight is 0.0, expected a share in \(0, 1\]"),
        ({"distillation_weight": 1.5}, "distillation_weight is 1.5"),
        ({"distillation_temperature": 0.0}, "distillation_temperature is 0.0, expected a number above 0"),
    ],
)
def test_arguments_without_meaning(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fnl_hf.FNLTrainingArguments(str(tmp_path), **settings)


def test_a_teacher_that_is_the_student_is_refused(tmp_path):
    model = small(bert())
    args = fnl_hf.FNLTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"copy.deepcopy\(model\), before factorizing"):
        fnl_hf.FNLTrainer(model, args, teacher=model)
    args = fnl_hf.FNLTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, distillation_weight=0.5)
    with pytest.raises(ValueError, match="there is no teacher"):
        fnl_hf.FNLTrainer(model, args)
