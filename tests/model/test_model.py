"""The model against brute force and an independent implementation."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.model.deepfm import (
    DeepFM,
    EmbeddingArch,
    FactorizationMachine,
    OverArch,
    Table,
    build_deepfm,
)
from deepfm_dist.model.losses import weighted_bce_sum
from deepfm_dist.model.norm import GlobalBatchNorm
from examples.dcn_v2 import DCNv2
from tests.plain_deepfm import Bags, PlainDeepFM
from tests.ranks import run_ranks

TABLES = {"user": 11, "item": 13, "tag": 7}
FIELDS = [
    ("user", "user", "sum"),
    ("item", "item", "sum"),
    ("genre", "tag", "mean"),
    ("liked", "tag", "sum"),
]
N_DENSE = 2
VECTORS = {"text": 4, "taste": 1}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-4}  # sums of many terms in float32


def pair(
    dim: int = 6, hidden: tuple[int, ...] = (5, 4), **options: Any
) -> tuple[DeepFM, PlainDeepFM]:
    """Our model and the plain one with the same weights."""
    torch.manual_seed(0)
    batch_norm = options.pop("batch_norm", False)
    plain = PlainDeepFM(
        *(TABLES, FIELDS, N_DENSE, dim, hidden),
        batch_norm=batch_norm,
        vectors=[*VECTORS.values()],
        **options,
    )
    deep = options.pop("deep", True)
    ours = build_deepfm(
        {n: Table(r, tuple(f for f, t, _ in FIELDS if t == n)) for n, r in TABLES.items()},
        [f for f, _, _ in FIELDS],
        N_DENSE,
        dim,
        over_arch=partial(OverArch, layer_sizes=hidden, batch_norm=batch_norm) if deep else None,
        pooling={f: pooling for f, _, pooling in FIELDS},
        vectors=VECTORS,
        **options,
    )
    copy_weights(plain, ours)
    return ours, plain


def copy_weights(plain: PlainDeepFM, ours: DeepFM) -> None:
    arch, dim = ours.interaction_arch, ours.embedding_arch.embedding_dim
    with torch.no_grad():
        for name, bag in ours.embedding_arch.ebc.embedding_bags.items():
            bag.weight.zero_()
            weight = plain.tables[name].weight
            bag.weight[:, :dim] = weight[:, :dim]
            bag.weight[:, dim] = weight[:, -1]
        arch.bias.copy_(plain.bias)
        if arch.dense_factors is not None:
            arch.dense_factors.copy_(plain.dense_factors)
        if arch.dense_first_order is not None:
            arch.dense_first_order.copy_(plain.dense_first)
        for name, projection in zip(VECTORS, plain.projections, strict=True):
            if hasattr(arch, f"vector_factors_{name}") and dim:
                arch.get_parameter(f"vector_factors_{name}").copy_(projection.weight[:dim].T)
            if hasattr(arch, f"vector_first_order_{name}"):
                arch.get_parameter(f"vector_first_order_{name}").copy_(projection.weight[-1])
        if isinstance(arch.over_arch, OverArch):
            state = {}
            for kind, names in ((nn.Linear, "hidden"), (nn.BatchNorm1d, "norms")):
                modules = [m for m in plain.mlp if isinstance(m, kind)]
                for i, module in enumerate(modules):
                    name = f"{names}.{i}" if i < len(arch.over_arch.hidden) else "output"
                    state |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            arch.over_arch.load_state_dict(state)


def example() -> tuple[Bags, KeyedJaggedTensor, Tensor]:
    """Nine rows: multi-valued, repeated and empty bags."""
    generator = torch.Generator().manual_seed(3)
    bags = {}
    for name, table, _ in FIELDS:
        several = table == "tag"
        bags[name] = [
            torch.randint(0, TABLES[table], (int(n),), generator=generator).tolist()
            for n in (torch.randint(0, 5, (9,), generator=generator) if several else torch.ones(9))
        ]
    flat = [row for name, _, _ in FIELDS for bag in bags[name] for row in bag]
    lengths = [len(bag) for name, _, _ in FIELDS for bag in bags[name]]
    sparse = KeyedJaggedTensor(
        [f for f, _, _ in FIELDS],
        torch.tensor(flat, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )
    return bags, sparse, torch.randn(9, N_DENSE + sum(VECTORS.values()), generator=generator)


def test_fm_is_the_sum_over_all_pairs() -> None:
    factors = torch.randn(8, 5, 3, dtype=torch.float64)
    pairs = sum(
        (factors[:, a] * factors[:, b]).sum(1) for a, b in itertools.combinations(range(5), 2)
    )
    weights, padding = torch.randn(8, 5, 1).double(), torch.full((8, 5, 2), 7.0).double()
    rows = torch.cat([factors, weights, padding], 2).requires_grad_()
    for first_order in (True, False):
        fm = FactorizationMachine(3, first_order)
        expected = weights.sum((1, 2)) + pairs if first_order else pairs
        torch.testing.assert_close(fm(rows), expected)
        assert torch.autograd.gradcheck(fm, rows)


@pytest.mark.parametrize(("dim", "width"), [(10, 12), (3, 4), (4, 8), (0, 4)])
@pytest.mark.parametrize("first_order", [True, False])
def test_the_kernel_adds_its_gradient_to_the_other_readers(
    dim: int, width: int, first_order: bool
) -> None:
    torch.manual_seed(1)
    rows = torch.randn(7, width, 3).transpose(1, 2)  # not contiguous
    others = torch.randn(7, 3, width)
    rows.requires_grad_()
    fm = FactorizationMachine(dim, first_order)
    logits, same = fm.with_rows(rows)
    assert logits.grad_fn is not None and "OnCPU" in logits.grad_fn.name()
    (logits.square().sum() + (same * others).sum()).backward()

    exact = rows.detach().double().requires_grad_()
    expected = exact[:, :, dim].sum(1) * float(first_order)
    for i, j in itertools.combinations(range(3), 2):
        expected = expected + (exact[:, i, :dim] * exact[:, j, :dim]).sum(1)
    (expected.square().sum() + (exact * others).sum()).backward()
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.grad.double(), exact.grad, atol=1e-4, rtol=1e-5)


def test_pairs_across_the_sides_are_those_of_different_ones() -> None:
    rows = torch.randn(8, 5, 6, dtype=torch.float64, requires_grad=True)
    is_item_field = [False, True, False, True, True]
    factors = rows[:, :, :3]
    pairs = sum(
        (factors[:, a] * factors[:, b]).sum(1)
        for a, b in itertools.combinations(range(5), 2)
        if is_item_field[a] != is_item_field[b]
    )
    for first_order in (True, False):
        fm = FactorizationMachine(3, first_order, is_item_field).double()
        expected = rows[:, :, 3].sum(1) + pairs if first_order else pairs
        torch.testing.assert_close(fm(rows), expected)
        assert torch.autograd.gradcheck(fm, rows)


SWITCHES = [s for s in itertools.product([True, False], repeat=3) if any(s)]
OF_ITEM = [False, True, True, False, True, False, True, False]


@pytest.mark.parametrize("is_item_field", [None, OF_ITEM])
@pytest.mark.parametrize(("first_order", "fm", "deep"), SWITCHES)
def test_logits_and_gradients_equal_the_plain_models(
    first_order: bool, fm: bool, deep: bool, is_item_field: list[bool] | None
) -> None:
    ours, plain = pair(first_order=first_order, fm=fm, deep=deep, is_item_field=is_item_field)
    bags, sparse, dense = example()
    logits, expected = ours(sparse, dense), plain(bags, dense)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    dim = ours.embedding_arch.embedding_dim
    for name, bag in ours.embedding_arch.ebc.embedding_bags.items():
        gradient = plain.tables[name].weight.grad
        assert gradient is not None
        if dim:
            torch.testing.assert_close(bag.weight.grad[:, :dim], gradient[:, :dim], **GRADIENTS)
        torch.testing.assert_close(bag.weight.grad[:, dim], gradient[:, -1], **GRADIENTS)
        assert (bag.weight.grad[:, dim + 1 :] == 0).all()  # padding stays out of it
    arch = ours.interaction_arch
    if arch.dense_factors is not None:
        torch.testing.assert_close(arch.dense_factors.grad, plain.dense_factors.grad, **GRADIENTS)
    for name, projection in zip(VECTORS, plain.projections, strict=True):
        gradient = projection.weight.grad
        assert gradient is not None
        if dim:
            actual = arch.get_parameter(f"vector_factors_{name}").grad
            torch.testing.assert_close(actual, gradient[:dim].T, **GRADIENTS)
        if first_order:
            actual = arch.get_parameter(f"vector_first_order_{name}").grad
            torch.testing.assert_close(actual, gradient[-1], **GRADIENTS)
    if isinstance(arch.over_arch, OverArch):
        torch.testing.assert_close(
            arch.over_arch.hidden[0].weight.grad, plain.mlp[0].weight.grad, **GRADIENTS
        )


def test_batch_norm_equals_pytorchs_in_training_and_inference() -> None:
    ours, plain = pair(batch_norm=True)
    bags, sparse, dense = example()
    for _ in range(3):
        torch.testing.assert_close(ours(sparse, dense), plain(bags, dense), rtol=1e-4, atol=1e-5)
    ours.eval()
    plain.eval()
    torch.testing.assert_close(ours(sparse, dense), plain(bags, dense), rtol=1e-4, atol=1e-5)


def test_weights_with_biases_before_batch_norm_keep_their_logits() -> None:
    _, plain = pair(batch_norm=True)
    bags, _, dense = example()
    with torch.no_grad():
        for module in plain.mlp:
            if isinstance(module, nn.Linear):
                module.bias.uniform_(-3, 3)
    for _ in range(3):
        plain(bags, dense)
    plain.eval()
    ours, _ = pair(batch_norm=True)
    assert not any("hidden" in n and "bias" in n for n, _ in ours.named_parameters())
    copy_weights(plain, ours)
    _, sparse, _ = example()
    torch.testing.assert_close(ours.eval()(sparse, dense), plain(bags, dense), rtol=1e-4, atol=1e-5)


def test_batch_norm_ignores_rows_of_weight_zero() -> None:
    x = torch.randn(6, 4)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0])
    padded, short = GlobalBatchNorm(4), GlobalBatchNorm(4)
    torch.testing.assert_close(padded(x, weights)[:4], short(x[:4]))
    torch.testing.assert_close(padded.running_var, short.running_var)


def test_batch_norm_of_padding_alone_takes_the_running_statistics_and_leaves_them() -> None:
    norm, x = GlobalBatchNorm(4), torch.randn(6, 4, requires_grad=True)
    norm(torch.randn(5, 4))
    running = norm.running_mean.clone(), norm.running_var.clone()
    out = norm(x, torch.zeros(6))
    (out.sum() * 0).backward()
    assert (norm.running_mean.equal(running[0]), norm.running_var.equal(running[1])) == (True, True)
    torch.testing.assert_close(out, norm.eval()(x))
    assert x.grad is not None
    assert not x.grad.any()


def _norm_on_a_rank(x: Tensor) -> tuple[Tensor, ...]:
    with process_group("cpu") as world:
        norm = GlobalBatchNorm(3, world.differentiable_gather)
        mine = x.chunk(world.world_size)[world.rank].clone().requires_grad_()
        out = norm(mine)
        (out**3).sum().backward()
        assert mine.grad is not None
        return out.detach(), mine.grad, norm.running_mean, norm.running_var


def test_batch_norm_over_two_ranks_equals_one_process() -> None:
    x = torch.randn(10, 3)
    whole = x.clone().requires_grad_()
    norm = nn.BatchNorm1d(3)
    out = norm(whole)
    (out**3).sum().backward()
    parts = run_ranks(_norm_on_a_rank, 2, x)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), out.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole.grad, rtol=1e-4, atol=1e-5)
    for _, _, mean, var in parts:
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(var, norm.running_var)


def test_xavier_weights_have_their_variance_and_zero_biases() -> None:
    torch.manual_seed(0)
    over_arch = OverArch(300, (500, 200), init="xavier_normal")
    for linear in (*over_arch.hidden, over_arch.output):
        std = (2 / sum(linear.weight.shape)) ** 0.5
        weights = linear.weight.detach()
        assert float(weights.std()) == pytest.approx(std, rel=0.1)
        assert float(weights.abs().max()) > 2 * std  # not uniform: that ends at 1.7 std
        assert not linear.bias.any()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid])
def test_activations_are_called_by_their_names(activation: type[nn.Module]) -> None:
    over_arch, x = OverArch(4, (3,), activation.__name__.lower()), torch.randn(5, 4)
    expected = over_arch.output(activation()(over_arch.hidden[0](x)))[:, 0]
    torch.testing.assert_close(over_arch(x), expected)


def test_loss_is_the_weighted_sum_of_cross_entropies() -> None:
    logits, labels = torch.tensor([2.0, -1, 0.5]), torch.tensor([1.0, 0, 0])
    weights = torch.tensor([1.0, 0, 2])
    p = torch.sigmoid(logits)
    expected = -(p[0].log() + 2 * (1 - p[2]).log())
    torch.testing.assert_close(weighted_bce_sum(logits, labels, weights), expected)


@pytest.mark.parametrize("dim", [0, 1, 3, 10, 127, 128])
def test_rows_are_padded_to_a_multiple_of_four(dim: int) -> None:
    arch = EmbeddingArch({"user": Table(3, ("user",))}, ["user"], dim)
    assert arch.row_width % 4 == 0
    assert dim < arch.row_width <= dim + 4
    factors, first = arch(
        KeyedJaggedTensor(["user"], torch.tensor([2, 0]), lengths=torch.tensor([1, 1]))
    )
    assert factors.shape == (2, 1, dim)
    assert first.shape == (2, 1)


def test_the_example_of_an_over_arch_crosses_its_input() -> None:
    torch.manual_seed(1)
    module = DCNv2(6, cross_layers=2, layer_sizes=[5, 4]).double()
    x0 = torch.randn(3, 6, dtype=torch.float64)
    x = x0
    for layer in module.cross.requires_grad_(False):  # equation 1 by elements
        rows = [
            [
                a[i] * (sum(layer.weight[i, j] * b[j] for j in range(6)) + layer.bias[i]) + b[i]
                for i in range(6)
            ]
            for a, b in zip(x0, x, strict=True)
        ]
        x = torch.tensor(rows, dtype=torch.float64)
    hidden = x0
    for linear in (module.mlp[0], module.mlp[3]):
        hidden = (hidden @ linear.weight.T + linear.bias).clamp(min=0)
    weight, bias = module.output.weight[0], module.output.bias
    expected = x @ weight[:6] + hidden @ weight[6:] + bias
    torch.testing.assert_close(module(x0), expected)
