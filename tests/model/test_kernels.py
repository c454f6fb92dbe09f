"""The MLP's CPU kernel against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepfm_dist.model import kernels
from deepfm_dist.model.over_arch import OverArch
from deepfm_dist.vector_code import HAS_FMA

pytestmark = pytest.mark.skipif(not HAS_FMA, reason="the kernel needs multiply-add")


def over_arch(layers: list[int], dropout: float = 0.0, dim: int = 5) -> tuple[OverArch, Tensor]:
    """An over-arch, and 2,100 rows of 3 fields with three columns that do not count."""
    torch.manual_seed(3)
    return OverArch(3 * dim, layers, dropout=dropout), torch.randn(2100, 3, 8)


def exact(arch: OverArch, rows: Tensor, dim: int, masks: list[Tensor] | None = None) -> list[Any]:
    """Output, its gradient by the rows, and by the parameters, in float64."""
    twin = OverArch(arch.layers[0].in_features, [h.out_features for h in arch.hidden]).double()
    twin.load_state_dict({k: v.double() for k, v in arch.state_dict().items()})
    x = rows.detach().double().requires_grad_()
    out = x[:, :, :dim].flatten(1)
    for layer, linear in enumerate(twin.hidden):
        out = linear(out).clamp(min=0)
        out = out if masks is None else out * masks[layer]
    out = twin.output(out).squeeze(1)
    (out * loss_weights(len(rows)).double()).sum().backward()
    return [out, x.grad, *(p.grad for p in twin.parameters())]


def loss_weights(n: int) -> Tensor:
    """``[n]`` the gradient by the output."""
    return torch.linspace(-1, 1, n) + 0.3


def by_kernel(arch: OverArch, rows: Tensor) -> list[Any]:
    """The same by the kernel."""
    rows = rows.detach().clone().requires_grad_()
    out = arch.forward_rows(rows)
    assert out.grad_fn is not None and "MLPOnCPU" in out.grad_fn.name()
    (out * loss_weights(len(rows))).sum().backward()
    return [out, rows.grad, *(p.grad for p in arch.parameters())]


@pytest.mark.parametrize("n", [1, 31, 256, 257, 2100])
@pytest.mark.parametrize("layers", [[30, 20, 10], [1], [11, 65], [256], [401, 18], []])
def test_the_mlps_output_and_gradients_equal_float64(n: int, layers: list[int]) -> None:
    arch, rows = over_arch(layers)
    for found, expected in zip(by_kernel(arch, rows[:n]), exact(arch, rows[:n], 5), strict=True):
        size = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(found.double() / size, expected / size, atol=3e-6, rtol=0)


def test_the_kernel_drops_the_units_that_torchs_layers_drop() -> None:
    arch, rows = over_arch([30, 20, 10], dropout=0.3)
    arch.dropout.key.fill_(-5)
    arch.dropout.first.fill_(1000)
    masks = list[Tensor]()
    sizes, first = [30, 20, 10], 0
    for size in sizes:
        mask = kernels.dropout_mask(np.arange(1000, 1000 + len(rows)), -5, first, size, 0.3)
        masks.append(torch.from_numpy(mask).double())
        first += size
    expected = exact(arch, rows, 5, masks)
    for found, wanted in zip(by_kernel(arch, rows), expected, strict=True):
        size = wanted.abs().max().clamp(min=1)
        torch.testing.assert_close(found.double() / size, wanted / size, atol=3e-6, rtol=0)
    torch.testing.assert_close(
        arch(rows[:, :, :5].flatten(1)).double(), expected[0], atol=1e-5, rtol=0
    )
    arch.eval()
    torch.testing.assert_close(arch.forward_rows(rows), arch(rows[:, :, :5].flatten(1)))


def test_dropping_every_unit_leaves_the_outputs_bias() -> None:
    arch, rows = over_arch([30, 20], dropout=1.0)
    results = by_kernel(arch, rows)
    torch.testing.assert_close(results[0], arch.output.bias.expand(len(rows)))
    assert not results[1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_output_of_its_row_alone(value: float) -> None:
    arch, rows = over_arch([30, 20])
    expected = arch.forward_rows(rows).detach()
    rows[40, 1, 2] = value
    found = arch.forward_rows(rows).detach()
    assert not found[40].isfinite()
    others = torch.arange(len(rows)) != 40
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0)


def test_scores_do_not_depend_on_the_position_in_a_batch() -> None:
    arch, rows = over_arch([30, 20, 10])
    whole = arch.forward_rows(rows)
    torch.testing.assert_close(arch.forward_rows(rows[77:99]), whole[77:99], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"batch_norm": True}])
def test_other_over_archs_take_torchs_layers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    arch = OverArch(15, [8], **options)
    out = arch.forward_rows(torch.randn(9, 3, 8))
    assert out.grad_fn is not None and "MLPOnCPU" not in out.grad_fn.name()


def test_the_notebooks_layers_learn_by_the_kernel_as_by_torch() -> None:
    arch, rows = over_arch([30, 20, 10])
    labels = (rows[:, 0, 0] * rows[:, 1, 1] > 0).float()
    twin = OverArch(15, [30, 20, 10]).double()
    twin.load_state_dict({k: v.double() for k, v in arch.state_dict().items()})
    losses = []
    for model, x in ((arch, rows), (twin, rows.double()[:, :, :5].flatten(1))):
        forward = model.forward_rows if model is arch else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(forward(x), labels.to(x.dtype))
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.6
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
