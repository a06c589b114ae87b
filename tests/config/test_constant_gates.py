"""A gate whose weights are constant does not train its router: layers warn."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    collect_aux_loss,
    replace_ffns,
    replace_linears,
    save_adapter,
    set_tasks,
)
from moelora_kernels.export import read_adapter
from moelora_kernels.presets import PRESETS
from support import linears

WARNING = "the router gets no gradient"

CONSTANT = {
    "ming": dict(score="identity", normalize="softmax", top_k=1),
    "mola": dict(top_k=1),
    "sigmoid": dict(top_k=1, score="sigmoid"),
    "abs": dict(top_k=1, score="abs"),
    "noise": dict(top_k=1, noise=0.1),
    "mlp": dict(top_k=1, router="mlp"),
    "task": dict(top_k=1, router="task", num_tasks=3),
    "sequence": dict(top_k=1, granularity="sequence"),
    "sampling": dict(top_k=1, select="sampling"),
    "sqrt": dict(top_k=1, grad_gate="sqrt"),
    "shared": dict(top_k=1, shared_expert="complement"),
    "weight_0": dict(top_k=1, aux={"load_balance": 0.0}),
    "one": dict(top_k=2, normalize="one"),
    "topp": dict(select="topp", top_p=0.25),
    "threshold": dict(select="threshold", threshold=0.6),
    "threshold_keep_min": dict(select="threshold", threshold=0.6, keep_min=1),
    "one_expert": dict(num_experts=1),
    "one_expert_softmax": dict(num_experts=1, normalize="none"),
    "module": dict(top_k=1, router=nn.Linear(8, 4)),
}
TRAINED = {
    "top_2": dict(top_k=2),
    "none": dict(top_k=1, normalize="none"),
    "entropy_threshold": dict(top_k=1, entropy_threshold=0.1),
    "topp": dict(select="topp", top_p=0.6),
    "topp_keep_min": dict(select="topp", top_p=0.25, keep_min=2),
    "threshold": dict(select="threshold", threshold=0.2),
    "one_expert_sigmoid": dict(num_experts=1, normalize="none", score="sigmoid"),
    "learned_threshold": dict(num_experts=1, normalize="none", select="learned_threshold"),
    "load_balance": dict(top_k=1, aux="load_balance"),
    "z": dict(top_k=1, aux="z"),
}
NOTHING_TO_TRAIN = {
    "self": dict(router="self", score="abs", normalize="one", top_k=2, rank=1),
    "prototype": dict(router="prototype", score="identity", normalize="softmax", top_k=1),
    "frozen": dict(top_k=1, router=nn.Linear(8, 4).requires_grad_(False)),
    "no_router": dict(router=None),
    "external": dict(router="external"),
    "balance": dict(top_k=1, balance_rate=0.01),
}


def make_layer(options):
    return MoeLoraLinear(8, 8, **{"num_experts": 4, "rank": 2, **options})


def router_gradient(layer):
    """Return the largest gradient of a router parameter after one training step."""
    linears.randomise(layer)
    if layer.config.router == "task":
        set_tasks(layer, [1, 2])
    layer.double()
    loss = layer(torch.randn(2, 9, 8, dtype=torch.float64)).square().sum()
    if layer.config.aux:
        loss = loss + collect_aux_loss(layer)
    loss.backward()
    grads = [p.grad for p in layer.router.parameters() if p.grad is not None]
    return max((grad.abs().max().item() for grad in grads), default=0.0)


@pytest.mark.parametrize("name", CONSTANT)
def test_warns_if_nothing_trains_the_router(name):
    with pytest.warns(UserWarning, match=f"config: {WARNING}"):
        layer = make_layer(CONSTANT[name])
    # A weight divided by itself is 1 up to rounding, and its gradient 0 up to rounding.
    assert router_gradient(layer) < 1e-9


@pytest.mark.parametrize("name", TRAINED)
def test_is_silent_if_the_router_trains(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make_layer(TRAINED[name])
    assert router_gradient(layer) > 1e-5


@pytest.mark.parametrize("name", NOTHING_TO_TRAIN)
def test_is_silent_without_a_router_to_train(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layer(NOTHING_TO_TRAIN[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_warns(preset):
    config = MoeLoraConfig.preset(preset, rank=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if preset == "pesc":
            MoeLoraAdapter(nn.Linear(32, 32), 32, config)
        elif preset in ("mixlora", "llava-mole"):
            MoeLoraFFN(32, 64, config=config)
        elif preset != "smora":
            MoeLoraLinear(32, 32, config=config)


@pytest.mark.parametrize("kind", ("ffn", "adapter", "peft"))
def test_every_kind_of_layer_warns(kind):
    options = dict(num_experts=4, rank=2, top_k=1, aux=())

    def make():
        if kind == "ffn":
            MoeLoraFFN(8, 16, config=MoeLoraConfig.preset("mixlora", **options))
        elif kind == "adapter":
            MoeLoraAdapter(nn.Linear(8, 8), 8, MoeLoraConfig.preset("pesc", **options))
        else:
            peft = pytest.importorskip("peft")
            from moelora_kernels.peft import MoeLoraPeftConfig

            config = MoeLoraPeftConfig(preset="ming", target_modules=["0"], **options)
            peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)

    with pytest.warns(UserWarning, match=WARNING):
        make()


PROGRAM = """
from torch import nn
from moelora_kernels import MoeLoraConfig, replace_linears
names = [str(i) for i in range(200)]
for top_k in (1, 1, 2):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in names])
    replace_linears(model, MoeLoraConfig.preset("ming", rank=2, top_k=top_k), names)
"""


def test_a_model_of_many_layers_warns_once():
    """With Python's default filters. pytest shows every warning, so a new process runs this."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert run.stderr.count(WARNING) == 1
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        replace_linears(model, MoeLoraConfig(rank=2, top_k=1), ["0", "1", "2"])
    assert len(caught) == 1


def shown_warnings(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    return [str(warning.message) for warning in caught if WARNING in str(warning.message)]


def test_one_warning_for_each_call_with_a_filter_that_shows_all():
    config = MoeLoraConfig(num_experts=4, rank=2, top_k=1)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    assert len(shown_warnings(replace_linears, model, config, ["0", "1"])) == 1
    assert len(shown_warnings(replace_linears, model, config, ["2"])) == 1
    assert len(shown_warnings(make_layer, dict(top_k=1))) == 1
    mlp = nn.Module()
    for i in range(2):
        block = nn.Module()
        block.gate_proj, block.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        block.down_proj, block.act_fn = nn.Linear(16, 8), nn.SiLU()
        mlp.add_module(f"mlp{i}", block)
    mixlora = MoeLoraConfig.preset("mixlora", num_experts=4, rank=2, top_k=1, aux=())
    assert len(shown_warnings(replace_ffns, mlp, mixlora, ["mlp0", "mlp1"])) == 1


def test_reading_an_adapter_file_warns_of_no_router(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=WARNING):
        replace_linears(model, MoeLoraConfig(num_experts=4, rank=2, top_k=1), ["0", "1"])
    save_adapter(model, tmp_path / "adapter.safetensors")
    assert shown_warnings(read_adapter, tmp_path / "adapter.safetensors") == []


def test_peft_warns_once_for_an_adapter_that_trains(tmp_path):
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    options = dict(num_experts=4, rank=2, top_k=1, aux=(), target_modules=["0", "1"])

    def base():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def train():
        model = peft.get_peft_model(base(), MoeLoraPeftConfig(preset="ming", **options))
        model.save_pretrained(tmp_path)

    assert len(shown_warnings(train)) == 1
    assert shown_warnings(peft.PeftModel.from_pretrained, base(), tmp_path) == []
    assert shown_warnings(read_adapter, tmp_path) == []
