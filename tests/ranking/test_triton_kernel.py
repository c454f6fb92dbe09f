"""The kernel for CUDA, run by Triton's interpreter, against float64, full sorts and itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.ranking.types import Precision
from tests.kernel_cases import Case, Ranking, error_of

triton = pytest.importorskip("deepfm_dist.ranking.engines.triton", exc_type=ModuleNotFoundError)
if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("a GPU is there: tests/test_gpu.py runs the kernel", allow_module_level=True)
CPU = torch.device("cpu")


sizes = st.lists(st.integers(1, 40), max_size=4)


def interpreted(case: Case, n_users: int, n_items: int, precision: Precision = "fp32") -> Ranking:
    engine = triton.TritonEngine(case.layers, precision, CPU)
    return Ranking(case, n_users, n_items, engine)


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 90), st.integers(0, 40), sizes, st.integers(0, 2**31))
def test_scores_equal_float64(
    n_users: int, n_items: int, dim: int, sizes: list[int], seed: int
) -> None:
    case = Case.of(n_users, n_items, dim, sizes, seed)
    actual = interpreted(case, n_users, n_items).scores()
    assert error_of(actual, case.expected(n_users, n_items)) <= 1e-5


@pytest.mark.parametrize(
    "sizes", [[400, 400, 400], [130, 70, 90, 33], [300, 200], [500], [17, 200, 300, 5]]
)
def test_layers_that_are_streamed_are_exact(sizes: list[int]) -> None:
    case = Case.of(3, 40, 10, sizes, seed=3)
    assert error_of(interpreted(case, 3, 40).scores(), case.expected(3, 40)) <= 1e-5


@settings(max_examples=8)
@given(
    st.integers(1, 7),
    st.integers(1, 200),
    sizes,
    st.integers(1, 25),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_top_k_equals_a_full_sort_of_the_same_scores(
    n_users: int, n_items: int, sizes: list[int], k: int, ties: bool, seed: int
) -> None:
    case = Case.of(n_users, n_items, 3, sizes, seed, ties)
    interpreted(case, n_users, n_items).check(k, (128,) if n_items > 128 else ())


def test_more_items_per_user_than_registers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "MOST_K", 4)
    interpreted(Case.of(6, 200, 5, [7, 3], seed=4), 6, 200).check(9, (128,))


@pytest.mark.slow  # Triton's interpreter
def test_splits_tiles_and_neighbours_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    n_users, n_items = 5, 300
    case = Case.of(n_users, n_items, 12, [33, 21, 10, 7], seed=1)
    alone = interpreted(case, n_users, n_items).top_k(17)
    for programs, cuts in ((1, ()), (2, (256,)), (2048, (128,))):
        monkeypatch.setattr(triton, "PROGRAMS", programs)
        again = interpreted(case, n_users, n_items).top_k(17, cuts)
        assert again.positions.equal(alone.positions)
        assert again.scores.equal(alone.scores)
    few = interpreted(case, 2, n_items)
    few.case = Case(case.users, case.items, case.layers, Jagged.from_pairs([], [], 2))
    scores = interpreted(case, n_users, n_items).scores()
    assert few.scores().equal(scores[:2])
    lean = interpreted(case, n_users, n_items)
    tiles = lean.engine._tiles
    while (tiles := tiles.leaner) is not None:
        lean.engine._tiles = tiles
        assert lean.scores().equal(scores)
    assert lean.engine._tiles.pairs == 16


@pytest.mark.parametrize("sizes", [[30, 20, 10], [400, 400, 400]])
def test_bf16_errors_are_within_the_documented_bounds(sizes: list[int]) -> None:
    case = Case.of(8, 64, 10, sizes, seed=5)
    expected = case.expected(8, 64)
    error = (interpreted(case, 8, 64, "bf16").scores().double() - expected).std()
    # Each number errs by up to 2^-9 of itself; of the many that a logit sums up, errors cancel.
    assert 1e-5 < float(error / expected.std()) < 2**-9


def in_tf32(x: torch.Tensor, rounded: bool) -> torch.Tensor:
    """Ten bits behind the point, what is beyond rounded or cut off, as tensor cores do."""
    bits = x.view(torch.int32) + (0x1000 if rounded else 0)
    return (bits & ~0x1FFF).view(torch.float32)


def product(x: torch.Tensor, w: torch.Tensor, precision: Precision) -> torch.Tensor:
    """What the kernel asks tensor cores for, which the interpreter makes in float32."""
    if precision == "bf16":
        return x.bfloat16().float() @ w.bfloat16().float()
    if precision == "tf32":
        return in_tf32(x, False) @ in_tf32(w, False)
    high_x, high_w = in_tf32(x, True), in_tf32(w, True)
    low_x, low_w = in_tf32(x - high_x, False), in_tf32(w - high_w, False)
    return low_x @ high_w + high_x @ low_w + high_x @ high_w


@pytest.mark.parametrize("sizes", [[30, 20, 10], [400, 400, 400], [400, 400, 400, 400]])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 2e-6), ("tf32", 3e-3), ("bf16", 1e-2)])
def test_what_tensor_cores_round_leaves_the_error_that_is_documented(
    sizes: list[int], precision: Precision, error: float
) -> None:
    case = Case.of(40, 200, 10, sizes, seed=9)
    users, items = [t[:40] for t in case.users.tensors], [t[:200] for t in case.items.tensors]
    x = (users[2][:, None] + items[2]).relu().flatten(0, 1)
    for weight, bias in case.layers[:-1]:
        x = (product(x, weight.float().T, precision) + bias.float()).relu()
    deep = (x @ case.layers[-1][0][0].float()).view(40, 200)
    actual = users[0][:, None] + items[0] + users[1] @ items[1].T + deep
    assert error / 10 < error_of(actual, case.expected(40, 200)) < error


def test_layers_that_are_too_wide_or_too_many_are_named() -> None:
    reason = triton.unsupported_reason
    assert reason([4000, 512, 4000], "fp32") is None
    assert reason([30, 513, 20], "fp32") == (
        "the hidden layer before the last has more than 512 units in fp32"
    )
    assert reason([30, 513, 20], "bf16") is None
    assert reason([30, 4000, 512, 20], "fp32") is None
    assert "1024 units in bf16" in (reason([30, 20, 1025, 20], "bf16") or "")
    assert reason([9] * 5, "fp32") == "the over-arch has 5 hidden layers, more than 4"


KERNELS = {
    **{
        f"{arch} {precision} 30-20-10": (0, True)
        for arch in ("sm_80", "sm_90", "sm_100")
        for precision in ("fp32", "tf32", "bf16")
    },
    "sm_90 fp32 30-20-10 --top-k 100": (0, True),
    "sm_90 fp32 30-20-10 --top-k 500": (0, True),
    "sm_90 fp32 30-20-10 --mode scores": (0, True),
    "sm_90 fp32 30-20-10 --mode candidates": (0, True),
    # Without a product: a single layer, and none.
    "sm_90 fp32 30": (0, False),
    "sm_90 fp32 none": (0, False),
    "sm_90 fp32 30-20": (0, True),
    "sm_90 fp32 40-30-20-10": (64, True),  # see docs/gpu.md
    "sm_90 tf32 40-30-20-10": (0, True),
    "sm_90 bf16 300-200-100-50": (0, True),
    "sm_90 tf32 300-200-100-50": (0, True),
    "sm_90 fp32 300-200-100-50": (496, True),  # half the pairs would spill more and double the work
    "sm_90 fp32 300-200": (0, True),
    "sm_90 tf32 300-200-100": (0, True),
    "sm_90 fp32 300-200-100": (784, True),
    "sm_90 tf32 400-400-400": (0, True),
    "sm_90 bf16 400-400-400-400": (256, True),
    "sm_100 bf16 300-200-100-50": (0, True),  # with smaller tiles: 128 pairs exceed tensor memory
    "sm_90 bf16 400-400-400": (216, True),  # twice the pairs share a reading of the weights
    "sm_90 fp32 400-400-400": (360, True),
    "sm_80 bf16 400-400-400": (0, True),
}
"""Bytes of a thread's registers that may be spilled, and whether tensor cores multiply."""


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, Any]]:
    """All of `KERNELS` compiled by LLVM and ptxas, without a GPU."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "compiled_kernels.py"), "--many"],
        input="\n".join(KERNELS),
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr
    actual = map(json.loads, result.stdout.splitlines())
    return dict(zip(KERNELS, actual, strict=True))


@pytest.mark.slow  # a minute for all
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_compiles_for_each_gpu_and_fits(
    kernels: dict[str, dict[str, Any]], kernel: str
) -> None:
    actual, (spilled, multiplies) = kernels[kernel], KERNELS[kernel]
    assert actual["shared_kib"] <= {"sm_80": 163, "sm_90": 227, "sm_100": 227}[kernel.split()[0]]
    assert actual["spilled_bytes"] <= spilled
    assert (actual["tensor_core_instructions"] > 0) == multiplies


@pytest.mark.slow  # as above
def test_another_number_of_users_or_items_compiles_nothing(
    kernels: dict[str, dict[str, Any]],
) -> None:
    [names] = {tuple(actual["compiled_again_for_another"]) for actual in kernels.values()}
    assert names == ("columns_per_split",)  # always whole tiles
