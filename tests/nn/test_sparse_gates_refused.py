"""Sparse external gates: the errors that name the argument, and what is wrong with it."""

import pytest
import torch

from moelora_kernels import set_tasks
from support.ffns import make_ffn
from support.linears import IN, make_layer

B, L, E, K = 3, 4, 4, 2


def bad_gates():
    """Return name -> gates, and the start of the error."""
    weights, indices = torch.rand(B, K), torch.zeros(B, K, dtype=torch.long)
    meta = torch.device("meta")
    return {
        "one entry": ((weights,), r"{}: expected a tensor, or a tuple \(weights, indices\)"),
        "three": ((weights, indices, None), r"{}: expected a tensor, or a tuple"),
        "list of weights": (([[1.0]], indices), r"{}\[0\]: expected floats|{}\[1\]: expected ind"),
        "no indices": ((weights, None), r"{}\[1\]: expected "),
        "float indices": ((weights, weights), r"{}\[1\]: expected whole numbers"),
        "bool indices": ((weights, indices.bool()), r"{}\[1\]: expected whole numbers"),
        "swapped": ((indices, weights), r"{}\[0\]: expected floats"),
        "complex": ((weights.cfloat(), indices), r"{}\[0\]: expected floats"),
        "flat": ((weights[0], indices[0]), r"{}\[0\]: expected weights \[\.\.\., K\]"),
        "other shape": ((weights, indices[:, :1]), r"{}\[1\]: expected indices like the weights"),
        "other rows": ((weights, indices[:2]), r"{}\[1\]: expected indices like the weights"),
        "K > E": ((torch.rand(B, 5), torch.zeros(B, 5).long()), r"{}\[0\]: .* 1 to 4, got \[3, 5"),
        "sparse layout": ((weights.to_sparse(), indices), r"{}\[0\]: expected floats .* sparse"),
        "meta indices": ((weights, indices.to(meta)), r"{}\[1\]: expected .* meta"),
        "meta": ((weights.to(meta), indices.to(meta)), r"{}(\[0\])?: expected .* meta"),
    }


@pytest.mark.parametrize("name", bad_gates())
@pytest.mark.parametrize("kind", ("linear", "ffn"))
def test_bad_gates_raise(name, kind):
    """The error begins with the name of the argument and the entry, also if they are set."""
    layer = (
        make_layer(router="external")
        if kind == "linear"
        else make_ffn(router="external", top_k=None)
    )
    gates, text = bad_gates()[name]
    with pytest.raises((ValueError, TypeError), match="^" + text.replace("{}", "gates")):
        layer(torch.randn(B, L, layer.input_like()[0], dtype=torch.float64), gates)
    if name != "sparse layout":  # `set_tasks` makes it dense.
        with pytest.raises((ValueError, TypeError), match="^" + text.replace("{}", "tasks")):
            set_tasks(layer, gates)
    assert layer.external_gates is None


def test_grouped_takes_no_dense_gates():
    layer = make_layer(router="external", impl="grouped")
    with pytest.raises(ValueError, match=r"^impl: 'grouped' .* a dense gate uses every expert"):
        layer(torch.randn(B, L, IN, dtype=torch.float64), torch.rand(B, E))
    with pytest.raises(ValueError, match=r"^impl: 'grouped' .* share A"):
        make_layer(router="external", impl="grouped", share="A")
