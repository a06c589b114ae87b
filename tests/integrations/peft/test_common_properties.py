"""The properties that PEFT expects of every method over a custom model, for gates that read x.

The model is an MLP with ReLU, dropout and log-softmax, like that of PEFT's own checks. The other
tests of this folder have the properties that do not need it.
"""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402

TOKEN_GATES = ("ming", "mola", "loramoe", "hydralora", "adamole")
every_preset = pytest.mark.parametrize("preset", (*TOKEN_GATES, "lora"))
LINEARS = ("lin0", "lin1")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.drop(self.lin0(x).relu())).log_softmax(dim=-1)


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Mlp()


def numbers(largest=1.0):
    """Return x [9, 10], the numbers 0 to 89, scaled so that the largest one is `largest`."""
    return torch.arange(90.0).view(9, 10) * (largest / 89)


def adapted(preset, seed=0, **options):
    torch.manual_seed(seed)
    config = MoeLoraPeftConfig(**{"preset": preset, "target_modules": list(LINEARS), **options})
    return peft.get_peft_model(mlp(), config)


def train(model, x, steps=3, learning_rate=0.5):
    """Take plain SGD steps. Return the values of all parameters before the steps."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    return before


@every_preset
@pytest.mark.parametrize(
    "where",
    (
        dict(target_modules="lin0"),
        dict(target_modules=["lin1"]),
        dict(),
        dict(target_modules=["lin0"], modules_to_save=["lin1"]),
    ),
    ids=("lin0", "lin1", "both", "saved"),
)
def test_three_steps_move_every_trained_tensor_and_no_other(preset, where):
    model = adapted(preset, **where).train()
    before = train(model, numbers())
    for name, parameter in model.named_parameters():
        is_trained = "moelora_" in name or "modules_to_save" in name
        close = torch.equal if not is_trained else torch.allclose
        assert close(parameter, before[name]) != is_trained, name
        assert parameter.requires_grad == is_trained


def test_a_saturated_gate_does_not_train_its_router():
    """So in PEFT's own check of three steps a router of `ming` may keep its values.

    That check has x up to 89 and a learning rate of 0.5. B is zero in the first step, so the router
    has no gradient. After this step the input of the second linear is about 10^5, and the gate of
    most tokens is one expert, where the gradient of a softmax is zero.
    """
    model = adapted("ming", init_weights=False).train()
    router = model.base_model.model.lin0.moelora_router["default"]
    for largest, is_trained in ((1.0, True), (1e6, False)):
        x = numbers(largest)
        model.zero_grad()
        model(x).sum().backward()
        weight, bias = (t.detach().double().requires_grad_() for t in (router.weight, router.bias))
        gate = nn.functional.linear(x.double(), weight, bias).topk(2).values.softmax(dim=-1)
        plain = torch.autograd.grad(gate[:, 0].sum(), (weight, bias))
        for ours, expected in zip((router.weight.grad, router.bias.grad), plain, strict=True):
            assert ours.any() == is_trained
            assert (expected.abs().max() > 1e-6) == is_trained


@every_preset
def test_disabling_gives_the_base_after_training_and_nested(preset):
    x, base = numbers(), mlp().eval()
    model = adapted(preset, init_weights=False)
    train(model.train(), x, learning_rate=0.02)
    y = model.eval()(x)
    assert not torch.allclose(y, base(x), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y)


@every_preset
def test_a_trained_model_comes_back_from_its_folder(preset, tmp_path):
    x = numbers()
    model = adapted(preset, init_weights=False, modules_to_save=["lin1"], target_modules=["lin0"])
    train(model.train(), x, learning_rate=0.02)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert loaded.peft_config["default"].init_weights is False


@every_preset
def test_adapters_that_are_added_and_deleted(preset):
    """One config object for two adapters, over other linears; none leaves a trace behind."""
    x = numbers()
    model = adapted(preset, init_weights=False, target_modules=["lin0"]).eval()
    first = model(x)
    config = MoeLoraPeftConfig(preset=preset, target_modules=list(LINEARS), init_weights=False)
    model.add_adapter("second", config)
    model.add_adapter("third", config)
    assert torch.equal(model(x), first)
    outputs = []
    for name in ("second", "third"):
        model.set_adapter(name)
        assert (model.active_adapter, model.active_adapters) == (name, [name])
        outputs.append(model(x))
    assert not torch.allclose(*outputs)
    model.base_model.set_adapter(["default", "third"])
    assert model.active_adapters == ["default", "third"]
    model.set_adapter("default")
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert torch.equal(model(x), first)
    for layer in (m for m in model.modules() if isinstance(m, BaseTunerLayer)):
        for key in layer.adapter_layer_names:
            assert not {"second", "third"} & set(getattr(layer, key)), key


def test_merging_and_unmerging():
    x = numbers()
    model = adapted("lora", init_weights=False).eval()
    y = model(x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), y)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp().eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), y)


@pytest.mark.parametrize("preset", TOKEN_GATES)
def test_gates_that_read_x_refuse_to_merge(preset):
    model = adapted(preset, init_weights=False).eval()
    y = model(numbers())
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_and_unload):
        with pytest.raises(RuntimeError, match="adapter 'default' cannot be merged: "):
            merge(safe_merge=True)
        assert torch.equal(model(numbers()), y)
