"""A task is exported from the folders of moelora_kernels.peft and of MOELoRA-peft."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moelora_kernels import MoeLoraConfig, set_tasks
from moelora_kernels.checkpoints import export_moelora_peft, load_moelora_peft
from moelora_kernels.export import export_lora, lora_of_model, main, read_adapter
from support.compare import assert_same
from support.models import adapt

SIZES = dict(num_experts=4, num_tasks=3, task_embedding_dim=5)
CONFIG = MoeLoraConfig.preset("moelora", rank=2, alpha=12.0, **SIZES)
# adapter_config.json of MOELoRA-peft with these options; its r is the rank of all experts together.
ORIGINAL_CONFIG = dict(
    peft_type="MMOELORAS", r=8, lora_alpha=12, expert_num=4, task_num=3, task_embedding_dim=5
)


def eleven_blocks():
    """Return eleven blocks of two linears: sorted by name, block 10 comes before block 2."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)) for _ in range(11)])


def adapted_blocks(config=CONFIG):
    """Return `eleven_blocks` with layers in place of its linears."""
    return adapt(eleven_blocks(), (config, r"\d+\.\d"))


def write(folder, config, state):
    """Write adapter_config.json and adapter_model.safetensors."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("options", ({}, {"share": "A"}, {"shared_expert": "complement"}), ids=str)
def test_a_folder_of_peft(options, tmp_path):
    """Stock PEFT computes the same from the exported folder of a folder of save_pretrained."""
    peft, moelora_peft = pytest.importorskip("peft"), pytest.importorskip("moelora_kernels.peft")
    config = moelora_peft.MoeLoraPeftConfig(
        preset="moelora",
        target_modules=r"\d+\.\d+\.\d+",
        dropout_mask="shared",
        **SIZES,
        **options,
    )
    base = nn.Sequential(eleven_blocks())
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for q in model.parameters():
            if q.requires_grad:
                q.normal_(std=0.3)
    model.save_pretrained(tmp_path / "in")
    main(["--task", "2", str(tmp_path / "in"), str(tmp_path / "out")])
    set_tasks(model, [2])
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    x = torch.randn(4, 6)
    torch.testing.assert_close(stock(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock(x), base(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("task_gate", ("shared", "per_layer"))
@pytest.mark.parametrize("suffix", ("safetensors", "bin"))
def test_a_folder_of_the_original(task_gate, suffix, tmp_path):
    model = adapted_blocks(CONFIG.replace(task_gate=task_gate))
    state = export_moelora_peft(model)
    path = tmp_path / f"adapter_model.{suffix}"
    if suffix == "bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    expected = lora_of_model(model, 3)
    assert_same(lora_of_model(read_adapter(tmp_path), 3), expected)
    export_lora(read_adapter(tmp_path), tmp_path / "out", 3)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2 * len(expected)


def test_keys_of_the_original_in_their_other_forms(tmp_path):
    """All forms that `load_moelora_peft` reads: one alias, the adapter's name, without prefix."""
    model = adapted_blocks()
    state = export_moelora_peft(model)
    forms = {
        "aliases": {k: t for k, t in state.items() if ".mlp." not in k},
        "adapter": {
            re.sub(r"(_[AB]|_gate|_embedding)\.", r"\1.ner.", k): t for k, t in state.items()
        },
        "without prefix": {k.removeprefix("base_model.model."): t for k, t in state.items()},
    }
    for name, form in forms.items():
        assert form.keys() != state.keys()
        (tmp_path / name).mkdir()
        write(tmp_path / name, ORIGINAL_CONFIG, form)
        assert_same(lora_of_model(read_adapter(tmp_path / name), 3), lora_of_model(model, 3))


def test_a_merged_model_refuses_a_checkpoint_of_the_original():
    model = adapted_blocks()
    state = export_moelora_peft(model)
    model[0][0].merge(1)
    with pytest.raises(ValueError, match=r"0\.0: the layer is merged with task 1, unmerge first"):
        load_moelora_peft(model, state)


def test_other_folders_are_refused(tmp_path):
    tensor = {"base_model.model.0.lora_A.weight": torch.zeros(2, 2)}
    write(tmp_path, {"peft_type": "LORA"}, tensor)
    with pytest.raises(ValueError, match=r"expected peft_type MOELORA.*got 'LORA'"):
        read_adapter(tmp_path)
    write(tmp_path, {"peft_type": "MOELORA", **SIZES, "router": "task"}, tensor)
    with pytest.raises(
        ValueError, match=r"0\.lora_A\.weight: expected a tensor of an adapter layer"
    ):
        read_adapter(tmp_path)
    write(tmp_path, {"peft_type": "MMOELORAS", "r": 8}, tensor)
    with pytest.raises(ValueError, match="missing: expert_num, lora_alpha, task_num, task_emb"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ("[]", "the layers that it describes cannot be built"),
        ("{", "the layers that it describes cannot be built"),
        ('{"r": "8"}', "the layers that it describes cannot be built"),
        ('{"lora_alpha": null}', "the layers that it describes cannot be built"),
        # The factor lora_alpha / r would not be the one of the training.
        (
            '{"r": 9}',
            "the rank of all experts .* multiple of expert_num, got r = 9 and expert_num = 4",
        ),
        ('{"expert_num": 0}', "multiple of expert_num, got r = 8 and expert_num = 0"),
    ),
)
def test_a_config_of_the_original_that_cannot_be_read(values, message, tmp_path):
    write(tmp_path, ORIGINAL_CONFIG, export_moelora_peft(adapted_blocks()))
    read_adapter(tmp_path)
    if values.endswith("}"):
        values = json.dumps({**ORIGINAL_CONFIG, **json.loads(values)})
    (tmp_path / "adapter_config.json").write_text(values)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_layers_with_a_gate_per_token_are_named(tmp_path):
    peft, moelora_peft = pytest.importorskip("peft"), pytest.importorskip("moelora_kernels.peft")
    config = moelora_peft.MoeLoraPeftConfig(
        router="mlp", num_experts=2, rank=2, target_modules=["0"]
    )
    peft.get_peft_model(nn.Sequential(nn.Linear(6, 8)), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0: task: its gate depends on x .router='mlp'"):
        lora_of_model(read_adapter(tmp_path))
