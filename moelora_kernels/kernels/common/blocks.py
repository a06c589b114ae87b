"""How many programs of a kernel one multiprocessor runs at the same time, from compiled kernels."""

from __future__ import annotations

# Architecture -> (kernel, bytes of an element of x) -> `TileConfig.blocks` of the tiles of 16, 32,
# 64 and 128 columns. From the machine code of Triton 3.9 for a router, without dropout. Another
# form of a layer, or another version, may differ by one: then a split balances its programs less
# well.
BLOCKS: dict[str, dict[tuple[str, int], tuple[tuple[int, int], ...]]] = {
    "sm_80": {
        ("shrink_gate", 2): ((3, 3), (5, 5), (1, 2), (1, 2)),
        ("shrink_gate", 4): ((4, 4), (4, 4), (1, 1), (1, 1)),
        ("shrink_gate_backward", 2): ((4, 4), (3, 3), (1, 2), (1, 4)),
        ("shrink_gate_backward", 4): ((4, 4), (4, 4), (1, 1), (1, 2)),
        ("weight_grad", 2): ((2, 2), (1, 1), (1, 1), (1, 1)),
        ("weight_grad", 4): ((3, 3), (3, 3), (1, 1), (1, 1)),
        ("router_logits", 2): ((4, 4), (3, 3), (4, 4)),
        ("router_logits", 4): ((5, 5), (4, 4), (1, 1)),
        ("router_grad", 2): ((3, 3), (1, 1), (1, 1)),
        ("router_grad", 4): ((4, 4), (4, 4), (1, 1)),
    },
    "sm_89": {
        ("shrink_gate", 2): ((2, 2), (3, 3), (1, 2), (2, 2)),
        ("shrink_gate", 4): ((4, 4), (3, 3), (1, 1), (1, 1)),
        ("shrink_gate_backward", 2): ((2, 2), (2, 2), (1, 3), (1, 2)),
        ("shrink_gate_backward", 4): ((4, 4), (3, 3), (1, 1), (1, 1)),
        ("weight_grad", 2): ((2, 2), (1, 1), (1, 1), (1, 1)),
        ("weight_grad", 4): ((3, 3), (3, 3), (1, 1), (1, 1)),
        ("router_logits", 2): ((2, 2), (2, 2), (3, 3)),
        ("router_logits", 4): ((4, 4), (4, 4), (1, 1)),
        ("router_grad", 2): ((2, 2), (1, 1), (1, 1)),
        ("router_grad", 4): ((4, 4), (3, 3), (1, 1)),
    },
    "sm_90": {
        ("shrink_gate", 2): ((3, 3), (2, 2), (2, 2), (1, 2)),
        ("shrink_gate", 4): ((4, 4), (4, 4), (1, 1), (1, 1)),
        ("shrink_gate_backward", 2): ((3, 3), (3, 3), (1, 3), (1, 2)),
        ("shrink_gate_backward", 4): ((5, 5), (4, 4), (1, 1), (1, 1)),
        ("weight_grad", 2): ((3, 3), (3, 3), (2, 2), (1, 1)),
        ("weight_grad", 4): ((4, 4), (3, 3), (1, 1), (1, 1)),
        # The entry of few rows has 128 columns.
        ("weight_grad_few", 2): ((3, 3), (3, 3), (2, 2), (2, 1)),
        ("router_logits", 2): ((3, 3), (3, 3), (4, 4)),
        ("router_logits", 4): ((6, 6), (4, 4), (2, 2)),
        ("router_grad", 2): ((3, 3), (3, 3), (1, 1)),
        ("router_grad", 4): ((5, 5), (4, 4), (1, 1)),
    },
    "sm_100": {
        ("shrink_gate", 2): ((3, 3), (2, 2), (2, 2), (2, 2)),
        ("shrink_gate", 4): ((5, 6), (4, 5), (3, 3), (1, 1)),
        ("shrink_gate_backward", 2): ((3, 3), (3, 3), (2, 2), (2, 3)),
        ("shrink_gate_backward", 4): ((6, 7), (4, 5), (2, 4), (1, 1)),
        ("weight_grad", 2): ((2, 2), (2, 2), (2, 2), (2, 2)),
        ("weight_grad", 4): ((5, 5), (4, 4), (2, 2), (2, 2)),
        ("router_logits", 2): ((3, 3), (3, 3), (4, 4)),
        ("router_logits", 4): ((7, 7), (4, 4), (4, 4)),
        ("router_grad", 2): ((3, 3), (2, 2), (2, 2)),
        ("router_grad", 4): ((5, 5), (5, 5), (3, 3)),
    },
}
# Not compiled for sm_120: those of sm_89, some of whose tiles differ.
BLOCKS["sm_120"] = BLOCKS["sm_89"]
