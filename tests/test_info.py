"""`python -m moelora_kernels.info` says what is there, in words and in JSON."""

from __future__ import annotations

import json

import pytest
import torch

from moelora_kernels import info, native


def test_json_report(capsys):
    info.main(["--json", "--tokens", "64", "--experts", "4", "--rank", "2", "--top-k", "0"])
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["native"]["available"] == native.available()
    assert bool(report["native"]["reason"]) != native.available()
    built = native.build_info().get("ops", ())
    for op, devices in report["implementations"].items():
        whole_layer = op.removesuffix("_backward") in ("wide", "grouped")
        plain = "composite" if whole_layer else "reference"
        assert devices["cpu"] == ("native" if op in built else plain), op
        # No kernel of Triton sorts the pairs.
        if op in native.build_info().get("cuda_ops", ()):
            assert devices["cuda"] == "native", op
        elif op != "route":
            assert devices["cuda"] == ("composite" if whole_layer else "triton"), op
    assert set(report["tiles"]) == {"sm_80", "sm_89", "sm_90", "sm_100"}
    assert all(text.endswith("qualified") for text in report["tiles"].values())
    auto = report["auto"]
    assert (auto["impl"], auto["tokens"], auto["top_k"]) == ("wide", 64, None)
    assert auto["reason"].startswith("R = 8: a dense gate")
    assert report["formulations"]["grouped"] == "available"
    assert report["formulations"]["decode"] != "available"


def test_text_report(capsys):
    info.main([])
    out = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in out
    assert "impl: " in out
    assert "reason: " in out


@pytest.mark.parametrize(
    "arguments", (["--rank", "0"], ["--tokens", "-1"], ["--top-k", "9"], ["--top-k", "-1"]), ids=str
)
def test_sizes_of_no_layer_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        info.main(arguments)
    assert arguments[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err
