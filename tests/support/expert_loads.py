"""The load of the experts, counted by hand from the tokens that each layer gets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moelora_kernels import MoeLoraConfig, adapter_parameters, replace_linears

EXPERTS = 4
CONFIG = MoeLoraConfig(num_experts=EXPERTS, rank=2, top_k=2, aux={"load_balance": 0.1})


def adapted(model: nn.Module, targets, config: MoeLoraConfig = CONFIG) -> nn.Module:
    """Return the frozen model with adapters and routers that are not zero."""
    replace_linears(model.requires_grad_(False), config, targets)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.3)
    return model.train()


class HandCount:
    """Sums of the gates of each layer of a model, for top-2 token gates.

    Args:
        model: a model with layers of `CONFIG`.
        mask_of: (name of a layer, arguments of the model's call) -> which tokens of the layer's x
            count, of the shape of x without features; None counts all.
    """

    def __init__(
        self, model: nn.Module, mask_of: Callable[[str, dict], Tensor | None] | None = None
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self.inputs: dict = {}
        self.calls: list[str] = []
        self.mask_of = mask_of or (lambda name, inputs: None)
        model.register_forward_pre_hook(self.keep_inputs, with_kwargs=True)
        for name, layer in model.named_modules():
            if hasattr(layer, "record"):
                self.sums[name] = torch.zeros(EXPERTS, dtype=torch.float64)
                layer.register_forward_pre_hook(self.counting(name))

    def keep_inputs(self, model, args, kwargs):
        self.inputs = kwargs

    def counting(self, name):
        def hook(layer, args):
            if not (layer.training and torch.is_grad_enabled()):
                return
            self.calls.append(name)
            x = args[0].detach().double()
            gates = self.gates(layer, x.reshape(-1, x.shape[-1]))
            mask = self.mask_of(name, self.inputs)
            if mask is not None:
                assert mask.shape == x.shape[:-1], name
                gates = gates * mask.reshape(-1, 1)
            self.sums[name] += gates.sum(dim=0)

        return hook

    @staticmethod
    def gates(layer, tokens: Tensor) -> Tensor:
        logits = tokens @ layer.router.weight.detach().double().t()
        top = logits.topk(2, dim=1)
        return torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(dim=1))

    def shares(self) -> dict[str, Tensor]:
        """Return the load of each layer: zeros if no token was counted."""
        return {n: (s / s.sum().clamp_min(1e-300)).float() for n, s in self.sums.items()}

    def check(self, load: dict[str, Tensor]) -> None:
        """Assert that `load` equals the shares."""
        shares = self.shares()
        assert load.keys() == shares.keys()
        for name, share in shares.items():
            torch.testing.assert_close(load[name], share, atol=2e-6, rtol=0, msg=name)
