"""Every rule of a gate, with random options of the other axes, computes its formula."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora_kernels import MoeLoraConfig, MoeLoraLinear, set_tasks
from support.compare import assert_same, training_step
from support.formulas.any_config import mixture

EXPERTS, IN, OUT = 4, 6, 5

# (score, select, normalize). A sum of raw logits may be negative, so that it can neither normalise
# nor have a share for "topp"; a softmax of scores minus a threshold would ignore the threshold.
GATES = [
    (score, select, normalize)
    for score in ("softmax", "sigmoid", "identity")
    for select in ("all", "topk", "topp", "threshold")
    for normalize in ("none", "sum", "softmax")
    if score != "identity" or (select != "topp" and normalize != "sum")
] + [
    (score, "learned_threshold", normalize)
    for score in ("softmax", "sigmoid", "identity")
    for normalize in ("none", "sum")
    if score != "identity" or normalize == "none"
]
# select -> its options. A threshold of 0.9 leaves tokens with some experts and tokens without any.
LIMITS = {
    "all": [{}],
    "topk": [
        dict(top_k=1),
        dict(top_k=2),
        dict(top_k=EXPERTS),
        dict(top_k=1, entropy_threshold=0.5),
    ],
    "topp": [
        dict(top_p=0.3),
        dict(top_p=0.8),
        dict(top_p=1.0),
        dict(top_p=0.3, keep_min=2, entropy_threshold=0.5, entropy_index=1.7),
    ],
    "threshold": [
        dict(threshold=0.2),
        dict(threshold=0.9),
        dict(threshold=0.9, keep_min=1, entropy_threshold=0.4),
    ],
    "learned_threshold": [{}, dict(max_threshold=0.9)],
}
RULES = [(*gate, limit) for gate in GATES for limit in LIMITS[gate[1]]]


@st.composite
def other_options(draw):
    """Draw valid options of the other axes, and a seed."""
    router = draw(st.sampled_from(["linear", "mlp", "task"]))
    share = draw(st.sampled_from(["none", "A"]))
    options = dict(
        num_experts=EXPERTS,
        rank=2 if share == "A" else draw(st.sampled_from([1, 3, (1, 2, 3, 1)])),
        router=router,
        share=share,
        shared_expert=draw(st.sampled_from(["none", "always", "complement"])),
        temperature=draw(st.sampled_from([1.0, 0.5])),
        alpha=3.0,
    )
    if router == "task":
        options.update(num_tasks=5, task_embedding_dim=3)
    else:
        options["granularity"] = draw(st.sampled_from(["token", "sequence"]))
    if router == "linear":
        options["router_bias"] = draw(st.booleans())
    return options, draw(st.integers(0, 2**20))


@pytest.mark.parametrize(("score", "select", "normalize", "limit"), RULES, ids=str)
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(options_and_seed=other_options())
def test_every_gate_computes_its_formula(score, select, normalize, limit, options_and_seed):
    """No pair of options may meet in a branch that no test runs."""
    options, seed = options_and_seed
    if select == "learned_threshold" and options["router"] == "task":
        # A task has no x, from which a threshold is learned.
        options = {k: v for k, v in options.items() if "task" not in k} | {"router": "mlp"}
    config = MoeLoraConfig(**options, score=score, select=select, normalize=normalize, **limit)
    torch.manual_seed(seed)
    layer = MoeLoraLinear(IN, OUT, config=config, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
        for parameter in layer.router.parameters():
            parameter.normal_()
    x, dy = torch.randn(2, 3, IN).double(), torch.randn(2, 3, OUT).double()
    tasks = None
    if config.router == "task":
        tasks = torch.tensor([4, 1])
        set_tasks(layer, tasks)
    reference = copy.deepcopy(layer)
    reference.config = config.replace(impl="reference")
    assert reference.config.impl == "reference"

    def step(module, forward=None):
        return training_step(module, x, dy, forward, unused_as_zero=True)

    actual = step(layer)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    formula = step(layer, lambda leaf: mixture(layer, leaf, tasks=tasks))
    for expected in (step(reference), formula):
        assert_same(actual, expected, rtol=1e-9, atol=1e-9)
