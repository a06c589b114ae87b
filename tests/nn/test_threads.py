"""Threads that run one model at the same time: every thread gets its own outputs."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    collect_aux_loss,
    link_siblings,
    replace_linears,
    set_tasks,
)
from support import linears
from support.selection import exhaustive

THREADS = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, o) for o in (12, 6, 6))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def linked_attention(config):
    """Return the same layers unlinked and linked."""
    plain = Attention()
    replace_linears(plain, config, ["q_proj", "k_proj", "v_proj"])
    linears.randomise(plain)
    linked = copy.deepcopy(plain)
    link_siblings(linked)
    return plain, linked


@pytest.fixture
def short_turns():
    """Threads take turns after 10 microseconds, so that they interleave between two calls."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_threads(work):
    """Run work(i) in every thread; an error of a thread is raised here."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [*pool.map(work, range(THREADS))]


@pytest.mark.parametrize("calls", (3_000, pytest.param(32_000, marks=exhaustive)))
def test_linked_siblings(short_turns, calls):
    plain, linked = linked_attention(MoeLoraConfig.preset("ming", rank=2, aux="load_balance"))
    xs = torch.randn(THREADS, 4, 4, 12)
    expected = plain(xs).detach()

    def count_wrong(thread):
        inputs = [*xs[thread]]
        # x is shared by all threads in every fourth call.
        inputs[3] = xs[0, 3]
        outputs = [*expected[thread, :3], expected[0, 3]]
        wrong = 0
        with torch.no_grad():
            for i in range(calls // 3 // THREADS):
                wrong += not torch.allclose(linked(inputs[i % 4]), outputs[i % 4], atol=1e-5)
        return wrong

    assert sum(run_threads(count_wrong)) == 0


def test_linked_siblings_that_train(short_turns):
    plain, linked = linked_attention(MoeLoraConfig.preset("ming", rank=2))
    xs = torch.randn(THREADS, 4, 12)

    def gradients(model):
        def step(thread):
            x = xs[thread].clone().requires_grad_()
            for _ in range(20):
                x.grad = None
                model(x).sin().sum().backward()
            return x.grad

        return step

    expected = [gradients(plain)(thread) for thread in range(THREADS)]
    for grad, other in zip(run_threads(gradients(linked)), expected, strict=True):
        torch.testing.assert_close(grad, other)


def test_new_tasks_and_a_merge_reach_every_thread():
    config = MoeLoraConfig(num_experts=3, rank=2, router="task", num_tasks=4)
    plain, linked = linked_attention(config)
    x = torch.randn(2, 5, 12)
    with ThreadPoolExecutor(1) as other, torch.no_grad():
        for model in (plain, linked):
            set_tasks(model, [1, 2])
        other.submit(linked.q_proj, x).result()
        for model in (plain, linked):
            set_tasks(model, [3, 4])
        k = other.submit(linked.k_proj, x).result()
        torch.testing.assert_close(k, plain.k_proj(x))

        other.submit(linked.q_proj, x).result()
        linked.eval().k_proj.merge(task=1)
        merged = plain.eval().k_proj
        merged.merge(task=1)
        torch.testing.assert_close(other.submit(linked.k_proj, x).result(), merged(x))


def test_an_export_does_not_change_the_tasks_of_a_forward(short_turns):
    config = MoeLoraConfig(num_experts=3, rank=2, router="task", num_tasks=4)
    plain, _ = linked_attention(config)
    layer, x = plain.q_proj, torch.randn(2, 5, 12)
    set_tasks(plain, [1, 2])
    expected = layer(x).detach()

    def forward_or_export(thread):
        with torch.no_grad():
            for _ in range(100):
                if thread % 2:
                    layer.export_lora(task=4)
                else:
                    torch.testing.assert_close(layer(x), expected)

    run_threads(forward_or_export)


def test_copies_and_pickles_of_a_layer_that_threads_use():
    plain, linked = linked_attention(MoeLoraConfig.preset("ming", rank=2))
    x = torch.randn(4, 12)
    with ThreadPoolExecutor(1) as other:
        other.submit(linked.q_proj, x).result()
        for copied in (copy.deepcopy(linked), pickle.loads(pickle.dumps(linked))):
            torch.testing.assert_close(other.submit(copied, x).result(), plain(x))
            assert copied.q_proj.link.layers[0] is copied.q_proj


def test_a_changed_adapter_or_mode_between_two_calls():
    plain, linked = linked_attention(MoeLoraConfig.preset("ming", rank=2))
    x = torch.randn(4, 12)
    linked.q_proj(x)
    for model in (plain, linked):
        nn.init.ones_(model.k_proj.lora_B)
        nn.init.ones_(model.v_proj.router.bias[:2])
    torch.testing.assert_close(linked.k_proj(x), plain.k_proj(x))
    torch.testing.assert_close(linked.v_proj(x), plain.v_proj(x))
    with torch.inference_mode():
        linked.q_proj(x)
    with torch.no_grad():
        assert not linked.k_proj(x).is_inference()


def test_siblings_in_different_modes():
    plain, linked = linked_attention(MoeLoraConfig(rank=2, top_k=2, dropout=0.5))
    x = torch.randn(4, 12)
    linked.q_proj(x)
    linked.k_proj.eval()
    plain.eval()
    torch.testing.assert_close(linked.k_proj(x), plain.k_proj(x))


def test_a_sibling_that_a_forward_does_not_reach_adds_no_loss():
    plain, linked = linked_attention(MoeLoraConfig.preset("ming", rank=2, aux="load_balance"))
    x = torch.randn(4, 12)
    losses = []
    for model in (plain, linked):
        model.q_proj(x)
        losses.append(collect_aux_loss(model))
        losses[-1].backward()
        assert model.k_proj.router.weight.grad is None or not model.k_proj.router.weight.grad.any()
    torch.testing.assert_close(*losses)


def test_a_replica_of_a_linked_layer_runs_alone():
    plain, linked = linked_attention(MoeLoraConfig.preset("ming", rank=2))
    x = torch.randn(4, 12)
    replica = linked.q_proj._replicate_for_data_parallel()
    for name, parameter in linked.q_proj.named_parameters(recurse=False):
        setattr(replica, name, parameter.detach() * 2)
    with torch.no_grad():
        plain.q_proj.lora_A.mul_(2)
        plain.q_proj.lora_B.mul_(2)
    torch.testing.assert_close(replica(x), plain.q_proj(x))
