"""Ranks from a budget: the paper's own search and counts, and what ``target_ratio`` and energy give."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fnl_hf
from fnl_hf.budget import energy_rank, nearest_scale, reference_rank
from fnl_hf.layers import find_layers

# parameters, [(target ratio, scale, ratio and parameters where known)], as the released code reaches them
PUBLISHED = {
    ("resnet", 10): (
        7427914,
        [(0.02, 0.008789, 0.02021, 150090), (0.05, 0.023926, 0.05024, None), (0.1, 0.047852, 0.10008, 743370)],
    ),
    ("resnet", 100): (7451044, [(0.02, 0.007324), (0.05, 0.021973), (0.1, 0.046875)]),
    ("resnet", 200): (7476744, [(0.05, 0.020508), (0.1, 0.045410), (0.15, 0.069336)]),
    ("vgg", 10): (20035018, [(0.02, 0.009277), (0.05, 0.023682), (0.1, 0.047607)]),
    ("vgg", 100): (20081188, [(0.02, 0.008301), (0.05, 0.022705), (0.1, 0.046875)]),
    ("vgg", 200): (20132488, [(0.02, 0.007080), (0.05, 0.021484), (0.1, 0.045898)]),
    ("wrn", 10): (36479194, [(0.01667, 0.007568, None, 610282), (0.06667, 0.031982, None, 2435034)]),
}


def conv(inp, out, kernel=3):
    return nn.Conv2d(inp, out, kernel, bias=False)


def resnet(classes, width=64, blocks=5):
    """ResNet32x2, in the order of its layers: what counts parameters needs no forward."""
    layers, inp = [conv(3, width), nn.BatchNorm2d(width)], width
    for out in (width, 2 * width, 4 * width):
        for block in range(blocks):
            layers += [conv(inp, out), nn.BatchNorm2d(out), conv(out, out), nn.BatchNorm2d(out)]
            if block == 0 and inp != out:
                layers += [conv(inp, out, 1), nn.BatchNorm2d(out)]
            inp = out
    return nn.ModuleDict({"body": nn.Sequential(*layers), "classifier": nn.Linear(inp, classes)})


def vgg(classes):
    layers, inp = [], 3
    for out in [64, 64, 128, 128, 256, 256, 256, 256] + [512] * 8:
        layers += [conv(inp, out), nn.BatchNorm2d(out)]
        inp = out
    return nn.ModuleDict({"body": nn.Sequential(*layers), "classifier": nn.Linear(512, classes)})


def wrn(classes):
    """WRN28-10; its batch norms come before the convolutions."""
    layers, inp = [conv(3, 16)], 16
    for out in (160, 320, 640):
        for block in range(4):
            layers += [nn.BatchNorm2d(inp), conv(inp, out), nn.BatchNorm2d(out), conv(out, out)]
            layers += [conv(inp, out, 1)] if block == 0 else []
            inp = out
    return nn.ModuleDict({"body": nn.Sequential(*layers, nn.BatchNorm2d(inp)), "classifier": nn.Linear(inp, classes)})


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_the_papers_search_reaches_its_scales_and_counts(name, classes):
    full, rows = PUBLISHED[name, classes]
    with torch.device("meta"):
        model = {"resnet": resnet, "vgg": vgg, "wrn": wrn}[name](classes)
    config = fnl_hf.FNLConfig(attention=(), target_modules="all")
    candidates = find_layers(model, config)
    targets = [candidate.options[0] for candidate in candidates if candidate.options]
    assert {c.name for c in candidates if not c.options} == {"body.0", "classifier"}  # stay dense
    shapes = {target: target.found(model).tensors()[0].shape[-2:] for target in targets}
    rest = sum(p.numel() for p in model.parameters()) - sum(m * n for m, n in shapes.values())
    assert rest + sum(m * n for m, n in shapes.values()) == full

    def count(scale):
        return rest + sum(t.cost(model, reference_rank(t.kind, *shapes[t], scale)) for t in targets)

    for target, scale, *rest_of_row in rows:
        ratio, parameters = rest_of_row or (None, None)
        reached = nearest_scale(target, lambda scale: count(scale) / full)
        assert round(reached[0], 6) == scale
        assert ratio is None or round(reached[1], 5) == ratio
        assert parameters is None or count(reached[0]) == parameters


def test_the_reference_rule_of_linear_layers_has_no_floor():
    assert reference_rank("linear", 64, 32, 0.01) == 0 and reference_rank("conv", 64, 32, 0.001) == 1
    assert reference_rank("conv", 64, 32, 1.0) == 64  # above min(64, 32)
    assert reference_rank("linear", 10, 7, 0.5) == 4 and reference_rank("linear", 10, 5, 0.5) == 2  # half to even


def test_energy_keeps_the_least_rank_that_has_its_share():
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [energy_rank(energies, share) for share in (0.1, 0.4, 0.41, 0.7, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("pattern", [".*qk", ".*self_attn", ".*ov"])
@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_what_keeps_its_width_saves_nothing_for_others(pattern, allocation):
    """Rotary queries and keys, whatever rank is asked for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    before = sum(parameter.numel() for parameter in model.parameters())
    config = fnl_hf.FNLConfig(target_ratio=0.8, rank_allocation=allocation, rank_pattern={pattern: 2})
    fnl_hf.factorize(model, config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.8 * before
