"""Training under PEFT: which tensors change, dtypes, checkpointing, generation."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from moelora_kernels import MoeLoraLinear, set_tasks, update_balance  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.peft_models import (  # noqa: E402
    EXTERNAL,
    GATES,
    MING,
    TARGETS,
    TASKS,
    give_gates,
    inputs,
    llama,
    net,
    new_adapter,
    randomise,
)


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_three_steps_change_every_adapter_tensor_and_nothing_else(options):
    """B changes in the first step. A and the router have gradients once B is not zero."""
    model = give_gates(new_adapter(options), options).train()
    start = snapshot(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number in range(3):
        model(inputs()).square().sum().backward()
        if number == 0:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad.any() == ("lora_B" in name), name
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == ("moelora_" in name), name
        assert parameter.requires_grad == moved


@pytest.mark.parametrize(("freeze", "moves"), (("A", {"lora_B", "router"}), ("AB", {"router"})))
def test_frozen_tensors_stay_frozen(freeze, moves):
    model = new_adapter(MING, freeze=freeze).train()
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=TARGETS, **MING))
    model.set_adapter("other")
    model.set_adapter("default")
    model.set_requires_grad("default")
    for name, parameter in model.named_parameters():
        ours = "moelora_" in name and ".default" in name
        assert parameter.requires_grad == (ours and any(part in name for part in moves)), name


def test_update_balance_updates_the_active_adapter():
    model = new_adapter(dict(num_experts=4, rank=2, top_k=2, balance_rate=0.5)).train()
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=TARGETS, **MING))
    model(inputs())
    update_balance(model)
    biases = [tensor for name, tensor in model.state_dict().items() if "balance" in name]
    assert len(biases) == 4
    assert all(bias.abs().max() == 0.5 for bias in biases)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="no layer has a balance_rate"):
        update_balance(model)


def test_only_the_active_adapter_trains():
    model = new_adapter(TASKS)
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=TARGETS, **MING))
    randomise(model)
    model.set_adapter("other")
    start = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(inputs()).square().sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if ".other." in n}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_one_expert_equals_the_lora_of_peft(dtype):
    """The preset "lora" equals peft.tuners.lora.Linear with the same weights."""
    ours = new_adapter(dict(preset="lora", rank=3, alpha=7.0), net(dtype))
    theirs = peft.get_peft_model(
        net(dtype), peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS)
    )
    randomise(ours)
    parameters, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = {
        n: n.replace("moelora_experts.default.", "").replace(m, f"{m}.default.weight")
        for n in parameters
        for m in ("lora_A", "lora_B")
        if n.endswith(m)
    }
    assert len(pairs) == 8
    with torch.no_grad():
        for name, other_name in pairs.items():
            other[other_name].copy_(parameters[name])
    x = inputs(dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = ours(leaves[0]), theirs(leaves[1])
    # Sums of 20 numbers in another order.
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else {}
    torch.testing.assert_close(y, expected, **tolerance)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **tolerance)
    for name, other_name in pairs.items():
        torch.testing.assert_close(
            parameters[name].grad, other[other_name].grad, **tolerance, msg=name
        )


@pytest.mark.parametrize("autocast", (False, True), ids=("plain", "autocast"))
@pytest.mark.parametrize("autocast_adapter_dtype", (True, False), ids=("float32", "as_base"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("options", (MING, TASKS, EXTERNAL), ids=("ming", "tasks", "external"))
def test_dtypes(options, dtype, autocast_adapter_dtype, autocast):
    """float32 adapters over a 16-bit base, which is PEFT's default, and every other pair."""
    model = randomise(
        new_adapter(options, net(dtype), autocast_adapter_dtype=autocast_adapter_dtype)
    )
    give_gates(model, options)
    parameters = {n: p for n, p in model.named_parameters() if "moelora_" in n}
    assert {p.dtype for p in parameters.values()} == {
        torch.float32 if autocast_adapter_dtype else dtype
    }
    low = torch.bfloat16 if autocast else dtype
    layer = model.base_model.model.layers[0].up
    experts = layer.moelora_experts["default"]
    # The layer without PEFT gives the same bits. Other tests check its values.
    alone = MoeLoraLinear.from_linear(layer.base_layer, experts.config)
    alone.lora_A, alone.lora_B, alone.router = experts.lora_A, experts.lora_B, experts.router
    alone.external_gates, alone.task_ids = experts.external_gates, experts.task_ids
    x = inputs(dtype=dtype)
    trained = [p for p in alone.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, expected = layer(x), alone(x)
        assert y.dtype == layer.base_layer(x).dtype == low
        out = model(x)
    assert torch.equal(y, expected)
    actual = torch.autograd.grad(y.float().square().sum(), trained)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), trained)
    assert all(torch.equal(g, w) for g, w in zip(actual, expected_grads, strict=True))
    out.float().sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad.dtype == parameter.dtype, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_sum_of_adapters_has_the_dtype_of_the_base():
    model = new_adapter(MING, net(torch.bfloat16))
    model.add_adapter("other", MoeLoraPeftConfig(preset="lora", target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    randomise(model)
    x = inputs(dtype=torch.bfloat16)
    y = model.base_model.model.layers[0].up(x)
    assert y.dtype == torch.bfloat16
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype
            assert torch.isfinite(parameter.grad).all(), name


def test_an_explicit_adapter_dtype_stays():
    model = new_adapter(dict(MING, adapter_dtype="bfloat16"), net(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model = new_adapter(
        dict(MING, adapter_dtype="float32"), net(torch.bfloat16), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
def test_loading_over_a_base_of_16_bits_keeps_every_bit(low_cpu_mem_usage, tmp_path):
    model = randomise(new_adapter(TASKS, net(torch.bfloat16)))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        net(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    read = dict(loaded.named_parameters())
    for name, tensor in model.named_parameters():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("options", (MING, dict(TASKS, dropout=0.3)), ids=("ming", "tasks"))
def test_gradient_checkpointing(options, use_reentrant):
    """The gradients are equal with and without; the recompute draws the same dropout."""
    ids = torch.arange(10).view(2, 5)

    def gradients(checkpointed):
        model = randomise(new_adapter(options, llama(), target_modules=["q_proj", "down_proj"]))
        if "num_tasks" in options:
            set_tasks(model, [2, 1])
        if checkpointed:
            # Reentrant mode needs an input that requires a gradient.
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(4)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    loss, expected = gradients(False)
    recomputed, actual = gradients(True)
    assert torch.equal(loss, recomputed)
    assert set(actual) == set(expected)
    for name in expected:
        assert actual[name].any(), name
        # The gradients of x are summed in another order.
        torch.testing.assert_close(actual[name], expected[name], msg=name)


@pytest.mark.parametrize("options", (MING, TASKS), ids=("ming", "tasks"))
def test_generate_equals_greedy_decoding_of_the_whole_prefix(options):
    """PeftModel.generate of a batch with a cache, against argmax by argmax."""
    model = randomise(new_adapter(options, llama(), target_modules=["q_proj", "down_proj"])).eval()
    if options is TASKS:
        set_tasks(model, [4, 1])
    ids = torch.arange(8).view(2, 4)
    actual = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    expected = ids
    for _ in range(4):
        with torch.no_grad():
            following = model(input_ids=expected).logits[:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(actual, expected)


def test_a_packed_base():
    """A packed base is called. Its adapters are float32."""
    from support.linears import PackedLinear

    base = net(torch.float32)
    for block in base.layers:
        block.up = PackedLinear(block.up)
    x = inputs(dtype=torch.float32)
    plain = base(x)
    model = new_adapter(MING, base)
    torch.testing.assert_close(model(x), plain)
    randomise(model)(x).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.any() for p in trained)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert nn.Linear not in {type(block.up) for block in base.layers}
