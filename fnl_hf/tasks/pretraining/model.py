"""New masked language models in the sizes that were published."""

from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
)

MODEL_TYPES = ("bert", "roberta", "electra", "modernbert")
# size -> (layers, width): Turc et al. 2019, table 1, and BERT-base and -large
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
_ELECTRA_SMALL = (12, 256)  # Clark et al. 2020; their base and large are BERT's
_MODERNBERT = {"base": (22, 768, 1152), "large": (28, 1024, 2624)}  # layers, width, feed-forward (Warner et al. 2024)


def new_model(
    model_type: str,
    size: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    dropout: float = 0.1,
    activation: str | None = None,
) -> PreTrainedModel:
    """A masked language model of `MODEL_TYPES` in one of `SIZES`, newly initialised, for the tokens of `tokenizer`.

    Heads are 64 wide. Sizes that were not published for a type have BERT's layers and width (Turc et al. 2019), with
    ModernBERT's ratio of 1.5 of feed-forward to width, and ELECTRA's embeddings of 128 below base. BERT's and RoBERTa's
    pooler and next-sentence head are left out, as in all `ForMaskedLM` classes.

    Args:
        max_length: tokens of the longest sequence; there are positions for at least as many as published.
        dropout: after every sub-layer and of attention weights. ModernBERT was published without.
        activation: of feed-forward layers, as transformers names it; GELU, as published, if None.
    """
    layers, width = SIZES[size]
    # Begin and end as the tokenizer has them: older Trainers write its own into the config, and resuming compares that
    shape = {"vocab_size": len(tokenizer)}
    shape |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    if model_type == "modernbert":
        layers, width, ffn = _MODERNBERT.get(size, (layers, width, width * 3 // 2))
        config = ModernBertConfig(
            **shape,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=ffn,
            max_position_embeddings=max(8192, max_length),
            attention_dropout=dropout,
            embedding_dropout=dropout,
            mlp_dropout=dropout,
            hidden_activation=activation or "gelu",
        )
        return ModernBertForMaskedLM(config)
    if model_type == "electra" and size == "small":
        layers, width = _ELECTRA_SMALL
    shape |= {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "max_position_embeddings": max(512, max_length),
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "hidden_act": activation or "gelu",
    }
    if model_type == "bert":
        return BertForMaskedLM(BertConfig(**shape))
    if model_type == "electra":
        return ElectraForMaskedLM(ElectraConfig(**shape, embedding_size=width if size in ("base", "large") else 128))
    # RoBERTa counts positions from the padding token's id on
    shape["max_position_embeddings"] += tokenizer.pad_token_id + 1
    return RobertaForMaskedLM(RobertaConfig(**shape, type_vocab_size=1, layer_norm_eps=1e-5))
