"""MoeLoraConfig: wrong options are named, missing ones follow from others, JSON keeps all."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, MoeLoraLinear
from moelora_kernels.presets import PRESETS

OPTIONS = [field.name for field in dataclasses.fields(MoeLoraConfig)]

# The option that the error must name, and the options.
WRONG_OPTIONS = [
    ("num_experts", dict(num_experts=0)),
    ("num_experts", dict(num_experts=2.0)),
    ("num_experts", dict(num_experts=True)),
    ("rank", dict(rank=0)),
    ("rank", dict(rank=-1)),
    ("rank", dict(rank=1.5)),
    ("rank", dict(num_experts=3, rank=(2, 2))),
    ("rank", dict(num_experts=2, rank=(2, 0))),
    ("rank", dict(num_experts=2, rank=(2, 4), share="A")),
    ("scaling", dict(scaling="alpha*r")),
    ("scaling", dict(num_experts=2, scaling=(1.0, 2.0, 3.0))),
    # The shared expert has a scale, too.
    ("scaling", dict(num_experts=2, scaling=(1.0, 2.0), shared_expert="always")),
    ("alpha", dict(alpha="32")),
    ("alpha", dict(alpha=math.nan)),
    ("scaling", dict(scaling=math.inf)),
    ("share", dict(share="B")),
    ("shared_expert", dict(shared_expert="yes")),
    ("shared_rank", dict(shared_expert="always", shared_rank=0)),
    ("shared_rank", dict(shared_expert="always", shared_rank=-2)),
    ("shared_rank", dict(shared_expert="always", shared_rank=1.5)),
    ("init", dict(init="zeros")),
    ("adapter_dtype", dict(adapter_dtype="int8")),
    ("router", dict(router="nearest")),
    ("router", dict(router=nn.Linear)),
    ("router_hidden", dict(router="mlp", router_hidden=0)),
    ("num_tasks", dict(router="task")),
    ("num_tasks", dict(router="task", num_tasks=0)),
    ("task_embedding_dim", dict(router="task", num_tasks=2, task_embedding_dim=0)),
    ("granularity", dict(granularity="batch")),
    ("granularity", dict(granularity="task")),
    ("granularity", dict(router="task", num_tasks=2, granularity="token")),
    ("score", dict(score="relu")),
    ("temperature", dict(temperature=0.0)),
    ("temperature", dict(temperature=-1.0)),
    ("temperature", dict(temperature=math.nan)),
    ("noise", dict(noise=-0.1)),
    ("noise", dict(noise=math.nan)),
    ("select", dict(select="best")),
    ("top_k", dict(select="topk")),
    ("top_k", dict(top_k=0)),
    ("top_k", dict(top_k=9)),
    ("top_k", dict(top_k=2.0)),
    ("top_k", dict(select="all", top_k=2)),
    ("top_p", dict(select="topp")),
    ("top_p", dict(select="topp", top_p=0.0)),
    ("top_p", dict(select="topp", top_p=1.1)),
    ("top_p", dict(top_p=0.5)),
    # A sum of raw logits may be negative: then no experts reach a share of it.
    ("top_p", dict(select="topp", top_p=0.5, score="identity", normalize="none")),
    ("threshold", dict(select="threshold")),
    ("threshold", dict(threshold=0.1)),
    ("threshold", dict(select="threshold", threshold=math.nan)),
    ("max_threshold", dict(select="learned_threshold", max_threshold=0.0)),
    ("max_threshold", dict(select="learned_threshold", max_threshold=math.inf)),
    ("max_threshold", dict(select="threshold", threshold=0.1, max_threshold=0.5)),
    ("threshold", dict(select="learned_threshold", threshold=0.1)),
    # A threshold is learned from x, which a task does not have. A softmax of differences to a
    # threshold does not depend on the threshold.
    ("select", dict(select="learned_threshold", router="task", num_tasks=2)),
    ("select", dict(select="learned_threshold", router="external")),
    ("normalize", dict(select="learned_threshold", normalize="softmax")),
    ("keep_min", dict(select="topp", top_p=0.5, keep_min=0)),
    ("keep_min", dict(select="topp", top_p=0.5, keep_min=9)),
    ("keep_min", dict(top_k=2, keep_min=2)),
    ("keep_min", dict(select="learned_threshold", keep_min=2)),
    ("entropy_threshold", dict(top_k=2, entropy_threshold=1.0)),
    ("entropy_threshold", dict(top_k=2, entropy_threshold=-0.1)),
    ("entropy_threshold", dict(top_k=2, entropy_threshold=math.nan)),
    ("entropy_threshold", dict(entropy_threshold=0.9)),
    ("entropy_threshold", dict(select="learned_threshold", entropy_threshold=0.9)),
    ("entropy_threshold", dict(num_experts=1, top_k=1, entropy_threshold=0.9)),
    ("entropy_index", dict(top_k=2, entropy_threshold=0.9, entropy_index=0.0)),
    ("entropy_index", dict(entropy_index=1.1)),
    ("aux", dict(num_experts=1, aux="entropy")),
    ("aux", dict(router="external", aux="entropy")),
    ("svd_rho", dict(svd_rho=10.0)),
    ("frozen_experts", dict(frozen_experts=[8])),
    ("frozen_experts", dict(frozen_experts=[-1])),
    ("frozen_experts", dict(frozen_experts=[1, 1])),
    ("frozen_experts", dict(frozen_experts=[0], share="A")),
    ("svd_rho", dict(init="svd_segments", svd_rho=0.0)),
    ("init", dict(init="svd_segments", share="A")),
    # The base is reduced by the mean gate, which is known only if the gates sum to 1.
    ("init", dict(init="svd_segments", router="external")),
    ("init", dict(init="svd_segments", score="sigmoid", normalize="none")),
    ("init", dict(init="svd_segments", top_k=2, normalize="none")),
    ("scaling", dict(init="svd_segments", scaling=0.0)),
    ("scaling", dict(init="svd_segments", alpha=-1.0)),
    ("alpha", dict(scaling="sqrt(3*alpha*I/r)", alpha=-1.0)),
    ("normalize", dict(normalize="max")),
    ("normalize", dict(score="identity", normalize="sum")),
    # A layer uses external gates as they are: a selection would do nothing, without a message.
    ("select", dict(router="external", top_k=2)),
    ("select", dict(router=None, top_k=1)),
    ("dropout", dict(dropout=1.0)),
    ("dropout", dict(dropout=-0.1)),
    ("dropout", dict(dropout=math.nan)),
    ("dropout_mask", dict(dropout_mask="each")),
    ("dropout_mask", dict(share="A", dropout=0.1, dropout_mask="per_expert")),
    ("aux", dict(aux="balance")),
    ("aux", dict(aux={"load_balance": 0.1})),
    ("aux", dict(aux={"z": "much"})),
    ("aux", dict(router="external", aux="z")),
    ("aux", dict(router=None, aux="z")),
    ("impl", dict(impl="fast")),
    # "grouped" needs a selection of experts for each token, and an A for each expert.
    ("impl", dict(impl="grouped")),
    ("impl", dict(impl="grouped", top_k=8)),
    ("impl", dict(impl="grouped", top_k=2, share="A")),
    ("impl", dict(impl="grouped", router=None)),
    ("impl", dict(impl="grouped", router="external", share="A")),
    ("impl", dict(impl="grouped", router="task", num_tasks=2, top_k=2)),
    ("impl", dict(impl="grouped", granularity="sequence", top_k=2)),
    ("impl", dict(impl="grouped", select="topp", top_p=0.5)),
    ("impl", dict(impl="grouped", top_k=2, entropy_threshold=0.9)),
    ("impl", dict(impl="grouped", top_k=2, score="sigmoid")),
]


@pytest.mark.parametrize(
    ("name", "options"), WRONG_OPTIONS, ids=[str(options) for _, options in WRONG_OPTIONS]
)
def test_a_wrong_option_is_named(name, options):
    """An option that is ignored, or fails in the first forward only, costs a training run."""
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        MoeLoraConfig(**options)


def test_the_message_has_the_expected_and_the_actual_value():
    with pytest.raises(ValueError, match=r"^top_k: .* from 1 to num_experts = 8, got 9$"):
        MoeLoraConfig(top_k=9)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="num_expert"):
        MoeLoraConfig(num_expert=4)
    with pytest.raises(ValueError, match="num_expert"):
        MoeLoraConfig.from_dict({"num_expert": 4})


def test_options_follow_from_others():
    """select follows from top_k and granularity from router, so that users need not repeat them."""
    plain = MoeLoraConfig()
    assert (plain.select, plain.granularity) == ("all", "token")
    assert MoeLoraConfig(top_k=2).select == "topk"
    assert MoeLoraConfig(router="task", num_tasks=3).granularity == "task"
    assert MoeLoraConfig(aux="z").aux == (("z", 0.001),)
    assert MoeLoraConfig(top_k=2, aux=("load_balance", "z")).aux == (
        ("load_balance", 0.01),
        ("z", 0.001),
    )
    assert MoeLoraConfig(num_experts=2, rank=[1, 3]).ranks() == (1, 3)
    assert MoeLoraConfig(num_experts=2, rank=3, shared_expert="always").ranks() == (3, 3, 3)
    shared = MoeLoraConfig(num_experts=2, rank=3, shared_expert="complement", shared_rank=1)
    assert shared.ranks() == (3, 3, 1)


def test_scaling_rules():
    """alpha/r divides by the rank of each expert (MING), alpha/R by the sum of ranks (MOELoRA)."""
    ranks = dict(num_experts=2, rank=(2, 8), alpha=16.0)
    assert MoeLoraConfig(**ranks).scales() == (8.0, 2.0)
    assert MoeLoraConfig(**ranks, scaling="alpha/R").scales() == (1.6, 1.6)
    by_root = MoeLoraConfig(**ranks, scaling="alpha/sqrt(r)").scales()
    assert by_root == pytest.approx((16 / 2**0.5, 16 / 8**0.5), rel=1e-15)
    assert MoeLoraConfig(**ranks, scaling=3).scales() == (3.0, 3.0)
    assert MoeLoraConfig(**ranks, scaling=[1, 0.5]).scales() == (1.0, 0.5)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoeLoraConfig().top_k = 3


def test_replace_follows_from_the_new_options():
    """A value that followed from the old options must not contradict the new ones."""
    plain = MoeLoraConfig()
    assert plain.replace(top_k=2) == MoeLoraConfig(top_k=2)
    assert plain.replace(top_k=2).replace(top_k=None) == plain
    assert plain.replace(router="task", num_tasks=4).granularity == "task"
    assert plain.replace(router="task", num_tasks=4).replace(router="mlp").granularity == "token"
    # The limit of a learned threshold is 1/E, with the new E.
    learned = MoeLoraConfig(num_experts=8, select="learned_threshold").replace(num_experts=4)
    assert learned == MoeLoraConfig(num_experts=4, select="learned_threshold")
    assert MoeLoraConfig.preset("adamole", select=None, top_k=2).select == "topk"
    sequence = MoeLoraConfig(granularity="sequence")
    assert sequence.replace(top_k=2).granularity == "sequence"
    layer = MoeLoraLinear(6, 5, config=plain, top_k=3)
    assert (layer.config.select, layer.config.top_k) == ("topk", 3)


CONFIGS = [MoeLoraConfig.preset(name) for name in PRESETS] + [
    MoeLoraConfig(num_experts=2, rank=[1, 3], scaling=[0.5, 1.0], aux=()),
    MoeLoraConfig(select="topp", top_p=0.7, aux={"z": 0.2, "load_balance": 0.1}),
    MoeLoraConfig(select="threshold", threshold=0.1, score="sigmoid", noise=0.3, temperature=2.0),
    MoeLoraConfig(router="external", shared_expert="complement", shared_rank=2),
    MoeLoraConfig(select="learned_threshold", max_threshold=0.3),
    MoeLoraConfig(frozen_experts=[2, 0], shared_expert="always", num_experts=2),
    MoeLoraConfig(top_k=1, entropy_threshold=0.5, entropy_index=2.0, aux="entropy"),
    MoeLoraConfig(init="svd_segments", svd_rho=3.0, select="topp", top_p=0.5, keep_min=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_round_trip_through_json(config):
    """adapter_config.json stores configs: the one that is read is equal, and so is its hash."""
    loaded = MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert loaded == config
    assert hash(loaded) == hash(config)
    assert config.replace() == config
    assert copy.deepcopy(config) == config


def test_a_module_as_router_cannot_be_json():
    with pytest.raises(TypeError, match="router"):
        MoeLoraConfig(router=nn.Linear(4, 8)).to_dict()


def assert_names_an_option(error, value):
    """Assert that an error message begins with the name of an option."""
    assert str(error).split(":")[0] in OPTIONS, (value, error)


VALUES_OF_ALL_TYPES = [
    True, 1.0, 1.5, 0, -1, math.nan, math.inf, "x", [], [1.5], (), {}, {"z": "x"}, [["z", 0.1]],
    torch.tensor([1, 2]), object(), b"a", nn.Linear, {1, 2}, [None], 1j,
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_of_any_type_is_accepted_or_named(name):
    """An accepted config is equal after JSON and has a hash: adapters and groups compare them."""
    others = [{}, dict(top_k=2), dict(select="topp", top_p=0.5), dict(router="task", num_tasks=3)]
    for options in others:
        for value in VALUES_OF_ALL_TYPES:
            try:
                config = MoeLoraConfig(**{"num_experts": 4, **options, name: value})
            except (ValueError, TypeError) as error:
                assert_names_an_option(error, value)
                continue
            loaded = MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
            assert (loaded, hash(loaded)) == (config, hash(config)), value
