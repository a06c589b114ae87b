"""The auxiliary loss of a PeftModel belongs to the last forward that ran its adapters."""

import pytest
import torch
from torch import nn

from moelora_kernels import collect_aux_loss, record_routing

peft = pytest.importorskip("peft")

from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402

OPTIONS = dict(
    preset="ming", num_experts=4, rank=2, aux={"load_balance": 1.0, "z": 0.1}, target_modules=["0"]
)


def policy():
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), MoeLoraPeftConfig(**OPTIONS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def tokens(seed):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def expected(model, x):
    model(x)
    return collect_aux_loss(model).detach()


@pytest.mark.parametrize("order", ("policy first", "reference first"))
@pytest.mark.parametrize("grad", (False, True))
def test_a_reference_with_disabled_adapters_keeps_the_loss_of_the_policy(order, grad):
    model, x = policy(), tokens(1)
    value = expected(model, x)

    def reference():
        with model.disable_adapter(), torch.set_grad_enabled(grad):
            return model(x)

    for _ in range(2):
        if order == "reference first":
            reference()
        model(x)
        if order == "policy first":
            reference()
        loss = collect_aux_loss(model)
        torch.testing.assert_close(loss.detach(), value)
        assert loss.requires_grad


def test_the_loss_is_of_the_last_of_several_first_forwards():
    model, x = policy(), tokens(1)
    value = expected(policy(), x)
    model(tokens(2))
    model(x)
    torch.testing.assert_close(collect_aux_loss(model).detach(), value)


def test_a_reference_adapter_has_its_own_record():
    model, x = policy(), tokens(1)
    model.add_adapter("reference", MoeLoraPeftConfig(**OPTIONS))
    value = expected(model, x)
    model(x)
    model.set_adapter("reference")
    model(tokens(2))
    model.set_adapter("default")
    torch.testing.assert_close(collect_aux_loss(model).detach(), value)


def test_a_record_of_disabled_adapters_stays_until_the_context_ends():
    model, x = policy(), tokens(1)
    experts = model.base_model.model[0].moelora_experts["default"]
    with record_routing(model):
        model(x)
        weights = experts.record.weights
        with model.disable_adapter():
            model(x)
        assert experts.record.weights is weights
