"""merge_adapter, unmerge_adapter and merge_and_unload of a PeftModel."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from moelora_kernels import (  # noqa: E402
    MoeLoraLinear,
    check_trainable,
    export,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_tasks,
)
from moelora_kernels.export import export_lora  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig, MoeLoraTunerLinear  # noqa: E402
from support.linears import PackedLinear  # noqa: E402
from support.peft_models import (  # noqa: E402
    EXTERNAL,
    LORA,
    MING,
    TARGETS,
    TASKS,
    delta_of_token,
    inputs,
    llama,
    net,
    new_adapter,
    randomise,
    tuner_layers,
)


def mergeable(options=TASKS, base=None, **adapters):
    """Return a model with an adapter "default" of `options`, and others by name. No task is set."""
    model = new_adapter(options, base)
    for name, other in adapters.items():
        model.add_adapter(name, MoeLoraPeftConfig(**{"target_modules": TARGETS, **other}))
    return randomise(model).eval()


def bits(model):
    """Return copies of the base weights."""
    return [m.base_layer.weight.detach().clone() for m in tuner_layers(model)]


def assert_bits(actual, expected):
    assert all(torch.equal(f, e) for f, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("task", (1, 2, 3, 4))
def test_a_merged_task_gives_the_unmerged_output(task):
    model, x = mergeable(), inputs()
    before, keys = bits(model), set(model.state_dict())
    set_tasks(model, [task])
    y = model(x)
    model.merge_adapter()
    assert not torch.equal(bits(model)[0], before[0])
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    assert_bits(bits(model), before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_the_merged_weight_is_the_sum_rounded_once(dtype):
    """The merged weight is W + sum_e scale gate_e B_e A_e, and unmerging restores W."""
    model = mergeable(TASKS, net(dtype))
    layer = model.base_model.model.layers[1].down
    experts, base = layer.moelora_experts["default"], layer.base_layer.weight
    before = base.detach().clone()
    for task in (2, 4, 2):
        set_tasks(model, [task, task])
        with torch.no_grad():
            logits = experts.router.gate.weight @ experts.router.embedding.weight[task]
            gates = torch.softmax(logits, dim=0).double()
            delta = torch.stack(
                [
                    delta_of_token(
                        unit, experts.lora_A.double(), experts.lora_B.double(), gates, 32 / 6, 2
                    )
                    for unit in torch.eye(10, dtype=torch.float64)
                ],
                dim=1,
            )
        model.merge_adapter(["default"])
        exact = before.double() + delta
        # Half a unit in the last place, and the gate's own rounding in float32.
        unit = torch.finfo(dtype).eps * exact.abs() / 2 + 1e-5 * delta.abs()
        assert ((base.double() - exact).abs() <= unit).all()
        model.unmerge_adapter()
        assert torch.equal(base, before)


@pytest.mark.parametrize("options", (TASKS, LORA, EXTERNAL), ids=("tasks", "lora", "external"))
@pytest.mark.parametrize("safe_merge", (False, True))
def test_merge_and_unload(options, safe_merge):
    model, x = mergeable(options), inputs()
    if options is TASKS:
        set_tasks(model, [2, 2])
    elif options is EXTERNAL:
        set_tasks(model, torch.tensor([[0.5, 0.0, -2.0]], dtype=torch.float64))
    y = model(x)
    plain = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(plain(x), y, rtol=1e-6, atol=1e-6)
    assert set(plain.state_dict()) == set(net().state_dict())
    kinds = {type(m) for m in plain.modules()}
    assert nn.Linear in kinds
    assert not kinds & {MoeLoraTunerLinear, MoeLoraLinear}
    # The plain model takes another adapter.
    again = peft.get_peft_model(plain, MoeLoraPeftConfig(target_modules=TARGETS, **MING)).eval()
    torch.testing.assert_close(again(x), y, rtol=1e-6, atol=1e-6)


def test_several_adapters_together_and_one_by_one():
    x = inputs()
    model = mergeable(TASKS, other=LORA)
    model.base_model.set_adapter(["default", "other"])
    set_tasks(model, [3])
    y, before = model(x), bits(model)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    assert_bits(bits(model), before)
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="nothing to do"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    assert_bits(bits(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_only_the_named_adapter_is_merged():
    model, x = mergeable(TASKS, other=LORA), inputs()
    model.set_adapter("other")
    y = model(x)
    model.set_adapter("default")
    plain = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(plain(x), y, rtol=1e-6, atol=1e-6)


def test_disabling_a_merged_adapter_unmerges_it():
    model, x = mergeable(LORA), inputs()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))


def test_training_continues_after_a_merge():
    model, x = mergeable(LORA), inputs()
    model.merge_adapter()
    assert not model(x).requires_grad
    model.unmerge_adapter()
    model(x).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def assert_refused(model, error, match, **options):
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(error, match=match):
            merge(**options)
        assert_bits(bits(model), before)
        assert not any(m.merged for m in model.modules() if isinstance(m, MoeLoraTunerLinear))


def test_gates_that_depend_on_x_are_refused():
    assert_refused(
        mergeable(MING), RuntimeError, r"'default' cannot be merged: its gate depends on x"
    )
    # The layers of the first adapter could be merged, and come first.
    model = mergeable(dict(TASKS, target_modules=["up"]), other=dict(MING, target_modules=["down"]))
    set_tasks(model, [1])
    model.base_model.set_adapter(["default", "other"])
    assert_refused(model, RuntimeError, r"'other' cannot be merged")


@pytest.mark.parametrize("function", (merge_adapter, merge_and_unload, export_lora))
def test_functions_for_models_without_peft_say_what_to_call(function, tmp_path):
    arguments = (tmp_path / "out",) if function is export_lora else ()
    message = (
        r"model: a PeftModel is merged and exported by PEFT. .*merge_and_unload\(\).*FOLDER OUT"
    )
    with pytest.raises(ValueError, match=message):
        function(mergeable(TASKS), *arguments, task=2)


def test_a_file_of_save_adapter_is_not_exported_but_a_folder_is(tmp_path, capsys):
    model = mergeable(TASKS)
    save_adapter(model, tmp_path / "adapter.safetensors")
    task = ["--task", "2"]
    with pytest.raises(SystemExit):
        export.main([*task, str(tmp_path / "adapter.safetensors"), str(tmp_path / "out")])
    assert "peft_model.save_pretrained(FOLDER) and export FOLDER" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "folder")
    export.main([*task, str(tmp_path / "folder"), str(tmp_path / "out")])
    set_tasks(model, [2])
    x = inputs()[:1]
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(loaded(x), model(x))


def test_no_task_and_several_tasks_are_refused():
    assert_refused(mergeable(TASKS), RuntimeError, "set_tasks")
    assert_refused(mergeable(EXTERNAL), RuntimeError, "set_tasks")
    model = mergeable(TASKS)
    set_tasks(model, [1, 2])
    assert_refused(model, RuntimeError, "one task")
    model = mergeable(EXTERNAL)
    set_tasks(model, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64))
    assert_refused(model, RuntimeError, "one task")


def test_unknown_adapters_are_refused():
    assert_refused(mergeable(LORA), ValueError, "nobody", adapter_names=["nobody"])


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_safe_merge_refuses_values_that_are_not_finite(bad):
    model = mergeable(LORA)
    with torch.no_grad():
        model.base_model.model.layers[0].up.moelora_experts["default"].lora_B[0, 0] = bad
    assert_refused(model, ValueError, "not finite", safe_merge=True)


def test_a_base_without_a_dense_weight_is_refused():
    base = net(torch.float32)
    base.layers[1].up = PackedLinear(base.layers[1].up)
    assert_refused(mergeable(LORA, base), RuntimeError, "dense float weight")


def test_tasks_cannot_change_under_a_merged_weight():
    """The merged weight has one task, so another task raises."""
    model = mergeable()
    set_tasks(model, [1])
    model.merge_adapter()
    with pytest.raises(ValueError, match="task"):
        set_tasks(model, [2])
    model.unmerge_adapter()
    set_tasks(model, [2])


def test_safe_merge_changes_no_layer_if_one_is_not_finite():
    model = mergeable(LORA)
    before = bits(model)
    layer = model.base_model.model.layers[1].down.moelora_experts["default"]
    layer.lora_B.data[0, 0] = float("nan")
    assert_refused(model, ValueError, "not finite", safe_merge=True)
    assert_bits(bits(model), before)


def test_an_active_adapter_that_is_not_merged_adds_to_the_merged_weight():
    model, x = mergeable(TASKS, other=LORA), inputs()
    model.base_model.set_adapter(["default", "other"])
    set_tasks(model, [3])
    y = model(x)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    model.train()(x).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained
    assert all(".other." in name for name in trained)
    with pytest.raises(ValueError, match=r"tasks: adapter 'default' is merged; call"):
        set_tasks(model, [2])
    model.unmerge_adapter()
    torch.testing.assert_close(model.eval()(x), y, rtol=1e-6, atol=1e-6)


def test_a_training_forward_of_a_merged_adapter_warns():
    model, x = mergeable(LORA).train(), inputs()
    model.merge_adapter()
    with pytest.warns(
        UserWarning, match=r"\['default'\] are merged, so this forward does not train"
    ):
        model(x)
    with pytest.raises(ValueError, match=r"expected active adapters.*unmerge_adapter\(\)"):
        check_trainable(model, x)


def test_other_values_do_not_load_into_a_merged_model(tmp_path):
    """The merged weight would keep the old values, and unmerging would drop new base weights."""
    model, other = mergeable(LORA), mergeable(LORA)
    state = model.state_dict()
    save_adapter(other, tmp_path / "a.safetensors")
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"up\.base_layer\.weight: adapters \['default'\] are m"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"layers\.0\.up\..*adapter 'default' is merged; call"):
        load_adapter(model, tmp_path / "a.safetensors")
    # Another adapter can be loaded.
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")


def test_a_weight_that_another_module_shares_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 6)
            self.up = nn.Linear(6, 10, bias=False)
            self.up.weight = self.embedding.weight

        def forward(self, ids):
            return self.up(self.embedding(ids))

    model = mergeable(dict(LORA, target_modules=["up"]), Tied())
    with pytest.warns(UserWarning, match="merge: embedding shares the weight of up"):
        model.merge_adapter()


def test_tied_weights_are_named():
    """PEFT warns that a tied embedding changes with the head."""
    base = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = mergeable(dict(LORA, target_modules=["lm_head"]), base)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_and_unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
