"""What tests and benchmarks rest on: routings are what they are called, budgets can fail."""

import pytest
import torch

from moelora_kernels.testing import ROUTINGS, assert_within_budget, draw_experts


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_routing_distributions(routing):
    tokens, experts, top_k = 4000, 8, 2
    chosen = draw_experts(routing, tokens, experts, top_k, torch.Generator().manual_seed(0))
    assert chosen.shape == (tokens, top_k)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    share = torch.bincount(chosen.flatten(), minlength=experts) / tokens
    if routing == "uniform":
        assert (share - top_k / experts).abs().max() < 0.05
    elif routing == "zipf":
        assert (share.diff() < 0.03).all()
        assert share[0] > 3 * share[-1] > 0
    elif routing == "skewed":
        assert share[0] > 0.6
        assert share[1:].min() > 0.1
    elif routing == "one":
        assert share[0] == 1
        assert share[1:].min() > 0.1
    elif routing == "empty":
        assert share[-1] == 0
        assert share[:-1].min() > 0.2
    else:
        pytest.fail(f"say here what {routing} promises")


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_no_tokens_and_all_experts(routing):
    generator = torch.Generator().manual_seed(0)
    assert draw_experts(routing, 0, 4, 2, generator).shape == (0, 2)
    available = 3 if routing == "empty" else 4
    chosen = draw_experts(routing, 5, 4, available, generator)
    assert all(sorted(row) == list(range(available)) for row in chosen.tolist())
    for top_k in (0, available + 1):
        with pytest.raises(ValueError, match=f"top_k: expected 1 to {available} with routing"):
            draw_experts(routing, 5, 4, top_k, generator)


def test_an_unknown_routing_is_named():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"routing: expected one of uniform, .* got 'round'"):
        draw_experts("round", 5, 4, 2, generator)
    with pytest.raises(ValueError, match="experts: expected at least 1, got 0"):
        draw_experts("uniform", 5, 0, 1, generator)


def test_a_budget_fails_where_it_should():
    """Twice the error of the yardstick passes, a little more does not; NaN and shapes neither."""
    truth = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    yardstick = {"y": torch.tensor([1.0, -2.25])}
    assert_within_budget({"y": torch.tensor([1.5, -2.0])}, truth, yardstick, torch.float32)
    for wrong, reason in (
        ([1.501, -2.0], "y: error .* exceeds"),
        ([1.0, torch.nan], "y: non-finite"),
        ([1.0], "y: .*expected"),
    ):
        with pytest.raises(AssertionError, match=reason):
            assert_within_budget({"y": torch.tensor(wrong)}, truth, yardstick, torch.float32)
    with pytest.raises(KeyError):
        assert_within_budget({}, truth, yardstick, torch.float32)
