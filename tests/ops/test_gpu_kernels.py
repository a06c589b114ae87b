"""The Triton kernels and the layers made of them at real sizes, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels import ops, reference
from moelora_kernels.functional import run_layer
from moelora_kernels.kernels import (
    dropout,
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    topk_gate,
    weight_grad,
)
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import LinearTensors, Mixture
from support import layers
from support.gpu_cases import DEVICE, draw_inputs, each_half, each_large, layer_of
from support.op_cases import CASES, Inputs, compare, forward_of, opcheck

pytestmark = pytest.mark.gpu


@each_half
@each_large
def test_kernels(name: str, dtype: torch.dtype) -> None:
    """Every op on what the reference gives it, with the parts that fill this chip; twice."""
    inputs = draw_inputs(name, dtype)
    compare(
        "h u weights indices logits",
        shrink_gate.launch,
        reference.shrink_gate,
        inputs.shrink(),
        dtype,
    )
    forward = forward_of(inputs)
    arguments = inputs.backward(forward)
    compare(
        "dh u dgate",
        shrink_gate_backward.launch,
        reference.shrink_gate_backward,
        arguments,
        dtype,
    )
    back = reference.shrink_gate_backward(*arguments)
    arguments = inputs.weight_grad(forward, back)
    compare("da drouter dbias db", weight_grad.launch, reference.weight_grad, arguments, dtype)
    compare("dx", shrink_dx.launch, reference.shrink_dx, inputs.shrink_dx(back), dtype)


@each_half
@each_large
def test_layer(name: str, dtype: torch.dtype) -> None:
    """The ops one after the other with cuBLAS between them: y, dx and every gradient by name."""
    layer = layer_of(draw_inputs(name, dtype))
    truth = layer.to(torch.float64).reference()
    assert_within_budget(layer.run(), truth, layer.reference(), dtype)


@each_half
@pytest.mark.parametrize("sizes", ((8192, 8, 2), (1000, 64, 6), (17, 200, 8)), ids=str)
def test_topk_gate(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Logits from anywhere; in bfloat16 many are equal, and the lower expert comes first."""
    tokens, experts, top_k = sizes
    logits = torch.randn(tokens, experts, device=DEVICE).to(dtype)
    arguments = [logits, top_k, True, 0.8]
    compare("weights indices", topk_gate.launch, reference.topk_gate, arguments, dtype)
    weights, indices = reference.topk_gate(*arguments)
    arguments = [torch.randn_like(weights), weights, indices, logits, True, 0.8]
    compare("dlogits", topk_gate.launch_backward, reference.topk_gate_backward, arguments, dtype)


@each_half
def test_dropout_is_the_reference_bit_by_bit(dtype: torch.dtype) -> None:
    """The mask of a seed is the same on every device, and at every position."""
    x = torch.randn(1000, 4099, device=DEVICE).to(dtype)
    seed = torch.tensor([2**62 + 12345], device=DEVICE)
    # On a GPU torch divides by a number by multiplying with its reciprocal.
    expected = reference.dropout(x.cpu(), 0.1, seed.cpu(), 3)
    assert torch.equal(dropout.launch(x, 0.1, seed, 3).cpu(), expected)


@pytest.mark.parametrize("name", ("plain", "siblings", "all_experts", "rows_int64", "dropout"))
def test_opcheck(name: str) -> None:
    """Schema and fake hold for the kernels: no input changed, no alias, sizes and strides."""
    inputs = Inputs(CASES[name], torch.bfloat16).to(DEVICE)
    checks = ("test_schema", "test_faketensor")
    arguments = inputs.shrink()
    opcheck("shrink_gate", arguments, test_utils=checks)
    forward = ops.shrink_gate(*arguments)
    arguments = inputs.backward(forward)
    opcheck("shrink_gate_backward", arguments, test_utils=checks)
    back = ops.shrink_gate_backward(*arguments)
    opcheck("weight_grad", inputs.weight_grad(forward, back), test_utils=checks)
    opcheck("shrink_dx", inputs.shrink_dx(back), test_utils=checks)


def require_memory(needed: int) -> None:
    """Skip where so many bytes are not free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(DEVICE)
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, found {free >> 30}")


def word(seed: int, stream: int, element: int) -> int:
    """The random word of one element: `reference.dropout` in whole numbers of any size."""
    words = [element // 4 & reference.gates.UINT32, element // 4 >> 32, stream, 0]
    key = [seed & reference.gates.UINT32, seed >> 32 & reference.gates.UINT32]
    for _ in range(reference.gates.PHILOX_ROUNDS):
        left = words[0] * reference.gates.PHILOX_MULTIPLIERS[0]
        right = words[2] * reference.gates.PHILOX_MULTIPLIERS[1]
        words = [
            right >> 32 ^ words[1] ^ key[0], right & reference.gates.UINT32,
            left >> 32 ^ words[3] ^ key[1], left & reference.gates.UINT32,
        ]  # fmt: skip
        key = [
            k + step & reference.gates.UINT32
            for k, step in zip(key, reference.gates.PHILOX_KEY_STEPS, strict=True)
        ]
    return words[element % 4]


def test_masks_past_2_to_the_31_elements() -> None:
    """The mask of the last tokens, as the op draws it and as the shrink does beside its product."""
    T, I, p, seed = 262_400, 8192, 0.4, 2**40 + 7  # noqa: E741
    assert T * I > 2**31
    require_memory(3 * T * I * 2)
    x = torch.ones(T, I, device=DEVICE, dtype=torch.float16)
    columns = [*range(0, I, I // 16)]
    # Row r of A picks one column of x.
    a = x.new_zeros(16, I)
    a[range(16), columns] = 1
    of_seed = torch.tensor([seed], device=DEVICE)
    gates = x.new_ones(1, 1)
    h, *_ = shrink_gate.launch(
        x, [a], gates, None, None, [], [], [16], [1.0], False, 0, True, 1.0, p, False, of_seed
    )
    dropped = dropout.launch(x, p, of_seed, 0)
    for token in range(T - 20, T):
        kept = [word(seed, 0, token * I + i) >= dropout.threshold(p) for i in columns]
        assert (h[token] != 0).tolist() == kept
        assert (dropped[token, columns] != 0).tolist() == kept


@pytest.mark.parametrize("wide", ("in", "out"))
def test_more_than_2_to_the_31_elements(wide: str) -> None:
    """Offsets past 2^31 in x and dx, or in y and dy: the last rows, and the sums over the tokens.

    dy is zero but in the last rows, so that these alone make the gradients of the parameters.
    """
    T, many, few, last = 262_400, 8192, 64, 300
    assert T * many > 2**31
    I, O = (many, few) if wide == "in" else (few, many)  # noqa: E741
    require_memory(3 * T * many * 2)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, device=DEVICE, dtype=torch.float16).normal_(std=std)

    # Every expert is chosen, so that no rounding of a logit changes the routing.
    mixture = Mixture((4, 4), (0.5, 0.75), top_k=2)
    weight, a, router = (normal(rows, I, std=I**-0.5) for rows in (O, 8, 2))
    sibling = LinearTensors(weight, None, None, a, normal(O, 8, std=0.3), router, None)
    x, dy = normal(T, I), normal(T, O).zero_()
    dy[-last:] = normal(last, O)
    slices = layers.Case(mixture, x[-last:], [sibling], [dy[-last:]])

    for leaf in (x, sibling.lora_a, sibling.lora_b, router):
        leaf.requires_grad_()
    (y,), _ = run_layer(mixture, x, [sibling], impl="wide")
    y.backward(dy)
    found = {"y0": y[-last:], "dx": x.grad[-last:], "dA0": a.grad, "dB0": sibling.lora_b.grad}
    found["drouter0"] = router.grad
    with torch.no_grad():
        truth, yardstick = slices.to(torch.float64).reference(), slices.reference()
    assert_within_budget(found, truth, yardstick, torch.float16)
