"""Interrupted forwards, and forwards in several threads: each loss has the calls of its forward."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moelora_kernels import (
    MoeLoraConfig,
    adapter_parameters,
    check_trainable,
    collect_aux_loss,
    record_routing,
    replace_linears,
    warmup,
)
from moelora_kernels.nn.forward_hooks import RUNNING
from moelora_kernels.nn.layer import mixture_layers
from support.branches import AUX, Branches, Outer, branches, loss_of, tokens


class Interrupted(Branches):
    def forward(self, x, path="abc"):
        x = super().forward(x, path.rstrip("!"))
        if path.endswith("!"):
            raise KeyboardInterrupt
        return x


def interrupted():
    model = Interrupted()
    replace_linears(model, MoeLoraConfig(**AUX), ["a", "b", "c"])
    with pytest.raises(KeyboardInterrupt):
        model(tokens(seed=3), "ab!")
    return model


def test_an_interrupted_forward_counts_for_nothing():
    model, x = interrupted(), tokens()
    model(x, "a")
    assert len(RUNNING.stack) == 0
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


def test_no_loss_of_an_interrupted_forward():
    model = interrupted()
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(model)


def test_an_interrupted_forward_of_a_model_around_the_part():
    inner, x = branches(), tokens()
    outer = Outer(inner)
    adapter_parameters(outer)
    outer.head.register_forward_pre_hook(lambda layer, args: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        outer(x, "abc")
    inner(x, "b")
    torch.testing.assert_close(collect_aux_loss(inner), loss_of(inner, ("b", x)))


def test_training_while_another_thread_evaluates():
    model, stop = branches(), threading.Event()

    def evaluate():
        x = tokens(7, seed=3)
        with torch.no_grad():
            while not stop.is_set():
                model(x, "abc")

    x = tokens()
    model(x, "ab")
    expected = collect_aux_loss(model).detach()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(evaluate)
        try:
            for _ in range(100):
                model(x, "ab")
                torch.testing.assert_close(collect_aux_loss(model).detach(), expected)
        finally:
            stop.set()
        running.result()


def test_two_threads_that_train():
    model = branches()
    barrier = threading.Barrier(2)

    def train(name):
        x = tokens(4 if name == "a" else 9, seed=ord(name))
        for _ in range(20):
            barrier.wait(30)
            model(x, f"{name}c")
            barrier.wait(30)
            loss = collect_aux_loss(model)
        return x, loss

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip("ab", pool.map(train, "ab"), strict=True))
    for name, (x, loss) in results.items():
        hidden = getattr(model, name)(x).detach()
        torch.testing.assert_close(loss, loss_of(model, (name, x), ("c", hidden)))


def test_a_forward_in_another_thread_can_be_read():
    model, x = branches(), tokens()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model, x, "a").result()
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


def test_contexts_of_two_threads_end_in_any_order():
    model, x = branches(aux=()), tokens()
    first = record_routing(model)
    first.__enter__()

    def other():
        with record_routing(model):
            model(x, "a")
            first.__exit__(None, None, None)
            model(x, "a")
            return len(model.a.record.last)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result() == 1
    assert not any(layer.record.is_on for layer in mixture_layers(model))
    assert model.a.record.weights is None


@pytest.mark.parametrize("run", (warmup, lambda m: check_trainable(m, tokens())))
def test_a_pending_loss_survives(run):
    model, x = branches(), tokens()
    model(x, "ab")
    expected = collect_aux_loss(model).detach()
    model(x, "ab")
    run(model)
    torch.testing.assert_close(collect_aux_loss(model).detach(), expected)
