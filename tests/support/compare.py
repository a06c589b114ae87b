"""A training step of a module or of a formula, and the comparison of two results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.testing import assert_within_budget

# float64 sums of at most a few hundred terms of size 1, in another order.
FLOAT64 = dict(rtol=1e-10, atol=1e-10)


def gradients(
    y: Tensor,
    x: Tensor,
    parameters: Iterable[tuple[str, Tensor]],
    dy: Tensor,
    unused_as_zero: bool = False,
) -> dict[str, Tensor]:
    """Return y, dx and the gradient of every parameter that trains, by name.

    A gradient is None, or zero with unused_as_zero, if y does not depend on the tensor.
    """
    trained = {name: q for name, q in parameters if q.requires_grad}
    grads = torch.autograd.grad(
        y,
        (x, *trained.values()),
        dy,
        allow_unused=True,
        materialize_grads=unused_as_zero,
    )
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def training_step(
    module: nn.Module,
    x: Tensor,
    dy: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = 3,
    unused_as_zero: bool = False,
) -> dict[str, Tensor]:
    """Return y, dx and the gradient of every parameter of the module that trains, by name.

    dy: the gradient of y, by default from -1 to 1.
    forward: x -> y, by default the module itself.
    seed: the seed of the dropout masks; None keeps the current random state.
    """
    if seed is not None:
        torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_()
    y = (module if forward is None else forward)(leaf)
    if dy is None:
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return gradients(y, leaf, module.named_parameters(), dy, unused_as_zero)


def backward_step(
    module: nn.Module,
    x: Tensor,
    dy: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the values of `training_step`, computed by y.backward(), which checkpoint() needs.

    Random numbers are drawn between forward and backward, like other layers of a model draw them.
    """
    torch.manual_seed(3)
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = (module if forward is None else forward)(leaf)
    torch.randn(3)
    if dy is None:
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    y.backward(dy)
    trained = {n: q.grad for n, q in module.named_parameters() if q.requires_grad}
    return {"y": y.detach(), "dx": leaf.grad, **trained}


def training_step_of_siblings(
    forward: Callable[[Tensor], Sequence[Tensor]],
    module: nn.Module,
    x: Tensor,
    dys: Sequence[Tensor | None],
) -> dict[str, Tensor]:
    """Return y0, y1, ..., dx and the gradients of a module with several outputs, by name.

    dys: one gradient per output; None leaves the output out of the loss.
    """
    leaf = x.clone().requires_grad_()
    ys = forward(leaf)
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    outputs, grads = zip(*pairs, strict=True)
    result = gradients(
        torch.cat([y.flatten() for y in outputs]),
        leaf,
        module.named_parameters(),
        torch.cat([dy.flatten() for dy in grads]),
    )
    del result["y"]
    return {**{f"y{i}": y.detach() for i, y in enumerate(ys)}, **result}


def formula_step(
    formula: Callable[[Tensor, dict[str, Tensor]], Tensor],
    module: nn.Module,
    x: Tensor,
    dy: Tensor,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Return the values of `training_step` for a formula, computed in dtype.

    formula: (x, the state dict of the module in dtype) -> y.
    """
    values = {name: q.detach().to(dtype) for name, q in module.state_dict().items()}
    for name, q in module.named_parameters():
        values[name].requires_grad_(q.requires_grad)
    leaf = x.detach().to(dtype).requires_grad_()
    return gradients(formula(leaf, values), leaf, values.items(), dy.to(dtype), unused_as_zero=True)


def check_formula(
    formula: Callable[[Tensor, dict[str, Tensor]], Tensor],
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    joined: Callable[[dict], dict] = dict,
) -> None:
    """Assert that a layer computes a formula: to 1e-10 in float64, within the budget below that.

    joined: joins small tensors of a result before the budget is applied.
    """
    expected = formula_step(formula, layer, x, dy)
    actual = training_step(layer, x, dy, seed=None)
    assert actual.keys() == expected.keys()
    if x.dtype == torch.float64:
        assert_same(actual, expected, **FLOAT64)
        return
    reference = copy.deepcopy(layer)
    reference.config = layer.config.replace(impl="reference")
    results = (actual, expected, training_step(reference, x, dy, seed=None))
    assert_within_budget(*map(joined, results), x.dtype)


def assert_same(actual: dict, expected: dict, **tolerance) -> None:
    """Assert the same names and the same tensors: bit by bit, or within a tolerance."""
    assert actual.keys() == expected.keys()
    tolerance = tolerance or dict(rtol=0, atol=0)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **tolerance, msg=name)
