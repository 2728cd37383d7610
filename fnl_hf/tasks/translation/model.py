"""The small encoder-decoder Transformer that the translation script trains from scratch; dropout of other ones."""

from torch import nn
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedConfig, PreTrainedTokenizerBase

from ..running import InputError


def new_marian(
    tokenizer: PreTrainedTokenizerBase,
    d_model: int,
    layers: int,
    heads: int,
    ffn_dim: int,
    dropout: float,
    max_length: int,
) -> MarianMTModel:
    """A Marian model with `layers` encoder and decoder layers and one embedding matrix for source, target and output.

    Built and initialised as fairseq's Transformers for small corpora are: post-norm, ReLU, scaled embeddings,
    sinusoidal positions (up to `max_length` tokens), and `xavier_init_`. Decoding starts from the padding token, which
    is never generated, and a hypothesis that reaches the length limit is ended.
    """
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=ffn_dim,
        dropout=dropout,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        bad_words_ids=[[tokenizer.pad_token_id]],
        max_length=max_length,
        num_beams=5,
    )
    xavier_init_(model)
    return model


def own_dropout(config: PreTrainedConfig, dropout: float | None) -> dict[str, float]:
    """What to load a checkpoint with for another dropout than its own; nothing for None.

    Raises:
        InputError: its config has no dropout, or several.
    """
    if dropout is None:
        return {}
    if not (names := [name for name in ("dropout", "dropout_rate") if hasattr(config, name)]):
        raise InputError(f"--dropout {dropout:g}: a {config.model_type} has no one dropout. Set it in its config.json.")
    return {names[0]: dropout}


def xavier_init_(model: MarianMTModel) -> None:
    """Initialise in place as fairseq does: Xavier-uniform projections (those of query, key and value smaller by √2,
    since they are one matrix there), zero biases, embeddings of standard deviation 1/√d_model with a zero padding row.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:  # the head is the embedding matrix
            gain = 2**-0.5 if name.endswith(("q_proj", "k_proj", "v_proj")) else 1.0
            nn.init.xavier_uniform_(module.weight, gain=gain)
            nn.init.zeros_(module.bias)
    shared = model.get_input_embeddings()
    nn.init.normal_(shared.weight, std=shared.embedding_dim**-0.5)
    nn.init.zeros_(shared.weight[shared.padding_idx])
