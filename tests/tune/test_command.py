"""`python -m moelora_kernels.tune`: its arguments, the file that it writes, and the shapes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from moelora_kernels.kernels.common import configs, tuned
from moelora_kernels.tune import __main__ as command
from moelora_kernels.tune import search, sizes
from support.backends import needs_triton
from support.tune_search import CPU, SHIPPED, fake_clock, faulty, three_candidates

SMALL = ["--shapes", "48x32", "--tokens", "20", "--experts", "4", "--rank", "4", "--device", "cpu"]


@pytest.fixture
def on_cpu(tiles_file, monkeypatch):
    """The command on the CPU, with three candidates and a fake clock; the path of its file."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(search, "candidates", three_candidates)
    for effort in ("EFFORT", "QUICK"):
        monkeypatch.setattr(command, effort, command.Effort(2, 1))
    times = {SHIPPED: 10.0, 8: 7.0, 9: 8.0}
    monkeypatch.setattr(command, "HostClock", lambda samples: fake_clock(times))
    return tiles_file


@needs_triton
def test_the_command_writes_the_file_that_the_launchers_read(on_cpu, capsys):
    assert command.main([*SMALL, "--commit", "abc"]) == 0
    out = capsys.readouterr().out
    assert "shrink_dx 2 16: 64 128 8 8, shipped 64 128 8 2, 7.0 (10.0)\n" in out
    assert f"all 4 shipped tiles of these shapes are right: cpu, torch {torch.__version__}, " in out
    assert out.endswith(f", abc\nwritten: {on_cpu}\n")
    content = tuned.read(on_cpu)
    assert content.commit == "abc"
    assert content.options["shapes"] == "48x32"
    assert {key[1:] for key in content.tiles} == {(2, 16)}
    tile = configs.tile_config("shrink_gate", CPU, torch.bfloat16, 16)
    assert tile == content.tiles["shrink_gate", 2, 16]
    assert tile.stages == 8


@needs_triton
def test_a_second_run_keeps_the_other_entries(on_cpu, monkeypatch, capsys):
    entries = {
        ("weight_grad", 2, 64): configs.TileConfig(32, 32, 4, 2),
        ("shrink_gate", 2, 16): configs.TileConfig(32, 32, 4, 2),
    }
    machine = tuned.describe_machine(CPU)
    refused = [
        {"entry": list(key), "tile": [16, 16, 4, 1], "problem": "RuntimeError: earlier"}
        for key in entries
    ]
    earlier = tuned.TunedFile(machine, "0.1.0", "earlier", {}, entries, refused)
    # The shipped tiles are the fastest now.
    monkeypatch.setattr(command, "HostClock", lambda samples: fake_clock({SHIPPED: 1.0, 8: 2.0}))
    for content, expected in (
        (earlier, [("weight_grad", 2, 64)]),
        (earlier._replace(machine={**machine, "torch": "2.0"}), []),
    ):
        tuned.write(on_cpu, content)
        assert command.main([*SMALL, "--quick"]) == 0
        written = tuned.read(on_cpu)
        assert written.tiles == {key: entries[key] for key in expected}
        assert [tuple(each["entry"]) for each in written.refused] == expected
    assert "are right" not in capsys.readouterr().out


@needs_triton
def test_an_interrupted_run_writes_the_entries_that_are_timed(on_cpu, monkeypatch, capsys):
    key = ("shrink_gate", 2, 16)
    tile = configs.TILE_CONFIGS["sm_90"][key]._replace(stages=8)

    def interrupted(layers, options) -> search.Search:
        fast = [search.Candidate(tile._replace(stages=3), 10.0), search.Candidate(tile, 7.0)]
        return search.Search({key: fast}, interrupted=True)

    monkeypatch.setattr(command, "search", interrupted)
    assert command.main(SMALL) == 130
    out = capsys.readouterr().out
    assert out.endswith(f"written: {on_cpu}\ninterrupted: only the entries above are tuned\n")
    assert "are right" not in out
    assert tuned.read(on_cpu).tiles == {key: tile}


def test_a_file_that_cannot_be_written_is_refused_before_the_search(on_cpu, monkeypatch, capsys):
    def message() -> str:
        with pytest.raises(SystemExit):
            command.main(SMALL)
        return capsys.readouterr().err

    with monkeypatch.context() as patches:
        patches.setattr(command.os, "access", lambda path, mode: False)
        assert f"{on_cpu.parent}: expected a folder in which files can be written" in message()
    on_cpu.mkdir()
    assert "Is a directory" in message()
    on_cpu.rmdir()
    on_cpu.write_text("")
    monkeypatch.setenv("MOELORA_TILES", str(on_cpu / "tiles.json"))
    assert str(on_cpu) in message()


@needs_triton
def test_a_shipped_tile_that_is_refused_fails_the_command(on_cpu, monkeypatch, capsys):
    def add_one(output: torch.Tensor) -> None:
        output += 1

    wrong = faulty(add_one, stages=(2, 3))
    monkeypatch.setattr(search.Options, "launcher_of", property(lambda self: wrong))
    assert command.main(SMALL) == 1
    out = capsys.readouterr().out
    assert "refused: shrink_gate 2 16: 64 128 4 3: AssertionError: h: error" in out
    assert "are right" not in out
    assert {tile["entry"][0] for tile in tuned.read(on_cpu).refused} >= {"shrink_gate"}


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for name in ("--model", "--shapes", "--tokens", "--quick", "MOELORA_TILES"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ([], "one of the arguments --model --shapes is required"),
        (["--shapes", "8x8", "--model", "m"], "not allowed with"),
        (["--shapes", "4096"], "shapes: expected IN x OUT, like 4096x11008, got '4096'"),
        (["--shapes", "0x8"], "shapes: expected IN x OUT"),
        (["--shapes", "8x8,8x8"], "shapes: expected different shapes"),
        (["--shapes", "8x8", "--tokens", "no"], "tokens: expected numbers from 1"),
        (["--shapes", "8x8", "--tokens", "8,0"], "tokens: expected numbers from 1"),
        (["--shapes", "8x8", "--experts", "0"], "experts: expected at least 1, got 0"),
        (["--shapes", "8x8", "--rank", "-1"], "rank: expected at least 1, got -1"),
        (["--shapes", "8x8", "--top-k", "9"], "top_k: expected at most 8 experts, got 9"),
        (["--shapes", "8x8", "--rank", "2", "--dtype", "fp32"], "rank: expected a multiple of 4"),
        (
            ["--shapes", "8x8", "--impl", "grouped", "--top-k", "8"],
            "impl: grouped needs top_k below 8 experts, got 8",
        ),
        (["--shapes", "8x8", "--device", "tpu"], "device: expected a device like cuda:0"),
        (["--model", "no/config.json"], "model: no/config.json does not exist"),
    ),
    ids=str,
)
def test_bad_arguments_are_refused_by_name(arguments, message, tiles_file, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not tiles_file.exists()


def test_a_machine_without_a_gpu_is_refused(tiles_file, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.registration, "kernels_problem", lambda: None)
    for device, message in (("cuda", "torch finds no GPU"), ("cpu", "expected a GPU, got 'cpu'")):
        with pytest.raises(SystemExit):
            command.main(["--shapes", "8x8", "--device", device])
        assert f"device: {message}" in capsys.readouterr().err


def test_a_gpu_that_is_too_old_is_refused(tiles_file, monkeypatch, capsys):
    properties = SimpleNamespace(name="V100", major=7, minor=0, multi_processor_count=80)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(command.registration, "kernels_problem", lambda: None)
    for name, value in (
        ("is_available", True), ("device_count", 1), ("current_device", 0), ("set_device", None),
        ("get_device_properties", properties),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(configs, "_query_gpu", configs._query_gpu.__wrapped__)
    with pytest.raises(SystemExit):
        command.main(["--shapes", "8x8"])
    assert "error: V100 has compute capability 7.0" in capsys.readouterr().err


def test_a_broken_file_is_refused_before_the_search(on_cpu, capsys):
    on_cpu.write_text("{")
    with pytest.raises(SystemExit):
        command.main(SMALL)
    assert f"{on_cpu}: expected a file of tiles" in capsys.readouterr().err


def test_without_a_file_to_write_nothing_is_tuned(on_cpu, monkeypatch, capsys):
    monkeypatch.setenv("MOELORA_TILES", "0")
    with pytest.raises(SystemExit):
        command.main(SMALL)
    expected = "MOELORA_TILES: expected the path of the file to write, got none: MOELORA_TILES is 0"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_auto_takes_the_formulation_of_the_device(monkeypatch):
    def forms(*arguments: str) -> list[str]:
        args = command.make_parser().parse_args(["--shapes", "64x64", *arguments])
        return [layer.form for layer, _ in command.find_layers(args, torch.device("cuda"))]

    many = ("--experts", "256", "--tokens", "512,8192")
    monkeypatch.setattr(command.dispatch, "_fast_ops_problem", lambda device: None)
    monkeypatch.setattr(command.dispatch, "device_class", lambda device: "sm_90")
    assert forms(*many) == ["wide", "grouped"]
    assert forms(*many, "--impl", "grouped") == ["grouped", "grouped"]


def test_the_shapes_of_a_model(tmp_path):
    pytest.importorskip("transformers")
    config = dict(
        model_type="qwen2", hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=3, vocab_size=40,
    )  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    # k and v; q and o; gate and up; down.
    expected = [(32, 16, 6), (32, 32, 6), (32, 48, 6), (48, 32, 3)]
    assert sizes.model_shapes(str(path)) == expected
    assert sizes.model_shapes(str(tmp_path)) == expected
    path.write_text(json.dumps({"model_type": "none"}))
    with pytest.raises(ValueError, match="model: cannot build a model from"):
        sizes.model_shapes(str(path))


def test_a_model_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"model: needs transformers .* use --shapes"):
        sizes.model_shapes("config.json")
