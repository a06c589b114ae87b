"""The file of tuned tiles: who reads it, when it is ignored, and which errors it causes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import triton

from moelora_kernels import info, types
from moelora_kernels.kernels.common import configs, launcher, tuned
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.tuned import TunedFile
from support.arguments import calls
from support.backends import TRITON, needs_triton, op_launcher
from support.cases import WIDE
from support.op_checks import WIDE_OPS, compare
from support.tune_search import CPU

KEY = ("shrink_gate", 2, 64)
TILE = TileConfig(16, 32, 4, 2)


def content(**changes) -> TunedFile:
    machine = {**tuned.describe_machine(CPU), **changes}
    options = {"shapes": "64x48"}
    return TunedFile(machine, "0.1.0", "abc", options, {KEY: TILE}, [])


def taken_tile() -> TileConfig:
    return configs.tile_config("shrink_gate", CPU, torch.bfloat16, 64)


def test_a_file_comes_back(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    assert tuned.read(path) is None
    written = content()._replace(tiles={KEY: TILE._replace(registers=255)})
    tuned.write(path, written)
    assert tuned.read(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]


def test_the_launchers_read_the_file_once(tiles_file):
    tuned.write(tiles_file, content())
    assert taken_tile() == TILE
    other = configs.tile_config("shrink_gate", CPU, torch.bfloat16, 32)
    assert other is configs.TILE_CONFIGS["sm_90"]["shrink_gate", 2, 32]
    tiles_file.unlink()
    assert taken_tile() == TILE


def test_the_shipped_table_serves_other_architectures_and_meta_tensors(tiles_file):
    tuned.write(tiles_file, content())
    assert taken_tile() == TILE
    with configs.assume("sm_90"):
        assert taken_tile() is configs.TILE_CONFIGS["sm_90"][KEY]
    meta = configs.tile_config("shrink_gate", torch.device("meta"), torch.bfloat16, 64)
    assert meta is configs.TILE_CONFIGS["sm_90"][KEY]


@needs_triton
@pytest.mark.parametrize("op", WIDE_OPS)
def test_ops_are_right_with_tuned_tiles(op, tiles_file):
    """Every tile of 64 columns is half as large."""
    tiles = {
        key: tile._replace(tokens=tile.tokens // 2, step=tile.step // 2)
        for key, tile in configs.TILE_CONFIGS["sm_90"].items()
        if key[0] in WIDE_OPS and key[1:] == (2, 64)
    }
    tuned.write(tiles_file, content()._replace(tiles=tiles))
    for arguments in calls(op, TRITON.inputs(WIDE["plain"], torch.bfloat16).to(CPU)):
        with launcher.recording() as launches:
            compare(op, op_launcher(op), arguments, torch.bfloat16)
        assert launches[0].tile_config == tiles[op, 2, 64]


@pytest.mark.parametrize("name", ("device", "torch", "triton", "kernels"))
def test_a_file_of_another_machine_is_ignored_with_one_warning(name, tiles_file):
    tuned.write(tiles_file, content(**{name: "another"}))
    with pytest.warns(UserWarning, match="ignored, because") as caught:
        tiles = [taken_tile() for _ in range(3)]
    assert {*tiles} == {configs.TILE_CONFIGS["sm_90"][KEY]}
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"{tiles_file}: ignored, because {name} is ")
    assert "was 'another' when the tiles were tuned" in text
    assert "python -m moelora_kernels.tune" in text


def test_a_kernel_that_does_not_exist_is_ignored(tiles_file):
    tuned.write(tiles_file, content()._replace(tiles={("shrink", 2, 64): TILE}))
    with pytest.warns(UserWarning, match=r"there is no kernel for \('shrink', 2, 64\)"):
        taken_tile()


@pytest.mark.parametrize("kernel", tuned.ROUTED_TILES)
def test_a_tile_that_holds_no_tile_of_pairs_is_ignored(kernel, tiles_file):
    key, tile = (kernel, 2, 64), TileConfig(types.TILE // 2, 64, 4, 2)
    tuned.write(tiles_file, content()._replace(tiles={key: tile}))
    with pytest.warns(UserWarning, match="has 32 tokens, and needs at least 64"):
        taken_tile()
    assert tuned.difference(content()._replace(tiles={KEY: TILE}), CPU) is None


@pytest.mark.parametrize(
    "name", ("kernels/grouped_expand.py", "kernels/common/configs.py", "types.py", "numerics.py")
)
def test_the_hash_covers_the_constants_of_the_kernels(name, tmp_path, monkeypatch):
    package = Path(types.__file__).parent
    for file in (package / "types.py", package / "numerics.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(package / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(tuned, "_PACKAGE", tmp_path)
    result = tuned._hash_of_kernels.__wrapped__()
    assert result == tuned._hash_of_kernels.__wrapped__()
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    assert tuned._hash_of_kernels.__wrapped__() != result


@pytest.mark.parametrize(
    "text",
    (
        "{", "[]", "{}", "3", '{"machine": {}, "tiles": 1}',
        json.dumps({"machine": {}, "tiles": [{"kernel": "shrink_gate"}]}),
    ),
)  # fmt: skip
def test_a_broken_file_is_an_error_that_names_it(text, tiles_file):
    tiles_file.write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tiles\.json: expected a file of tiles") as caught:
            taken_tile()
        assert str(tiles_file) in str(caught.value)
        assert "MOELORA_TILES=0" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), (("tokens", 48), ("step", "64"), ("warps", 0), ("width", 64))
)
def test_an_impossible_tile_is_an_error(field, value, tiles_file):
    tuned.write(tiles_file, content())
    changed = json.loads(tiles_file.read_text())
    changed["tiles"][0]["tile"][field] = value
    tiles_file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=field):
        taken_tile()


def test_a_missing_file_of_moelora_tiles_is_a_warning(tiles_file):
    with pytest.warns(UserWarning, match=r"MOELORA_TILES: .*tiles\.json does not exist"):
        taken_tile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken_tile() is configs.TILE_CONFIGS["sm_90"][KEY]


def test_a_default_file_that_cannot_be_read_is_a_warning(tiles_file, monkeypatch):
    monkeypatch.setattr(tuned, "file_path", lambda device: tiles_file)
    tiles_file.mkdir()
    with pytest.raises(ValueError, match=r"MOELORA_TILES: .*tiles\.json cannot be read: Is a dir"):
        taken_tile()
    assert tuned.describe(CPU).startswith(f"broken: {tiles_file} cannot be read")
    monkeypatch.delenv("MOELORA_TILES")
    with pytest.warns(UserWarning, match=r"tiles\.json: ignored, because it cannot be") as caught:
        tiles = [taken_tile() for _ in range(3)]
    assert {*tiles} == {configs.TILE_CONFIGS["sm_90"][KEY]}
    assert len(caught) == 1
    assert tuned.describe(CPU).startswith(f"none: {tiles_file} cannot be read")
    # A broken file stays an error.
    tiles_file.rmdir()
    tiles_file.write_text("{")
    configs._tables.clear()
    with pytest.raises(ValueError, match="expected a file of tiles"):
        taken_tile()


def test_a_default_file_below_a_file_is_missing(tmp_path, monkeypatch, tiles_file):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOELORA_TILES")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken_tile() is configs.TILE_CONFIGS["sm_90"][KEY]


def test_a_user_without_a_home_folder_has_no_file(monkeypatch, tiles_file):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOELORA_TILES")
    assert taken_tile() is configs.TILE_CONFIGS["sm_90"][KEY]
    assert tuned.describe(CPU) == "none: there is no home folder, and MOELORA_TILES is not set"


@needs_triton
def test_a_launch_without_resources_names_the_file(tiles_file):
    class TooLarge:
        def __getitem__(self, grid):
            raise triton.OutOfResources(300_000, 232_448, "shared memory")

    tuned.write(tiles_file, content())
    with pytest.raises(RuntimeError, match="out of resource: shared memory") as caught:
        launcher.run(TooLarge(), 1, TILE, {"x_ptr": torch.zeros(1)}, {})
    assert f"{TILE}; tuned tiles: 1 from {tiles_file}" in str(caught.value)


def test_the_default_file_is_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOELORA_TILES")
    monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA H200 (80 GB)")
    folder = tmp_path / "moelora_kernels" / "tiles"
    assert tuned.file_path(CPU) == folder / "NVIDIA-H200-80-GB-.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.file_path(CPU).is_relative_to(Path.home() / ".cache")


@pytest.mark.parametrize("value", ("", "0"))
def test_moelora_tiles_can_switch_the_file_off(value, tiles_file, monkeypatch):
    monkeypatch.setenv("MOELORA_TILES", value)
    assert tuned.file_path(CPU) is None
    assert taken_tile() is configs.TILE_CONFIGS["sm_90"][KEY]
    assert tuned.describe(CPU) == "none: MOELORA_TILES is 0"


def test_info_shows_the_file(tiles_file, monkeypatch, capsys):
    def shown() -> str:
        info.main(["--json"])
        return json.loads(capsys.readouterr().out)["tuned tiles"]["cpu"]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert shown().startswith(f"none: {tiles_file} does not exist; `python -m")
    tuned.write(tiles_file, content())
    assert shown() == f"1 from {tiles_file}, version 0.1.0, commit abc"
    tuned.write(tiles_file, content(torch="2.0"))
    assert shown().startswith(f"ignored: {tiles_file}, because torch is ")
    tiles_file.write_text("{")
    assert shown().startswith(f"broken: {tiles_file}: expected a file of tiles")


def test_info_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert info.tuned_tiles() == "none: torch finds no GPU"
