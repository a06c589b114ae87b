"""`python -m moelora_kernels.info` reports versions, ops and choices, as text and as JSON."""

from __future__ import annotations

import json
import re

import pytest
import torch

from moelora_kernels import dispatch, info, native
from moelora_kernels.kernels.common import configs
from moelora_kernels.ops import registration


def test_json_report(capsys):
    info.main(["--json", "--tokens", "64", "--experts", "4", "--rank", "2", "--top-k", "0"])
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["native"]["available"] == native.available()
    assert bool(report["native"]["reason"]) != native.available()
    assert report["native"]["failed replays"] == native.replay_failures()[0]
    built, built_cuda = (native.build_info().get(name, ()) for name in ("ops", "cuda_ops"))
    for op, devices in report["implementations"].items():
        whole_layer = op.removesuffix("_backward") in ("wide", "grouped")
        plain = "composite" if whole_layer else "reference"
        assert devices["cpu"] == ("native" if op in built else plain), op
        plain = "triton" if op in registration.KERNELS else plain
        assert devices["cuda"] == ("native" if op in built_cuda else plain), op
    assert {"shrink_gate", "weight_grad", "shrink_dx", "dropout"} <= registration.KERNELS.keys()
    if native.available():
        # The native library has every op on a CPU.
        implementations = {devices["cpu"] for devices in report["implementations"].values()}
        assert "reference" not in implementations
    found = report["triton kernels"]
    if found.startswith("available"):
        assert found.endswith("no GPU to run them") != torch.cuda.is_available()
    assert set(report["tiles"]) == set(configs.TILE_CONFIGS)
    for architecture, text in report["tiles"].items():
        assert "qualified on hardware" in text
        assert text.endswith("executed on a CPU") == (architecture in configs.EXECUTED)
    auto = report["auto"]
    assert (auto["impl"], auto["tokens"], auto["top_k"]) == ("wide", 64, None)
    assert auto["reason"].startswith("R = 8: a dense gate")
    assert report["formulations"]["grouped"] == "available"
    assert report["formulations"]["decode"] != "available"


def test_text_report(capsys):
    info.main([])
    out = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in out
    assert re.search(r"impl: (wide|grouped)\n  reason: [RT] = \d+", out)


def test_more_experts_change_the_choice_of_auto(capsys):
    columns = dispatch.THRESHOLDS["cpu"].columns
    for experts, expected in ((2, "wide"), (int(columns), "grouped")):
        sizes = ["--device", "cpu", "--tokens", "8192", "--rank", "2", "--top-k", "1"]
        info.main(["--json", "--experts", str(experts), *sizes])
        auto = json.loads(capsys.readouterr().out)["auto"]
        expected = expected if native.available() else "wide"
        assert auto["impl"] == expected
        assert f"R = {2 * experts}" in auto["reason"]


@pytest.mark.parametrize(
    "arguments", (["--rank", "0"], ["--tokens", "-1"], ["--top-k", "9"], ["--top-k", "-1"]), ids=str
)
def test_impossible_sizes_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        info.main(arguments)
    assert arguments[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err
