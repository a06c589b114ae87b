"""check_trainable names what does not train, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    check_trainable,
    collect_aux_loss,
    replace_linears,
    set_tasks,
)
from support.linears import randomise, small_config

NAMES = ("called", "read", "skipped", "unused", "cut", "without_grad", "multiplied")


class Every(nn.Module):
    """One layer for every way to leave experts out."""

    def __init__(self, **options):
        super().__init__()
        for name in NAMES:
            self.add_module(name, MoeLoraLinear(8, 8, config=small_config(**options)))

    def forward(self, x):
        self.unused(x)
        with torch.no_grad():
            y = self.without_grad(x)
        y = y + self.called(x) + self.cut(x).detach() + 0 * self.multiplied(x)
        return linear(y, self.read.weight, self.read.bias)


def test_every_layer_that_is_left_out_is_named_with_the_reason() -> None:
    report = check_trainable(Every(), torch.randn(6, 8))
    assert not report.ok
    assert set(report.not_called) == {"read", "skipped"}
    assert "Every.forward reads its weight" in report.not_called["read"]
    assert "not called in this step" in report.not_called["skipped"]
    assert set(report.unreached) == {"unused", "cut", "without_grad", "multiplied"}
    assert "never reached the loss" in report.unreached["unused"]
    assert "never reached the loss" in report.unreached["cut"]
    assert "torch.no_grad" in report.unreached["without_grad"]
    assert "gradient of its output is zero" in report.unreached["multiplied"]
    parts = {name.split(".")[0] for name in report.without_gradient}
    assert parts == set(NAMES) - {"called"}
    assert all(name.startswith("called.") for name in report.expected)
    for name in set(NAMES) - {"called"}:
        assert name in str(report)


def test_a_zero_b_is_expected_and_other_reasons_are_not() -> None:
    layer = MoeLoraLinear(8, 8, config=small_config())
    report = check_trainable(layer, torch.randn(6, 8))
    assert report.ok
    assert set(report.expected) == {"lora_A", "router.weight", "router.bias"}
    assert all("B is zero" in reason for reason in report.expected.values())
    assert not check_trainable(randomise(layer), torch.randn(6, 8)).expected


SOFTMAX = dict(score="softmax", normalize="sum", top_k=None)


@pytest.mark.filterwarnings("ignore:config. the router gets no gradient")
@pytest.mark.parametrize(
    ("options", "reason"),
    (
        (dict(top_k=1), "divided by itself, is 1). Set score='softmax'"),
        (dict(num_experts=1, top_k=1), "One expert needs none: pass router=None"),
        (dict(normalize="one"), "every kept expert has the gate 1"),
        # Their gradient is the rounding of a score divided by itself.
        (dict(top_k=1, score="sigmoid", normalize="sum"), "divided by itself, is 1"),
        (dict(top_k=1, select="sampling"), "divided by itself, is 1"),
        (SOFTMAX | dict(select="topp", top_p=0.25), "reaches top_p alone"),
        (SOFTMAX | dict(select="threshold", threshold=0.6), "at most one probability is above 0.5"),
        (SOFTMAX | dict(top_k=1, shared_expert="complement"), "divided by itself, is 1"),
        (dict(top_k=1, normalize="none", score="softmax"), None),
        (dict(top_k=2), None),
    ),
)
def test_a_router_with_a_constant_weight_is_named(options, reason) -> None:
    layer = randomise(MoeLoraLinear(8, 8, config=small_config(**options)))
    report = check_trainable(nn.Sequential(layer), torch.randn(6, 8))
    assert report.ok == (reason is None)
    if reason is not None:
        assert set(report.without_gradient) == {"0.router.weight", "0.router.bias"}
        assert all(reason in text for text in report.without_gradient.values())


@pytest.mark.filterwarnings("ignore:config. the router gets no gradient")
def test_a_router_that_only_another_loss_trains() -> None:
    options = dict(top_k=1, score="sigmoid", normalize="sum")
    model = nn.Sequential(
        randomise(MoeLoraLinear(8, 8, config=small_config(aux={"z": 1.0}, **options)))
    )
    report = check_trainable(model, torch.randn(6, 8))
    assert report.ok
    assert "add collect_aux_loss(model) to the loss" in report.expected["0.router.weight"]
    with_aux = check_trainable(
        model, torch.randn(6, 8), lambda y: y.square().mean() + collect_aux_loss(model)
    )
    assert with_aux.ok
    assert not with_aux.expected
    # A loss of the logits that the config does not know.
    plain = nn.Sequential(randomise(MoeLoraLinear(8, 8, config=small_config(**options))))
    report = check_trainable(
        plain, torch.randn(6, 8), lambda y: y.mean() + plain[0].record.logits.square().mean()
    )
    assert report.ok
    assert not report.expected


def test_a_frozen_router_of_the_user_is_expected() -> None:
    router = nn.Linear(8, 2).requires_grad_(False)
    model = nn.Sequential(MoeLoraLinear(8, 8, config=small_config(router=router)))
    report = check_trainable(model, torch.randn(6, 8))
    assert report.ok
    assert "router that you passed is frozen" in report.expected["0.router.weight"]


def test_frozen_parameters_are_named() -> None:
    model = nn.Sequential(MoeLoraLinear(8, 8, config=small_config()))
    model[0].lora_B.requires_grad_(False)
    report = check_trainable(model, torch.randn(6, 8))
    assert set(report.without_gradient) == {"0.lora_B"}
    assert "requires_grad is False" in report.without_gradient["0.lora_B"]
    model.requires_grad_(False)
    report = check_trainable(model, torch.randn(6, 8))
    assert len(report.without_gradient) == 4
    assert not report.ok
    frozen = MoeLoraLinear(8, 8, config=small_config(freeze="A"))
    report = check_trainable(nn.Sequential(frozen), torch.randn(6, 8))
    assert report.ok
    assert "freeze='A'" in report.expected["0.lora_A"]


def test_experts_without_a_token_are_named() -> None:
    layer = MoeLoraLinear(8, 8, num_experts=4, rank=2, router="external")
    set_tasks(layer, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))
    report = check_trainable(nn.Sequential(layer), torch.randn(6, 8))
    assert report.ok
    assert report.unselected == {"0": [1, 3]}
    assert "experts 1, 3" in str(report)
    set_tasks(layer, torch.zeros(1, 4))
    report = check_trainable(nn.Sequential(randomise(layer)), torch.randn(6, 8))
    assert all("no token" in reason for reason in report.expected.values())


def test_a_base_without_a_gradient_for_x_is_named() -> None:
    class Codes(nn.Module):
        in_features = out_features = 8

        def forward(self, x):
            return x.detach() * 2

    model = nn.Sequential(nn.Linear(8, 8), Codes())
    replace_linears(model, small_config(), ["0", "1"])
    with pytest.warns(UserWarning, match="without a gradient"):
        report = check_trainable(model, torch.randn(6, 8))
    assert report.cut_bases == ("1",)
    assert "base without gradient: 1" in str(report)


def test_batches_and_losses() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = MoeLoraLinear(8, 8, config=small_config())

        def forward(self, x, scale, labels=None):
            y = scale * self.q(x)
            return {"logits": y, "loss": None if labels is None else (y - labels).square().mean()}

    model, x = Model(), torch.randn(6, 8)
    y = model.q(x).detach()
    half = check_trainable(model, {"x": x, "scale": 0.5, "labels": torch.zeros(6, 8)})
    assert half.loss == pytest.approx((0.5 * y).square().mean().item())
    whole = check_trainable(model, (x, 1.0))
    assert whole.loss == pytest.approx(y.square().mean().item())
    total = check_trainable(model, [x, 1.0], lambda output: output["logits"].sum())
    assert total.loss == pytest.approx(y.sum().item(), rel=1e-4)
    with pytest.raises(ValueError, match="loss_fn: expected a loss with one element"):
        check_trainable(model, (x, 1.0), lambda output: output["logits"])
    with pytest.raises(ValueError, match="expected a model with mixture layers"):
        check_trainable(nn.Linear(8, 8), x)


@pytest.mark.parametrize("batch", (None, DataLoader([torch.zeros(8)])), ids=type)
def test_a_batch_that_is_missing_is_named(batch) -> None:
    layer = MoeLoraLinear(8, 8, config=small_config())
    with pytest.raises(TypeError, match=r"^batch: expected .*, got <.*; pass one batch, or \(\)"):
        check_trainable(layer, batch)


def test_a_model_without_arguments() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = MoeLoraLinear(8, 8, config=small_config())

        def forward(self):
            return self.q(torch.ones(2, 8))

    assert check_trainable(Model(), ()).ok


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.q = MoeLoraLinear(8, 8, config=small_config())

    def forward(self, x):
        return checkpoint(self.q, x, use_reentrant=self.use_reentrant)


def test_activation_checkpointing() -> None:
    x = torch.randn(6, 8)
    assert check_trainable(Checkpointed(False), x).ok
    assert check_trainable(Checkpointed(True), x.clone().requires_grad_()).ok
    with pytest.warns(UserWarning, match="None of the inputs"):
        report = check_trainable(Checkpointed(True), x)
    assert "reentrant" in report.unreached["q"]


def test_whole_ffn_experts_and_adapters() -> None:
    ffn = MoeLoraFFN(8, 12, config=MoeLoraConfig.preset("mixlora", num_experts=2, rank=2))
    adapter = MoeLoraAdapter(nn.Linear(8, 8), 8, MoeLoraConfig.preset("pesc", num_experts=2))
    model = nn.Sequential(ffn, adapter)
    report = check_trainable(model, torch.randn(6, 8))
    assert report.ok, report
    assert {"0.gate_lora_A", "0.up_lora_A", "0.down_lora_A", "1.lora_A"} <= set(report.expected)
    assert not check_trainable(randomise(model), torch.randn(6, 8)).expected


def test_a_shared_router_is_named_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    replace_linears(model, MoeLoraConfig.preset("moelora", num_tasks=3), ["0", "1"])
    set_tasks(model, [1, 2])
    report = check_trainable(model, torch.randn(2, 8))
    assert report.ok
    assert sorted(report.expected) == [
        "0.lora_A", "0.router.embedding.weight", "0.router.gate.weight", "1.lora_A",
    ]  # fmt: skip


def test_compiled_and_averaged_models_have_portable_names() -> None:
    model = Every()
    plain = check_trainable(model, torch.randn(6, 8))
    for wrapped in (torch.compile(model), torch.optim.swa_utils.AveragedModel(model)):
        report = check_trainable(wrapped, torch.randn(6, 8))
        assert report.not_called == plain.not_called
        assert report.unreached == plain.unreached
    model.compile()
    assert check_trainable(model, torch.randn(6, 8)).not_called == plain.not_called


def test_distributed_data_parallel(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = Every()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        x = torch.randn(6, 8)
        report = check_trainable(wrapped, x)
        assert set(report.not_called) == {"read", "skipped"}
        for _ in range(2):
            wrapped(x).sum().backward()
            check_trainable(wrapped, x)
    finally:
        torch.distributed.destroy_process_group()


def test_adapters_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return linear(self.q(x), self.k.weight)

    config = MoeLoraPeftConfig(target_modules=["q", "k", "v"], num_experts=2, rank=2)
    with pytest.warns(UserWarning, match="k: the forward of"):
        model = peft.get_peft_model(Model(), config)
    with pytest.warns(UserWarning, match="k: the forward of"):
        model.add_adapter("other", config)
    report = check_trainable(model, torch.randn(6, 8))
    names = {name.removesuffix(".moelora_experts.default") for name in report.not_called}
    assert names == {"base_model.model.k", "base_model.model.v"}
    assert "Model.forward reads its weight" in str(report)
    assert not any("other" in name for name in report.layers)
    with model.disable_adapter():
        report = check_trainable(model, torch.randn(6, 8))
    assert all("its adapter is switched off" in reason for reason in report.not_called.values())
