"""How far the functions of layers, and of whole new models, are from those of their factors: functional and spectral.

    python scripts/benchmark_functional.py                       # about two minutes on one CPU core
    python scripts/benchmark_functional.py --models marian --seeds 1 --ranks 0.125
    python scripts/benchmark_functional.py --json results.json

Of the main job's Marian and of a BERT-mini with ReLU and with GELU, newly initialised, without training. Two figures:

- layers: Σ E‖σ(Wx) − σ(U Vᵀx)‖² over the layers that an activation σ follows, for standard normal x, as a share of
  Σ E‖σ(Wx)‖²;
- model: how far its outputs on random tokens are from the dense model's, as a share of their norm, where only these
  layers are made low-rank.

"rescaled" is functional initialisation without its steps of L-BFGS, "functional, data" that with the moments of other
random tokens, "activation" what those alone give. Means over seeds, with the largest distance of a seed from them.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

import fnl_hf
from fnl_hf.algebra import spectral
from fnl_hf.algebra.functional import approximation, risk
from fnl_hf.layers.activations import activations
from fnl_hf.outputs import outputs_of
from fnl_hf.tasks.running import write_json
from fnl_hf.tasks.translation import new_marian

VOCABULARY = 3000
BATCH, LENGTH = 16, 24


class _Tokens(SimpleNamespace):
    """Of a tokenizer what a new model needs."""

    def __len__(self) -> int:
        return VOCABULARY


def _marian() -> PreTrainedModel:
    tokens = _Tokens(pad_token_id=0, eos_token_id=1)
    return new_marian(tokens, d_model=192, layers=2, heads=4, ffn_dim=512, dropout=0.0, max_length=128)


def _bert(activation: str) -> Callable[[], PreTrainedModel]:
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    config = BertConfig(vocab_size=VOCABULARY, hidden_act=activation, **sizes)
    return lambda: BertForMaskedLM(config)


MODELS = {"marian": _marian, "bert-relu": _bert("relu"), "bert-gelu": _bert("gelu")}


def inputs_of(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    names = ["input_ids"] + ["decoder_input_ids"] * model.config.is_encoder_decoder
    return {name: torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator) for name in names}


def of_layers(model: nn.Module, layers: dict[str, str], rank: float) -> dict[str, float]:
    """What each initialisation loses of the functions of layers, given as name -> activation."""
    lost, whole = dict.fromkeys(("spectral", "rescaled", "functional"), 0.0), 0.0
    for name, kind in layers.items():
        weight = model.get_submodule(name).weight.detach()
        r = max(1, round(rank * min(weight.shape)))
        pairs = (
            spectral.of_matrix(weight, r),
            approximation(weight, r, kind, steps=0),
            approximation(weight, r, kind),
        )
        for way, pair in zip(lost, pairs, strict=True):
            lost[way] += float(risk(weight, *pair, kind))
        whole += float(risk(weight, *(0 * factor for factor in pairs[0]), kind))
    return {way: value / whole for way, value in lost.items()}


def of_model(model: PreTrainedModel, layers: dict[str, str], rank: float) -> dict[str, float]:
    """How far the outputs of a model with these layers at low rank are from its own."""
    inputs, batches = inputs_of(model, 0), [inputs_of(model, seed) for seed in (1, 2)]
    wanted = outputs_of(model, inputs)[0]
    ways = {
        "spectral": ("spectral", None),
        "functional": ("functional", None),
        "activation": ("activation", batches),
        "functional, data": ("functional", batches),
    }
    found = {}
    for way, (init, data) in ways.items():
        config = fnl_hf.FNLConfig(attention=(), target_modules=list(layers), rank=rank, init=init)
        small = fnl_hf.factorize(copy.deepcopy(model), config, calibration=data)
        found[way] = float((outputs_of(small, inputs)[0] - wanted).norm() / wanted.norm())
    return found


def measured(make: Callable[[], PreTrainedModel], rank: float, seed: int) -> dict[str, float]:
    """All figures of one new model."""
    torch.manual_seed(seed)
    model = make().eval()
    layers = activations(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)], inputs_of(model, 0))
    figures = {"layers": of_layers(model, layers, rank), "model": of_model(model, layers, rank)}
    return {f"{of}, {way}": value for of, ways in figures.items() for way, value in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=float, default=[1 / 16, 1 / 8, 1 / 4], help="shares of min(m, n)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for rank in options.ranks:
            runs = {seed: measured(MODELS[name], rank, seed) for seed in options.seeds}
            rows.append({"model": name, "rank": rank, "seeds": runs})
            columns = list(next(iter(runs.values())))
            if len(rows) == 1:
                print("| model | rank |", " | ".join(columns), "|", flush=True)
                print("| --- |" + " --- |" * (len(columns) + 1))
            cells = []
            for column in columns:
                values = [run[column] for run in runs.values()]
                spread = max(abs(value - mean(values)) for value in values)
                cells.append(f"{mean(values):.4f} ± {spread:.4f}")
            print(f"| {name} | {rank:g} |", " | ".join(cells), "|", flush=True)
    if options.json:
        write_json(options.json, {"torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
