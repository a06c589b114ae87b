"""The public names: their parameters are frozen, and each one has an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import moelora_kernels

# Name -> its parameters, without annotations. Whoever changes a line here changes the interface
# that programs outside of this repository rely on.
SIGNATURES = {
    "moelora_kernels.checkpoints:adapter_state_dict": "(model)",
    "moelora_kernels.checkpoints:export_ming": "(model, like=None)",
    "moelora_kernels.checkpoints:export_moelora_peft": "(model, like=None)",
    "moelora_kernels.checkpoints:load_adapter": "(model, path)",
    "moelora_kernels.checkpoints:load_adapter_state_dict": "(model, state)",
    "moelora_kernels.checkpoints:load_ming": "(model, state_dict)",
    "moelora_kernels.checkpoints:load_moelora_peft": "(model, state_dict)",
    "moelora_kernels.checkpoints:save_adapter": "(model, path)",
    "moelora_kernels.export:export_lora": (
        "(model, path, task=None, *, base_model=None, task_type=None)"
    ),
    "moelora_kernels.trainer:attach": "(trainer, *, task_column='task_ids', set_tasks=None)",
    "moelora_kernels:MoeLoraAdapter": "(base, hidden_size, config=None, **options)",
    "moelora_kernels:MoeLoraConfig": (
        "(*, num_experts=8, rank=16, alpha=32.0, scaling='alpha/r', share='none', "
        "shared_expert='none', shared_rank=None, init='kaiming', svd_rho=None, "
        "rank_activation=None, freeze='none', frozen_experts=(), adapter_dtype=None, "
        "router='linear', router_bias=False, router_hidden=64, num_tasks=None, "
        "task_embedding_dim=64, task_gate='shared', batch_dim=0, granularity=None, "
        "score='softmax', temperature=1.0,"
        " noise=0.0, select=None, top_k=None, top_p=None, threshold=None, max_threshold=None,"
        " keep_min=None, entropy_threshold=None, entropy_index=1.0, balance_rate=None, "
        "normalize='sum', dropout=0.0, dropout_mask='shared', aux=(), grad_gate='gate', "
        "impl='auto')"
    ),
    "moelora_kernels:MoeLoraConfig.preset": "(name, **options)",
    "moelora_kernels:MoeLoraFFN": (
        "(hidden_size, intermediate_size, bias=False, *, activation='silu', config=None, "
        "device=None, dtype=None, recompute=False, **options)"
    ),
    "moelora_kernels:MoeLoraFFN.forward": "(self, x=None, gates=None, *, input=None)",
    "moelora_kernels:MoeLoraGroup": "(**siblings)",
    "moelora_kernels:MoeLoraGroup.forward": "(self, x=None, gates=None, *, input=None)",
    "moelora_kernels:MoeLoraLinear": (
        "(in_features, out_features, bias=True, *, config=None, device=None, dtype=None, **options)"
    ),
    "moelora_kernels:MoeLoraLinear.export_lora": "(self, task=None)",
    "moelora_kernels:MoeLoraLinear.forward": "(self, x=None, gates=None, *, input=None)",
    "moelora_kernels:MoeLoraLinear.from_linear": "(linear, config=None, **options)",
    "moelora_kernels:MoeLoraLinear.from_loras": "(linear, loras, config=None, **options)",
    "moelora_kernels:MoeLoraLinear.merge": "(self, task=None)",
    "moelora_kernels:MoeLoraLinear.unmerge": "(self)",
    "moelora_kernels:adapter_parameters": "(model)",
    "moelora_kernels:add_experts": "(model, n, *, rank=None)",
    "moelora_kernels:adapter_state_dict": "(model)",
    "moelora_kernels:check_trainable": "(model, batch, loss_fn=None)",
    "moelora_kernels:collect_aux_loss": "(model, mask=None)",
    "moelora_kernels:count_routing": "(model, num_tasks=None)",
    "moelora_kernels:freeze_experts": "(model, experts, optimizer=None)",
    "moelora_kernels:link_siblings": (
        "(model, groups=(('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj')))"
    ),
    "moelora_kernels:load_adapter": "(model, path)",
    "moelora_kernels:load_adapter_state_dict": "(model, state)",
    "moelora_kernels:merge_adapter": "(model, task=None)",
    "moelora_kernels:merge_and_unload": "(model, task=None)",
    "moelora_kernels:moe_lora_linear": (
        "(x, weight, bias, lora_a, lora_b, gates, indices=None, *, ranks, scaling, rows=None,"
        " dropout=0.0, seed=None, impl='auto')"
    ),
    "moelora_kernels:plot_routing": "(report, folder)",
    "moelora_kernels:record_routing": "(model)",
    "moelora_kernels:replace_ffns": (
        r"(model, config, target_modules='.*\\.mlp', *, recompute=False)"
    ),
    "moelora_kernels:replace_linears": "(model, config, target_modules, *, link=False)",
    "moelora_kernels:routing_report": "(model, *, all_ranks=True)",
    "moelora_kernels:save_adapter": "(model, path)",
    "moelora_kernels:set_prototypes": "(model)",
    "moelora_kernels:set_samples": "(model, samples)",
    "moelora_kernels:set_tasks": "(model, tasks)",
    "moelora_kernels:unmerge_adapter": "(model)",
    "moelora_kernels:update_balance": "(model)",
    "moelora_kernels:warmup": "(model, tokens=(1,), *, batch=1)",
}
METHODS = (
    "MoeLoraConfig.preset",
    "MoeLoraFFN.forward",
    "MoeLoraGroup.forward",
    "MoeLoraLinear.export_lora",
    "MoeLoraLinear.forward",
    "MoeLoraLinear.from_linear",
    "MoeLoraLinear.from_loras",
    "MoeLoraLinear.merge",
    "MoeLoraLinear.unmerge",
)
# The parameters of this class depend on the version of PEFT.
PEFT_CONFIG = "moelora_kernels.peft:MoeLoraPeftConfig"
EXAMPLES = [name for name in SIGNATURES if "." not in name.split(":")[1]] + [PEFT_CONFIG]


def lookup(name: str) -> object:
    """Return the object of a name such as "moelora_kernels:MoeLoraLinear.merge"."""
    module, path = name.split(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def parameters(value: object) -> str:
    """Return the signature without annotations."""
    signature = inspect.signature(value)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def public_signatures() -> dict[str, str]:
    """Return the parameters of all public functions, classes and methods."""
    names = ["moelora_kernels.trainer:attach", "moelora_kernels.export:export_lora"]
    for module in ("moelora_kernels", "moelora_kernels.checkpoints"):
        names += [f"{module}:{name}" for name in importlib.import_module(module).__all__]
    names += [f"moelora_kernels:{method}" for method in METHODS]
    return {name: parameters(lookup(name)) for name in sorted(names)}


def test_the_public_names_and_their_parameters_are_frozen() -> None:
    assert public_signatures() == SIGNATURES


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_public_name_has_an_example_that_runs(name: str) -> None:
    value = lookup(name)
    module = importlib.import_module(value.__module__)
    # An example may use the public names and the imports of its module without importing them.
    public = {name: getattr(moelora_kernels, name) for name in moelora_kernels.__all__}
    names = {**vars(module), **public}
    (test,) = doctest.DocTestFinder(recurse=False).find(value, name, module, names)
    assert test.examples, f"{name}: add an `Example:` with `>>>` lines to its docstring"
    out: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=out.append)
    assert results.failed == 0, "".join(out)
