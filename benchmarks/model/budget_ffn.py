"""The launches of whole-FFN experts that are not Triton's, modelled as in `budget.py`.

The frozen network is two products, one pass over [T, F] that computes act(gate_out) * up_out, and a
product. The package calls the same three products and sums up the gradients of x in ATen.

The rival is `SharedDownLoop` of `baselines/ffn.py`: a loop over the experts that runs the frozen
products once. Its time without products is that of its passes over the rows of all pairs.
"""

from __future__ import annotations

from benchmarks.model.budget import Modelled, pointwise, product, route
from benchmarks.model.gpus import Gpu
from benchmarks.model.launches import Layer

# Passes over [P, F] of the rival and its launches for an expert, beside its products: rows of
# gate_out and up_out (4 passes), sums with the experts' parts (6), the activation (5), the weights
# (2), the sum over the experts (3). Backward: the rows of dsummed (2), weights and their gradient
# (6), the sum with the gradient of down (3), the activation (9), the sums over the experts (6).
PASSES = {"forward": 20, "backward": 26}
LAUNCHES = {"forward": 14, "backward": 18}
# Launches of ATen on [T, K]: which pairs are routed, and the gradients of the weights.
SMALL = {"forward": 4, "backward": 3}


def _sizes(layer: Layer) -> tuple[int, int, int]:
    return layer.tokens, layer.in_features, layer.out_features[0]


def base_products(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the products of the frozen linears."""
    T, I, F = _sizes(layer)  # noqa: E741
    return [
        product(gpu, "x Wgt", "forward", (T, I, F)),
        product(gpu, "x Wut", "forward", (T, I, F)),
        product(gpu, "summed Wdt", "forward", (T, F, I)),
        product(gpu, "dy Wd", "backward", (T, I, F)),
        product(gpu, "dgate_out Wg", "backward", (T, F, I)),
        product(gpu, "dup_out Wu", "backward", (T, F, I)),
    ]


def frozen(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the launches of the frozen network, with its activation in one launch."""
    T, I, F = _sizes(layer)  # noqa: E741
    return [
        *base_products(layer, gpu),
        pointwise(gpu, "act(gate_out) up_out", "forward", 2.0 * 3 * T * F, 1),
        pointwise(gpu, "dgate_out, dup_out", "backward", 2.0 * 5 * T * F, 1),
        pointwise(gpu, "sum of dx", "backward", 2.0 * 3 * T * I, 1),
    ]


def other_launches(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the launches of a layer of the package that are not Triton's: `route`, and ATen's."""
    T, I, _ = _sizes(layer)  # noqa: E741
    pairs = 4.0 * T * layer.top_k
    return [
        route(layer._replace(out_features=layer.out_features[:1]), gpu),
        *base_products(layer, gpu),
        pointwise(gpu, "routed weights", "forward", SMALL["forward"] * 2 * pairs, SMALL["forward"]),
        pointwise(gpu, "y + delta", "forward", 2.0 * 3 * T * I, 1),
        pointwise(gpu, "dweights", "backward", SMALL["backward"] * 2 * pairs, SMALL["backward"]),
        product(gpu, "dlogits Wr", "backward", (T, len(layer.ranks), I)),
        # Of gate, up, the experts and the router.
        pointwise(gpu, "sum of dx", "backward", 2.0 * 9 * T * I, 3),
    ]


def compiled_rival(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the launches of the loop over the experts, in which every expert has as many rows."""
    T, I, F = _sizes(layer)  # noqa: E741
    E, P = len(layer.ranks), T * layer.top_k
    rows = [
        *base_products(layer, gpu),
        product(gpu, "x Wrt", "forward", (T, I, E)),
        pointwise(gpu, "top-k, softmax", "forward", 12.0 * T * E, 3),
        pointwise(gpu, "softmax backward", "backward", 12.0 * T * E, 2),
        product(gpu, "dlogitst x", "backward", (E, T, I)),
        product(gpu, "dlogits Wr", "backward", (T, E, I)),
        pointwise(gpu, "sums of dx and of y", "forward", 2.0 * 3 * P * I, 2 * E),
        pointwise(gpu, "sums of dx and of y", "backward", 2.0 * 6 * P * I, 3 * E),
    ]
    for direction, passes in PASSES.items():
        moved = 2.0 * passes * P * F
        rows.append(pointwise(gpu, "rows of pairs", direction, moved, LAUNCHES[direction] * E))
    for rank in layer.ranks:
        n = P // E
        for wide, narrow, out in ((I, rank, F), (I, rank, F), (F, rank, I)):
            rows += [
                product(gpu, "x At", "forward", (n, wide, narrow)),
                product(gpu, "h Bt", "forward", (n, narrow, out)),
                product(gpu, "dy B", "backward", (n, out, narrow)),
                product(gpu, "dyt h", "backward", (out, n, narrow)),
                product(gpu, "dht x", "backward", (narrow, n, wide)),
                product(gpu, "dh A", "backward", (n, narrow, wide)),
            ]
    return rows
