"""Files that are broken, empty or hold other objects than tensors: an error names the file.

No code in a file runs, and the model does not change.
"""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.compare import assert_same
from support.layouts import LAYOUTS
from support.originals import snapshot, state_of


class Code:
    """An object whose unpickling creates the file `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def write_truncated_safetensors(path, state):
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    path.write_bytes(path.read_bytes()[:-50])


def write_truncated_bin(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-50])


def write_code(path, state):
    torch.save({**state, "x": Code(path.with_name("marker"))}, path)


def write_plain_pickle(path, state):
    path.write_bytes(pickle.dumps({"x": Code(path.with_name("marker"))}, protocol=2))


def write_nothing(path, state):
    path.write_bytes(b"")


def write_list(path, state):
    torch.save([torch.zeros(2)], path)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("write", "name", "message"),
    (
        (write_truncated_safetensors, "a.safetensors", "not a readable safetensors file"),
        (write_truncated_bin, "a.bin", "not a readable file of tensors"),
        (write_code, "a.bin", "pickled code is never run"),
        (write_plain_pickle, "a.bin", "pickled code is never run"),
        (write_nothing, "a.bin", "not a readable file of tensors"),
        (write_list, "a.bin", "expected a dictionary of tensors, got list"),
        (write_code, "a.safetensors", "not a readable safetensors file"),
    ),
)
def test_a_broken_file_is_named_and_changes_nothing(layout, write, name, message, tmp_path):
    model = layout.ours()
    before = snapshot(model)
    write(tmp_path / name, state_of(layout.original()))
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        layout.load(model, tmp_path / name)
    assert not (tmp_path / "marker").exists()
    assert_same(snapshot(model), before)


def test_torch_load_would_run_the_code(tmp_path):
    """Without weights_only the marker appears: the test above can fail."""
    write_code(tmp_path / "a.bin", {})
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_missing_file_or_an_empty_folder_is_named(layout, tmp_path):
    with pytest.raises(TypeError, match="state_dict: expected tensors by key, a path"):
        layout.load(layout.ours(), 3)
    with pytest.raises(FileNotFoundError):
        layout.load(layout.ours(), tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"one of: adapter_model\.safetensors, adapter_model\.bin"):
        layout.load(layout.ours(), tmp_path)
