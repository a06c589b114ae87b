"""Whole-FFN experts: what forward saves, what a step allocates, and how often the linears run."""

import pytest
import torch
from torch import nn

from support.backends import needs_library
from support.compare import assert_same, training_step
from support.ffns import HIDDEN, INNER, GatedMlp, inputs, make_ffn


def saved_bytes(layer, tokens):
    """Bytes of the storages saved for backward that are neither x nor parameters."""
    x = inputs(tokens)[0].requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_memory_of_the_grouped_form_grows_with_k_and_not_with_e():
    """Two [T K, F] for the activation and little else; with recompute two [T, F]."""
    tokens, options = 128, dict(rank=1, bias=False, impl="grouped")
    of_experts = {e: saved_bytes(make_ffn(num_experts=e, **options), tokens) for e in (4, 16)}
    # The logits are what grows with E.
    assert of_experts[16] - of_experts[4] <= 3 * tokens * 12 * 8
    wide = tokens * INNER * 8
    of_slots = {k: saved_bytes(make_ffn(top_k=k, **options), tokens) for k in (1, 2, 3)}
    for more, fewer in ((2, 1), (3, 2)):
        assert 2 * wide <= of_slots[more] - of_slots[fewer] < 3 * wide
    recomputed = {
        k: saved_bytes(make_ffn(top_k=k, recompute=True, **options), tokens) for k in (1, 2, 3)
    }
    assert recomputed[3] - recomputed[2] < wide
    assert recomputed[3] < of_slots[3] - 3 * wide


@needs_library
def test_memory_of_the_fused_form_does_not_grow_with_f_times_k():
    """gate_out and up_out [T, F]; rank space and routing of the pairs."""
    tokens, wide = 128, 128 * INNER * 8
    of_slots = {k: saved_bytes(make_ffn(rank=1, bias=False, top_k=k), tokens) for k in (1, 2, 3)}
    # summed [T, F] is saved by the frozen down product, if its weight has a gradient: it has none.
    assert 2 * wide <= of_slots[1] < 4 * wide
    assert of_slots[3] - of_slots[2] < wide
    assert abs((of_slots[3] - of_slots[2]) - (of_slots[2] - of_slots[1])) < wide / 10


class Act(nn.SiLU):
    """An activation that the fused form does not know."""


def largest_allocation(layer, x, dy):
    """Return the bytes of the largest allocation of a training step."""
    training_step(layer, x, dy)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        training_step(layer, x, dy)
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@needs_library
@pytest.mark.parametrize("top_k", (2, 4))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_a_training_step_allocates_no_tensor_of_pairs_times_features(dropout, top_k):
    """The largest tensor of a step has T F elements, for each number of slots."""
    tokens, features = 96, 1024
    mlp = GatedMlp(HIDDEN, features).bfloat16()
    options = dict(rank=2, top_k=top_k, dropout=dropout)
    layer = make_ffn(torch.bfloat16, mlp, **options)
    x, dy = inputs(tokens, dtype=torch.bfloat16)
    assert largest_allocation(layer, x, dy) == tokens * features * 2
    # The measurement sees the matrices of pairs of another activation.
    layer.act_fn = Act()
    assert largest_allocation(layer, x, dy) >= tokens * top_k * features * 2


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_recompute_changes_no_bit(dtype, dropout):
    options = dict(dropout=dropout, dropout_mask="per_expert", impl="grouped")
    layer, recomputing = (make_ffn(dtype, recompute=r, **options) for r in (False, True))
    x, dy = inputs(5, 4, dtype=dtype)
    assert_same(training_step(recomputing, x, dy), training_step(layer, x, dy))


@pytest.mark.parametrize("options", ({}, dict(top_k=4), dict(top_k=None)), ids=str)
def test_three_frozen_products(options):
    """Each linear is called once, on T rows, whatever K is; in evaluation as well."""
    layer = make_ffn(**options)
    calls = []
    for name in ("gate", "up", "down"):
        linear = getattr(layer, f"{name}_proj")
        linear.register_forward_hook(lambda m, args, y, n=name: calls.append((n, *args[0].shape)))
    layer(inputs(2, 3)[0])
    expected = [("gate", 2, 3, HIDDEN), ("up", 2, 3, HIDDEN), ("down", 2, 3, INNER)]
    assert calls == expected
    with torch.no_grad():
        layer.eval()(inputs(2, 3)[0])
    assert calls == 2 * expected
