"""Tiny random models of the common families, with inputs: every parameter nonzero, dropout off."""

import torch
import transformers as tf

TEXT = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 2]])}
SEQ2SEQ = {**TEXT, "decoder_input_ids": torch.tensor([[2, 3, 4, 5], [2, 7, 8, 9]])}
BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50,
    "max_position_embeddings": 40,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 50,
    "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {**{k: BERT[k] for k in list(BERT)[:4]}, "image_size": 8, "patch_size": 4}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}


def _clip():
    text = {**BERT, "eos_token_id": 2}
    return tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)


def _wav2vec2():
    return tf.Wav2Vec2Config(
        **{k: BERT[k] for k in list(BERT)[:4]}, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(4, 4),
        num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=4,
    )  # fmt: skip


# name -> (config, model class, inputs, number of attention modules)
FAMILIES = {
    "bert": (lambda: tf.BertConfig(**BERT), tf.BertModel, TEXT, 2),
    "roberta": (lambda: tf.RobertaConfig(**BERT), tf.RobertaModel, TEXT, 2),
    "distilbert": (
        lambda: tf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=40, vocab_size=50),
        tf.DistilBertModel, TEXT, 2,
    ),
    "electra": (lambda: tf.ElectraConfig(**BERT, embedding_size=24), tf.ElectraModel, TEXT, 2),
    "albert": (lambda: tf.AlbertConfig(**BERT, embedding_size=24), tf.AlbertModel, TEXT, 1),
    "bart": (lambda: tf.BartConfig(**BART), tf.BartModel, SEQ2SEQ, 5),
    "mbart": (lambda: tf.MBartConfig(**BART), tf.MBartModel, SEQ2SEQ, 5),
    "marian": (lambda: tf.MarianConfig(**BART), tf.MarianModel, SEQ2SEQ, 5),
    "fsmt": (
        lambda: tf.FSMTConfig(
            **{k: v for k, v in BART.items() if k not in ("vocab_size", "decoder_start_token_id")},
            langs=["de", "en"], src_vocab_size=50, tgt_vocab_size=50,
        ),
        tf.FSMTModel, SEQ2SEQ, 5,
    ),
    "m2m_100": (lambda: tf.M2M100Config(**BART), tf.M2M100Model, SEQ2SEQ, 5),
    "pegasus": (lambda: tf.PegasusConfig(**BART), tf.PegasusModel, SEQ2SEQ, 5),
    "t5": (
        lambda: tf.T5Config(
            d_model=32, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=1, num_heads=4, vocab_size=50,
        ),
        tf.T5Model, SEQ2SEQ, 4,
    ),
    "gpt2": (
        lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=2),
        tf.GPT2Model, TEXT, 2,
    ),
    "vit": (lambda: tf.ViTConfig(**VISION), tf.ViTModel, PIXELS, 2),
    "clip": (_clip, tf.CLIPModel, {**TEXT, **PIXELS}, 4),
    "whisper": (
        lambda: tf.WhisperConfig(
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"}, num_mel_bins=8,
            max_source_positions=8, max_target_positions=20,
        ),
        tf.WhisperModel,
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16),
         "decoder_input_ids": SEQ2SEQ["decoder_input_ids"]}, 5,
    ),
    "wav2vec2": (_wav2vec2, tf.Wav2Vec2Model, {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400)}, 2),
}  # fmt: skip


def build(family, seed=0, dtype=torch.float32):
    """(model, inputs): eval mode, every parameter drawn at random, biases and norms included."""
    config, cls, inputs, _ = FAMILIES[family]
    torch.manual_seed(seed)
    model = cls(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.dim() == 1 else 0.0))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype), inputs


@torch.no_grad()
def output(model, inputs):
    """The main output tensors of a forward, as one vector."""
    names = ("last_hidden_state", "encoder_last_hidden_state", "text_embeds", "image_embeds")
    found = model(**inputs)
    return torch.cat([found[name].flatten() for name in names if found.get(name) is not None])
