"""Every shipped tile compiles without spills, within shared memory, to wgmma and wide loads."""

from __future__ import annotations

import pytest

from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import LAYERS, complaints, entries_taken, record
from benchmarks.model import machine_code
from benchmarks.model.machine_code import innermost_loops, key_of, overwritten_operands, width
from moelora_kernels.kernels.common import configs
from support.selection import exhaustive


@exhaustive
def test_every_kernel_of_sm_90_may_ship(run_compiling):
    """About 400 kernels, with the newest Triton alone. Then they are in the cache."""
    run_compiling("benchmarks/ahead_of_time.py", "--architectures", "sm_90", timeout=3600)


@pytest.mark.ptx
@exhaustive
@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_every_tile_may_ship(architecture, run_compiling):
    """About 120 kernels. The command without --choice compiles every kernel."""
    choice = "--architectures", architecture, "--choice"
    run_compiling("benchmarks/ahead_of_time.py", *choice, timeout=3600)


@pytest.mark.parametrize(
    ("architectures", "layer"),
    (
        # Rows that are not aligned take most registers, without wgmma.
        ("sm_89,sm_120", "odd ranks R=119"),
        # The second launch of the shrink: ptxas spills if `configs.PARTIALS_TILE` has no limit.
        ("sm_120", "R=256"),
        # The logits are sums of three products for each tile of x. Spilled with Triton 3.6 only.
        ("sm_80,sm_120", "odd ranks R=35 fp32 adapters"),
    ),
)
def test_the_kernels_that_take_most_registers_may_ship(architectures, layer, run_compiling):
    """The default selection compiles only these layers."""
    layers = "--layers", layer
    run_compiling("benchmarks/ahead_of_time.py", "--architectures", architectures, *layers)


@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_the_layers_take_every_entry_of_the_table(architecture):
    taken = {key for layer in LAYERS for key in entries_taken(layer, architecture)}
    assert taken == set(configs.TILE_CONFIGS[architecture])


def one(kernel: str, layer: str = "R=128"):
    with configs.assume("sm_90"):
        launches = record(next(each for each in LAYERS if each.name == layer))
    return next(each for each in launches if each.kernel.fn.__name__ == kernel)


GOOD = dict(
    spills=0, stack=0, shared=100_000, tensor_core={"HGMMA": 8}, accesses={"LDGSTS.16": 4},
    overwrites=[],
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complaint"),
    (
        ({}, ""),
        ({"spills": 2}, "2 spilling"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": (227 << 10) + 1}, "shared memory"),
        ({"tensor_core": {"HMMA": 8}}, "no wgmma"),
        ({"accesses": {"LDGSTS.4": 1}}, "loads of 4 bytes"),
        ({"overwrites": ["MOV R4, R5"]}, "MOV R4, R5 before the product has read it"),
        ({"accesses": {"LDG.4": 1, "STG.2": 1}}, ""),
    ),
)
def test_what_is_complained_about(change, complaint):
    kernel = "shrink_gate_backward_kernel"
    found = complaints({"kernel": kernel, **GOOD, **change}, one(kernel), "sm_90")
    assert len(found) == bool(complaint)
    assert complaint in "".join(found)


def test_launches_with_other_compiler_options_are_compiled_too(monkeypatch):
    # Only compiled kernels have a signature.
    monkeypatch.setattr(machine_code, "arguments_of", lambda launch: None)
    launch = one("shrink_gate_backward_kernel")
    limited = launch._replace(tile_config=launch.tile_config._replace(registers=128))
    assert key_of(limited) != key_of(launch)


def test_a_kernel_that_compiles_to_nothing():
    kernel = "shrink_gate_backward_kernel"
    row = {"kernel": kernel, **GOOD, "tensor_core": {}}
    assert complaints(row, one(kernel), "sm_100") == ["no product on tensor cores"]


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


# Two products in a loop, each a group. R4 to R7 and R8 to R11 are their left operands.
PRODUCTS = """
        /*0000*/                   LDSM.16.M88.4 R4, [R82] ;
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR20], R24, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0030*/                   LDS.128 R8, [R83] ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR20], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/              @!P0 BRA 0x0 ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("old", "new", "overwritten"),
    (
        ("", "", ()),
        # The products of the last pass may still read both.
        ("0x1 ;", "0x2 ;", ("LDSM.16.M88.4 R4", "LDS.128 R8")),
        # The second product reads nothing but shared memory.
        (" R8, gdesc", " gdesc", ()),
        ("EXIT", "MOV R10, R2", ("MOV R10, R2",)),
        ("EXIT", "STS.128 [R8], R8", ()),
    ),
)
def test_operands_that_are_overwritten(old, new, overwritten):
    found = overwritten_operands(PRODUCTS.replace(old, new))
    assert sorted(text.split(",")[0] for text in found) == sorted(
        text.split(",")[0] for text in overwritten
    )
