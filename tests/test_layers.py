"""Layers of factors by themselves, in float64, against the dense layer that is given their composed weight."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import fnl_hf
from fnl_hf.layers import FactorizedConv1d, FactorizedConv2d, FactorizedEmbedding, FactorizedLayer, FactorizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")
FACTORS = ("weight", "middle", "right")


def close(a, b, tolerance=1e-10):
    """Relative to the norm of what is expected; of zeros exactly."""
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


def factorized(leaf, rank, **config):
    """The layer that ``factorize`` puts in the place of a leaf."""
    model = nn.Sequential(leaf)
    settings = fnl_hf.FNLConfig(attention=(), target_modules=["0"], rank=rank, **config)
    return fnl_hf.factorize(model, settings)[0]


def drawn(leaf):
    """In float64, with every parameter drawn anew, a padding row too."""
    with torch.no_grad():
        for parameter in leaf.double().parameters():
            parameter.normal_()
    return leaf


def redrawn(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def dense_weight(leaf, matrix):
    """The weight of an ordinary layer from its (m, n) matrix, written out anew: what tests compare to."""
    if isinstance(leaf, Conv1D):
        return matrix.T
    if isinstance(leaf, nn.Conv1d):
        return matrix.reshape(leaf.weight.shape)
    if isinstance(leaf, nn.Conv2d):
        out, into, height, width = leaf.weight.shape
        return matrix.reshape(out, height, into, width).permute(0, 2, 1, 3)
    return matrix


def copies(layer):
    """(factors U, (M,) V by name, bias), detached and to be differentiated."""
    held = {name: layer.stored(name) for name in FACTORS if layer.stored(name) is not None}
    held = {name: p.detach().clone().requires_grad_() for name, p in held.items()}
    bias = layer.stored("bias")
    return held, None if bias is None else bias.detach().clone().requires_grad_()


def product_of(held):
    left = held["weight"].reshape(len(held["weight"]), -1)
    if "middle" in held:
        left = left @ held["middle"]
    return left @ held["right"].T


def check(layer, leaf, x):
    """Forward, all gradients, decay and ``to_dense`` of a layer against the dense construction."""
    held, bias = copies(layer)
    weight = dense_weight(leaf, product_of(held))
    given, same = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
    expected = functional_call(leaf, {"weight": weight} | ({} if bias is None else {"bias": bias}), (same,))
    layer.train()
    output = layer(given)
    close(output, expected)
    cotangent = torch.randn_like(expected)
    (output * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    if x.is_floating_point():
        close(given.grad, same.grad)
    for name, factor in held.items():
        close(layer.stored(name).grad, factor.grad)
    if bias is not None:
        close(layer.stored("bias").grad, bias.grad)
    layer.eval()
    for _ in range(2):
        with torch.no_grad():
            close(layer(x), expected.detach())
    _check_decay(layer, held)
    dense = fnl_hf.to_dense(nn.Sequential(copy.deepcopy(layer)))[0]
    assert type(dense) is type(leaf) and not any(isinstance(m, FactorizedLayer) for m in dense.modules())
    assert {k: p.shape for k, p in dense.named_parameters()} == {k: p.shape for k, p in leaf.named_parameters()}
    close(dense.weight.detach(), weight.detach())
    close(dense(x).detach(), expected.detach())


def _check_decay(layer, held):
    names = list(held)
    gradients = torch.autograd.grad(0.35 * product_of(held).square().sum(), [held[name] for name in names])
    before = {name: torch.randn_like(held[name]) for name in names}
    for name in names:
        layer.stored(name).grad = before[name].clone()
    bias = layer.stored("bias")
    untouched = None if bias is None else bias.grad.clone()
    fnl_hf.frobenius_decay_(nn.Sequential(layer), 0.7)
    for name, gradient in zip(names, gradients, strict=True):
        close(layer.stored(name).grad - before[name], gradient)
    assert bias is None or torch.equal(bias.grad, untouched)
    (product,) = fnl_hf.factorizations(nn.Sequential(layer))
    close(product.matrix()[0].detach(), product_of(held).detach())
    close(product.squared_norm().detach(), product_of(held).detach().square().sum())


@pytest.fixture
def composing(monkeypatch):
    """A list that grows with every composition of a weight."""
    calls, composed = [], FactorizedLayer.composed

    def counted(layer):
        calls.append(layer)
        return composed(layer)

    monkeypatch.setattr(FactorizedLayer, "composed", counted)
    return calls


# -- linear ------------------------------------------------------------------------------------------

# rank, tokens -> is it composed in training, and in evaluation? (of a matrix 12 x 20, whose break-even is 7.5)
PATHS = {"thin": (3, 40, 0, 0), "full": (12, 400, 1, 1), "few tokens": (12, 4, 0, 1), "overcomplete": (30, 400, 1, 1)}


@pytest.mark.parametrize("deep", [False, True], ids=["matrix", "deep"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("leaf", [nn.Linear(20, 12), nn.Linear(20, 12, bias=False), Conv1D(12, 20)], ids=str)
def test_linear(leaf, path, deep, composing):
    rank, tokens, in_training, in_evaluation = PATHS[path]
    leaf, x = drawn(leaf), torch.randn(2, tokens // 2, 20).double()
    layer = factorized(copy.deepcopy(leaf), rank, form="deep" if deep else "matrix")
    assert type(layer) is FactorizedLinear and layer.rank == rank
    for each in (layer, redrawn(copy.deepcopy(layer))):
        check(each, leaf, x)
    del composing[:]
    layer.train()(x)
    assert len(composing) == in_training
    layer.eval()
    for _ in range(3):
        with torch.no_grad():
            layer(x)
    assert len(composing) == in_training + in_evaluation


def test_input_of_any_dimension_and_an_empty_one():
    leaf = drawn(nn.Linear(6, 5))
    for rank in (2, 5):
        layer = factorized(copy.deepcopy(leaf), rank)
        for shape in ((6,), (3, 6), (2, 3, 4, 6), (0, 6)):
            for mode in (True, False):
                assert layer.train(mode)(torch.randn(shape).double()).shape == (*shape[:-1], 5)


# -- embedding ---------------------------------------------------------------------------------------


def _scaled():
    return BartScaledWordEmbedding(15, 8, 1, embed_scale=2.5)


@pytest.mark.parametrize("deep", [False, True], ids=["matrix", "deep"])
@pytest.mark.parametrize("rank", [3, 8, 11])
@pytest.mark.parametrize("tokens", [7, 40])  # more than rows: composed, where that is cheaper
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Embedding(15, 8), lambda: nn.Embedding(15, 8, padding_idx=1), lambda: nn.Embedding(15, 8, -1), _scaled],
    ids=["plain", "padded", "padded at the end", "scaled"],
)
def test_embedding(make, tokens, rank, deep):
    leaf = drawn(make())
    ids = torch.randint(0, 15, (2, tokens))
    ids[:, :3] = torch.tensor([1, 14, 3])
    layer = factorized(copy.deepcopy(leaf), rank, form="deep" if deep else "matrix")
    assert type(layer) is FactorizedEmbedding and layer.padding_idx == leaf.padding_idx
    for each in (layer, redrawn(copy.deepcopy(layer))):
        check(each, leaf, ids)
    assert layer(torch.tensor(1)).shape == (8,)
    assert fnl_hf.to_dense(nn.Sequential(layer))[0].padding_idx == leaf.padding_idx


@pytest.mark.parametrize("tokens", [4, 40])
def test_lookups_of_padding_alone_give_no_gradient(tokens):
    layer = factorized(drawn(nn.Embedding(15, 8, padding_idx=1)), 4)
    layer(torch.ones(2, tokens, dtype=torch.long)).sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("tokens", [4, 40])
def test_lookups_of_padding_alone_give_a_core_that_trains_alone_no_gradient(tokens):
    layer = factorized(drawn(nn.Embedding(15, 8, padding_idx=1)), 4, form="deep")
    for basis in ("weight", "right"):
        layer.stored(basis).requires_grad_(False)
    ids = torch.ones(2, tokens, dtype=torch.long)
    ids[0, 0] = 3
    layer(ids).sum().backward()
    expected = torch.outer(layer.left[3], layer.right.sum(0)).detach()
    torch.testing.assert_close(layer.middle.grad, expected)


# -- convolution -------------------------------------------------------------------------------------

MODES = ("zeros", "reflect", "replicate", "circular")
KERNELS = ((3, 3), (1, 3), (3, 1), (2, 4))


def _options(kernels, strides, paddings, dilations):
    for kernel, stride, padding, dilation in itertools.product(kernels, strides, paddings, dilations):
        if padding != "same" or stride == strides[0]:  # strides[0] is one
            yield {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}


def _convolution_laws(make, size, options):
    """For all options, in turn of a rank below break-even and above it, with and without a bias, deep and not."""
    for number, option in enumerate(options):
        leaf = drawn(make(bias=number % 2 == 0, **option))
        rank = 2 if number % 5 < 2 else min(_matrix(leaf).shape)
        layer = type_of(leaf).replacing(copy.deepcopy(leaf), rank, deep=number % 7 < 3)
        check(redrawn(layer), leaf, torch.randn(2, 3, *size).double())


def type_of(leaf):
    return FactorizedConv2d if isinstance(leaf, nn.Conv2d) else FactorizedConv1d


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_of_images(mode):
    strides, paddings, dilations = ((1, 1), (2, 2), (1, 3)), (0, 1, (2, 1), "same", "valid"), (1, (1, 2), (2, 1))
    options = _options(KERNELS, strides, paddings, dilations)
    _convolution_laws(lambda **kw: nn.Conv2d(3, 5, padding_mode=mode, **kw), (9, 8), options)


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_of_sequences(mode):
    options = _options((1, 3, 4), (1, 2, 3), (0, 2, "same", "valid"), (1, 2))
    _convolution_laws(lambda **kw: nn.Conv1d(3, 5, padding_mode=mode, **kw), (13,), options)


@pytest.mark.parametrize("deep", [False, True], ids=["matrix", "deep"])
@pytest.mark.parametrize("rank", [2, 9, 20])
@pytest.mark.parametrize("images", [1, 16])
def test_a_convolution_that_factorize_puts_in_place(images, rank, deep):
    leaf = drawn(nn.Conv2d(3, 5, 3, padding=1))
    layer = factorized(copy.deepcopy(leaf), rank, form="deep" if deep else "matrix")
    assert type(layer) is FactorizedConv2d
    for each in (layer, redrawn(copy.deepcopy(layer))):
        check(each, leaf, torch.randn(images, 3, 8, 8).double())
    assert layer(torch.randn(3, 8, 8).double()).shape == (5, 8, 8)  # without a batch, as in torch


# -- the matrix, and its best approximation ------------------------------------------------------------


def _matrix(leaf):
    """(m, n) of a dense layer, by the contract."""
    weight = leaf.weight.detach()
    if isinstance(leaf, Conv1D):
        return weight.T
    if isinstance(leaf, nn.Conv2d):
        out, into, height, width = weight.shape
        return weight.permute(0, 2, 1, 3).reshape(out * height, into * width)
    return weight.reshape(len(weight), -1)


LEAVES = {
    "linear": lambda: nn.Linear(7, 9),
    "Conv1D": lambda: Conv1D(9, 7),
    "embedding": lambda: nn.Embedding(11, 6),
    "conv2d": lambda: nn.Conv2d(4, 3, (2, 3)),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
}


@pytest.mark.parametrize("name", LEAVES)
def test_truncation_is_the_best_approximation(name):
    leaf = drawn(LEAVES[name]())
    matrix = _matrix(leaf)
    sigma = torch.linalg.svdvals(matrix)
    for rank in range(1, len(sigma) + 1):
        layer = factorized(copy.deepcopy(leaf), rank)
        (product,) = fnl_hf.factorizations(nn.Sequential(layer))
        assert product.kind == {"Conv1D": "linear", "conv2d": "conv", "conv1d": "conv"}.get(name, name)
        assert product.matrix().shape == (1, *matrix.shape) and product.full_rank == len(sigma)
        left, right = product.factors()
        assert left.shape == (1, matrix.shape[0], rank) and right.shape == (1, rank, matrix.shape[1])
        close((product.matrix()[0] - matrix).norm().detach() + 1, sigma[rank:].norm() + 1)
        close((left.mT @ left)[0].detach(), torch.diag(sigma[:rank]))  # balanced
        close((right @ right.mT)[0].detach(), torch.diag(sigma[:rank]))
        assert {id(p) for p in product.parameters()} == {id(p) for k, p in layer.named_parameters() if k != "bias"}


@pytest.mark.parametrize("name", LEAVES)
def test_a_rank_above_full_keeps_the_matrix_and_no_component_is_dead(name):
    leaf = drawn(LEAVES[name]())
    matrix = _matrix(leaf)
    layer = factorized(copy.deepcopy(leaf), 2.0)
    assert layer.rank == 2 * min(matrix.shape)
    (product,) = fnl_hf.factorizations(nn.Sequential(layer))
    close(product.matrix()[0].detach(), matrix)
    (product.matrix() * torch.randn_like(product.matrix())).sum().backward()
    moving = layer.stored("weight").grad.reshape(len(matrix), -1).norm(dim=0) + layer.stored("right").grad.norm(dim=0)
    assert (moving > 1e-6).all()


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("rank", [2, 3])
def test_plain_classes_refuse_the_state_at_every_rank(name, rank):
    """U lies under the key of the dense weight in another shape, also where (m, rank) would be that of the weight."""
    leaf = drawn(LEAVES[name]())
    for each in (rank, min(_matrix(leaf).shape), 1.0):
        state = factorized(copy.deepcopy(leaf), each).state_dict()
        with pytest.raises(RuntimeError, match="size mismatch for weight|Unexpected key"):
            LEAVES[name]().load_state_dict(state)
        assert state["weight"].shape != leaf.weight.shape


# -- what reads the weight -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEAVES)
def test_the_weight_says_what_it_is_without_a_product(name, composing):
    leaf = drawn(LEAVES[name]())
    layer = factorized(copy.deepcopy(leaf), 3)
    del composing[:]
    weight = layer.weight
    assert weight.shape == leaf.weight.shape and weight.size() == leaf.weight.shape and weight.size(0) == len(weight)
    assert weight.dtype == torch.float64 and weight.device == leaf.weight.device and weight.dim() == leaf.weight.dim()
    assert weight.numel() == leaf.weight.numel() and weight.ndim == leaf.weight.ndim and not weight.is_meta
    assert weight.requires_grad and weight.is_floating_point() and isinstance(weight, nn.Parameter)
    assert not composing
    assert layer.float().weight.dtype == torch.float32 and layer.to("meta").weight.is_meta and not composing


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("form", ["matrix", "deep"])
def test_reading_the_weight_gives_gradients_to_every_factor(name, form):
    leaf = drawn(LEAVES[name]())
    layer = redrawn(factorized(copy.deepcopy(leaf), 3, form=form))
    held, _ = copies(layer)
    other = torch.randn_like(leaf.weight)
    for read in (
        lambda w: (w * other).sum(),
        lambda w: (other * w).sum(),
        lambda w: torch.stack([w, other]).square().sum(),
        lambda w: torch.einsum("...,...->", w, other),
        lambda w: w.t().square().sum() if w.dim() == 2 else w.flatten(1).square().sum(),
        lambda w: (w[0] ** 3).sum(),
        lambda w: w.norm(),
    ):
        layer.zero_grad()
        value, expected = read(layer.weight), read(dense_weight(leaf, product_of(held)))
        close(value, expected)
        value.backward()
        gradients = torch.autograd.grad(expected, list(held.values()))
        for factor, gradient in zip(held, gradients, strict=True):
            close(layer.stored(factor).grad, gradient)


def test_writing_into_the_weight_is_an_error():
    layer = factorized(drawn(nn.Linear(7, 9)), 3)
    before = copy.deepcopy(layer.state_dict())
    writes = [
        lambda w: w.mul_(2), lambda w: w.data.mul_(2), lambda w: w.copy_(torch.zeros(9, 7)), nn.init.zeros_,
        nn.init.normal_, nn.init.kaiming_uniform_, lambda w: w.__setitem__(0, 1.0), lambda w: w.__iadd__(1.0),
        lambda w: w.fill_(0.0), lambda w: torch.add(torch.ones(9, 7), 1, out=w), lambda w: w.data.normal_(),
        lambda w: setattr(w, "data", torch.zeros(9, 7)), lambda w: w.data.__setitem__(0, 1.0),
    ]  # fmt: skip
    for write in writes:
        with torch.no_grad(), pytest.raises(ValueError, match="is the product of its factors"):
            write(layer.weight)
    for dense in (nn.Parameter(torch.zeros(9, 7)), torch.zeros(9, 7)):
        with pytest.raises(ValueError, match="is the product of its factors, and cannot be set to a dense one"):
            layer.weight = dense
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_functional_calls_with_the_weight():
    leaf, x = drawn(nn.Linear(7, 9)), torch.randn(4, 7).double()
    layer = factorized(copy.deepcopy(leaf), 3)
    close(F.linear(x, layer.weight, layer.bias).detach(), layer(x).detach())
    close((x @ layer.weight.t() + layer.bias).detach(), layer(x).detach())
    close(torch.addmm(layer.bias, x, layer.weight.T).detach(), layer(x).detach())
    table, ids = factorized(drawn(nn.Embedding(11, 6)), 3), torch.arange(4)
    close(F.embedding(ids, table.weight).detach(), table(ids).detach())
    conv, image = factorized(drawn(nn.Conv2d(3, 4, 3)), 3), torch.randn(2, 3, 6, 6).double()
    close(F.conv2d(image, conv.weight, conv.bias).detach(), conv(image).detach())


def test_multihead_attention_reads_its_output_projection():
    torch.manual_seed(3)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 5, 8).double()
    model = nn.Sequential(attention)
    reference = copy.deepcopy(attention)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules=["out_proj"], rank=3))
    with torch.no_grad():
        reference.out_proj.weight.copy_(attention.out_proj.composed())
        reference.out_proj.bias.copy_(attention.out_proj.bias)
    for mode in (True, False):
        close(attention.train(mode)(x, x, x)[0].detach(), reference.train(mode)(x, x, x)[0].detach())
    attention.train()(x, x, x)[0].square().sum().backward()
    assert all(p.grad.norm() > 0 for p in attention.out_proj.parameters())
    assert type(fnl_hf.to_dense(model)[0].out_proj) is type(reference.out_proj)


# -- the composed weight that evaluation keeps -------------------------------------------------------


def test_evaluation_composes_once_and_anew_when_a_factor_changes(composing):
    model = fnl_hf.factorize(
        nn.Sequential(drawn(nn.Linear(20, 12))), fnl_hf.FNLConfig(attention=(), target_modules=["0"], rank=12)
    ).eval()
    layer, x = model[0], torch.randn(9, 20).double()
    del composing[:]

    @torch.no_grad()
    def composes(times):
        """The output is right, and this many compositions were needed for it."""
        before = len(composing)
        output = [layer(x.to(layer.left.dtype)) for _ in range(3)][-1]
        assert len(composing) - before == times
        matrix = layer.left @ layer.right.T
        close(output, F.linear(x.to(matrix.dtype), matrix, layer.bias), 1e-2 if matrix.dtype == torch.half else 1e-6)

    composes(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    layer(x).square().sum().backward()
    del composing[:]
    optimizer.step()
    composes(1)
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    composes(1)
    with torch.no_grad():
        layer.right.mul_(2)
    composes(1)
    with torch.no_grad():
        layer.left[0, 0] = 0.5
    composes(1)
    layer.right.data = layer.right.data * 0.5
    composes(1)
    layer.right = nn.Parameter(layer.right.detach() * 0.5)
    composes(1)
    for cast in (model.float, model.double, model.half):
        cast()
        composes(1)
    model.train().eval()
    composes(1)
    copied = copy.deepcopy(model)
    composes(0)
    assert "_composed" not in vars(copied[0]) and torch.equal(copied[0](x.half()), layer(x.half()))
    pickled = pickle.loads(pickle.dumps(model))
    assert "_composed" not in vars(pickled[0]) and torch.equal(pickled[0](x.half()), layer(x.half()))
    assert set(layer.state_dict()) == {"weight", "right", "bias"}


def test_a_kept_weight_takes_no_part_in_later_training(composing):
    """Evaluation, then training on the same layer: gradients reach the factors, and inference mode leaves no trace."""
    layer, x = factorized(drawn(nn.Linear(20, 12)), 12).eval(), torch.randn(400, 20).double()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()  # in evaluation, with gradients
    assert all(p.grad is not None for p in layer.parameters())
    layer.zero_grad()
    with torch.no_grad():
        layer(x)
    layer.train()(x).sum().backward()
    assert all(p.grad.norm() > 0 for p in layer.parameters())


def test_frozen_factors_in_training_give_the_input_its_gradient():
    layer, x = factorized(drawn(nn.Linear(20, 12)), 12), torch.randn(9, 20).double().requires_grad_()
    for p in layer.factor_parameters():
        p.requires_grad_(False)
    layer(x).sum().backward()
    close(x.grad[0], (layer.left @ layer.right.T).sum(0).detach())
    assert layer.bias.grad is not None and layer.right.grad is None and not layer.weight.requires_grad
