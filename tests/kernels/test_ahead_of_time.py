"""Every shipped tile compiles without spills, within shared memory, to wgmma and wide loads."""

from __future__ import annotations

import pytest

from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import LAYERS, complaints, record
from benchmarks.model.machine_code import innermost_loops, width
from moelora_kernels.kernels.common import configs
from support.selection import exhaustive


@exhaustive
@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_every_kernel_may_ship(architecture, run_compiling):
    """Compiling takes about 8 minutes of one core, once; then the kernels are in the cache."""
    run_compiling("benchmarks/ahead_of_time.py", "--architectures", architecture, timeout=3600)


def test_the_kernels_of_odd_ranks_may_ship(run_compiling):
    """The default choice: rows that are not aligned take most registers, without wgmma."""
    layers = "--layers", "odd ranks R=119"
    run_compiling("benchmarks/ahead_of_time.py", "--architectures", "sm_89,sm_120", *layers)


@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_the_layers_take_every_entry_of_the_table(architecture):
    taken = set()
    with configs.assume(architecture):
        table = configs.TILE_CONFIGS[architecture]
        for layer in LAYERS:
            for launch in record(layer):
                taken |= {key for key, tile in table.items() if tile is launch.tile_config}
    assert taken == set(table)


def one(kernel: str, layer: str = "R=128"):
    with configs.assume("sm_90"):
        launches = record(next(each for each in LAYERS if each.name == layer))
    return next(each for each in launches if each.kernel.fn.__name__ == kernel)


GOOD = dict(spills=0, stack=0, shared=100_000, tensor_core={"HGMMA": 8}, accesses={"LDGSTS.16": 4})


@pytest.mark.parametrize(
    ("change", "complaint"),
    (
        ({}, ""),
        ({"spills": 2}, "2 spilling"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": (227 << 10) + 1}, "shared memory"),
        ({"tensor_core": {"HMMA": 8}}, "no wgmma"),
        ({"accesses": {"LDGSTS.4": 1}}, "loads of 4 bytes"),
        ({"accesses": {"LDG.4": 1, "STG.2": 1}}, ""),
    ),
)
def test_what_is_complained_about(change, complaint):
    kernel = "shrink_gate_backward_kernel"
    found = complaints({"kernel": kernel, **GOOD, **change}, one(kernel), "sm_90")
    assert len(found) == bool(complaint)
    assert complaint in "".join(found)


def test_narrow_loads_are_allowed_where_rows_are_not_aligned():
    launch = one("weight_grad_kernel", "R=24 of mixed ranks")
    assert ahead_of_time.natural_widths(launch) == {4, 16}


@pytest.mark.parametrize("layer", ("R=128", "odd widths", "odd ranks R=35"))
def test_loads_of_16_bytes_are_required(layer):
    """B is padded to 48 columns if R = 35."""
    assert ahead_of_time.natural_widths(one("shrink_gate_backward_kernel", layer)) == {16}


@pytest.mark.parametrize(
    ("suffix", "size"),
    ((".128", 16), (".64.CONSTANT", 8), ("", 4), (".U16", 2), (".BYPASS.128", 16)),
)
def test_width_of_an_access(suffix, size):
    assert width(suffix) == size


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        ahead_of_time.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_unknown_architectures_are_refused(capsys):
    with pytest.raises(SystemExit):
        ahead_of_time.main(["--architectures", "sm_70"])
    assert "sm_70" in capsys.readouterr().err


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   FADD R3, R3, R3 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
"""


def test_innermost_loops():
    """The loop of two instructions lies in one of four; the jump to itself is no loop."""
    assert innermost_loops(SASS) == [2]
