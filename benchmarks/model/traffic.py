"""The bytes that a recorded launch moves, counted from its grid, its tiles and its arguments.

Loads and stores count under their masks, summed over all programs. If several programs read the
same bytes, they count for each program, although most of these reads hit L2.
`tests/benchmarks/test_traffic.py` compares the counts with those of Triton's interpreter.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from benchmarks.model import traffic_ffn
from benchmarks.model.sizes import Sizes, Tile, rank_of, tile_map, tiles_of
from moelora_kernels.kernels.common.launcher import Launch, ceil_div


def _tensors(value) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def compulsory(launch: Launch) -> int:
    """Return the bytes of every argument once, without the partial sums between launches."""
    return sum(
        tensor.nbytes
        for name, value in launch.arguments.items()
        if not name.endswith("partials_ptr")
        for tensor in _tensors(value)
    )


def _gate(s: Sizes) -> int:
    """Bytes read of a gate that the caller passes."""
    if s.FORM == "router":
        return 0
    if s.FORM == "sparse":
        return s.T * s.n * s.K * (s.size("gate_weights_ptr") + s.size("gate_experts_ptr"))
    return s.T * s.n * s.E * s.size("gate_weights_ptr") + s.T * s.n * s.size("gate_rows_ptr")


def _experts(s: Sizes) -> int:
    """Bytes read of `expert_columns` and `scaling`, once per token tile and sibling."""
    return ceil_div(s.T, s.BLOCK_T) * s.n * (s.E * s.R * 2 + s.E * 4)


def _routing(s: Sizes) -> int:
    """Bytes that a router writes: logits, weights, experts."""
    if s.FORM != "router":
        return 0
    slots = s.T * s.n * s.K * (4 + s.size("out_experts_ptr"))
    return s.T * s.n * s.E * 4 + slots


def _router_bias(s: Sizes) -> int:
    return ceil_div(s.T, s.BLOCK_T) * s.n * s.E * s.size("bias_ptrs")


def _gated(s: Sizes) -> tuple[int, int]:
    """Bytes read and written to gate h: shared by both kernels of the forward."""
    written = s.T * s.n * (s.A_ROWS + s.R) * s.size("h_ptr") + _routing(s)
    return _gate(s) + _experts(s) + _router_bias(s), written


def _tile_table(s: Sizes, rows: int) -> int:
    return s.programs * rows * 4 * 4 if s.PER_EXPERT else 0


def _shrink_gate(s: Sizes) -> tuple[int, int]:
    token_tiles = ceil_div(s.T, s.BLOCK_T)
    read = s.T * s.I * s.COLUMN_TILES * s.size("x_ptr")
    read += token_tiles * s.n * s.A_ROWS * s.I * s.size("a_ptrs")
    read += token_tiles * s.n * s.ROUTER_E * s.I * s.size("router_ptrs")
    read += s.programs * s.size("seed_ptr") + _tile_table(s, 1)
    if s.ONE_LAUNCH:
        gate_read, written = _gated(s)
        return read + gate_read, written
    return read, s.splits * s.T * s.n * (s.A_ROWS + s.ROUTER_E) * 4


def _gate_partials(s: Sizes) -> tuple[int, int]:
    read, written = _gated(s)
    return read + s.splits * s.T * s.n * (s.R + s.ROUTER_E) * 4, written


def _gated_backward(s: Sizes) -> tuple[int, int]:
    """Bytes read and written to gate du: shared by both kernels of the backward."""
    read = _gate(s) + _experts(s) + s.T * s.n * s.R * s.size("h_ptr")
    logits_bytes = s.T * s.n * s.E * 4
    if s.ROUTER:
        read += logits_bytes * ((s.logits_ptr is not None) + (s.dlogits_ptr is not None))
    elif s.FORM == "sparse":
        read += s.T * s.n * s.K * s.size("gate_experts_ptr")
    written = s.T * s.n * (s.R + s.A_ROWS) * s.size("h_ptr") + s.dgate_ptr.nbytes
    return read, written


def _shrink_gate_backward(s: Sizes) -> tuple[int, int]:
    outputs = sum(s.out_features)
    read = s.T * outputs * (s.COLUMN_TILES // s.n) * s.size("dy_ptrs")
    read += ceil_div(s.T, s.BLOCK_T) * outputs * s.B_COLUMNS * s.size("b_ptrs")
    if s.ONE_LAUNCH:
        gate_read, written = _gated_backward(s)
        return read + gate_read, written
    return read, s.splits * s.T * s.n * s.R * 4


def _gate_partials_backward(s: Sizes) -> tuple[int, int]:
    read, written = _gated_backward(s)
    partials = s.splits * s.T * s.n * s.R * 4
    if s.A_ROWS < s.R:
        # Once more for dh, which sums over the experts.
        read += partials + ceil_div(s.T, s.BLOCK_T) * s.n * s.E * s.R * 2
    return read + partials, written


def _shrink_dx(s: Sizes) -> tuple[int, int]:
    i_tiles, token_tiles = ceil_div(s.I, s.BLOCK_I), ceil_div(s.T, s.BLOCK_T)
    read = s.T * s.n * s.A_ROWS * s.size("dh_ptr") * i_tiles
    read += token_tiles * s.n * s.A_ROWS * s.I * s.size("a_ptrs")
    read += s.programs * s.size("seed_ptr") + _tile_table(s, s.num_column_tiles)
    if s.router_ptrs is not None:
        read += s.T * s.n * s.E * 4 * i_tiles
        read += token_tiles * s.n * s.E * s.I * s.size("router_ptrs")
    return read, s.dx_ptr.nbytes


def _resident_dx(s: Sizes) -> tuple[int, int]:
    i_tiles = ceil_div(s.I, s.BLOCK_I)
    ranges = s.programs // i_tiles
    read = s.T * s.n * s.A_ROWS * s.size("dh_ptr") * i_tiles
    read += ranges * s.n * s.A_ROWS * s.I * s.size("a_ptrs")
    if s.router_ptrs is not None:
        read += s.T * s.n * s.E * 4 * i_tiles
        read += ranges * s.n * s.E * s.I * s.size("router_ptrs")
    return read, s.dx_ptr.nbytes


def weight_grad_split(s: Sizes) -> int:
    """Return into how many parts T is split: programs over tiles of the wide sides."""
    output_tiles = sum(ceil_div(width, s.BLOCK_W) for width in s.out_features) * s.B_TILES
    return s.programs // (ceil_div(s.I, s.BLOCK_W) * s.A_TILES + output_tiles)


def _weight_grad(s: Sizes) -> tuple[int, int]:
    i_tiles, split = ceil_div(s.I, s.BLOCK_W), weight_grad_split(s)
    read = s.T * s.I * s.size("x_ptr") * s.A_TILES
    read += s.T * i_tiles * (s.H * s.size("dh_ptr") + s.L * s.size("dlogits_ptr"))
    x_programs = i_tiles * s.A_TILES * split
    read += x_programs * (s.size("seed_ptr") + (3 * 4 if s.PER_EXPERT else 0))
    for width in s.out_features:
        read += s.T * width * s.B_TILES * s.size("dy_ptrs")
        read += s.T * ceil_div(width, s.BLOCK_W) * s.R * s.size("u_ptr")
    written = s.H * s.I * s.size("da_ptr") + s.L * s.I * s.size("drouter_ptr")
    written += s.L * s.size("dbias_ptr") + sum(s.out_features) * s.R * s.size("db_ptrs")
    return read, split * written


def _reduce_partials(s: Sizes) -> tuple[int, int]:
    written = sum(size * out.dtype.itemsize for size, out in zip(s.sizes, s.out_ptrs, strict=True))
    return s.splits * sum(s.sizes) * 4, written


def _gate_rows(s: Sizes) -> tuple[int, int]:
    width_tiles, g_tiles = ceil_div(s.WIDTH, s.BLOCK_E), ceil_div(s.G, s.BLOCK_G)
    read = s.T * s.WIDTH * 4 * g_tiles + s.T * s.size("rows_ptr") * width_tiles * g_tiles
    return read, s.splits * s.G * s.WIDTH * 4


def _topk_gate_backward(s: Sizes) -> tuple[int, int]:
    read = s.G * s.K * (s.size("weights_ptr") + s.size("dweights_ptr") + 2 * s.size("experts_ptr"))
    return read + s.G * s.E * s.size("logits_ptr"), s.G * s.E * 4


def _router_logits(s: Sizes) -> tuple[int, int]:
    token_tiles, e_tiles = ceil_div(s.T, s.BLOCK_T), ceil_div(s.E, s.BLOCK_E)
    read = s.T * s.I * s.n * e_tiles * s.size("x_ptr")
    read += token_tiles * s.n * s.E * (s.I * s.size("router_ptrs") + s.size("bias_ptrs"))
    return read, s.splits * s.T * s.n * s.E * 4


def _router_grad(s: Sizes) -> tuple[int, int]:
    l_tiles, i_tiles = ceil_div(s.L, s.BLOCK_L), ceil_div(s.I, s.BLOCK_W)
    split = s.programs // (l_tiles * i_tiles)
    read = s.T * s.I * s.size("x_ptr") * l_tiles + s.T * s.L * 4 * i_tiles
    written = s.L * s.I * s.size("drouter_ptr") + s.L * s.size("dbias_ptr")
    return read, split * written


def _grouped_shrink(s: Sizes) -> tuple[int, int]:
    routed = [tile for tile in tiles_of(s, s.tiles_ptr) if tile.expert < s.n * s.E]
    pairs = sum(tile.positions for tile in routed)
    read = tile_map(s, s.tiles_ptr) + s.programs * (4 + 2 * s.size("ranks_ptr"))
    read += s.COLUMN_TILES * (s.P * 4 + pairs * (s.I * s.size("x_ptr") + s.size("weights_ptr")))
    read += s.COLUMN_TILES * len(routed) * s.size("seed_ptr")
    read += sum(rank_of(s, tile.expert) for tile in routed) * s.I * s.size("a_ptrs")
    return read, 2 * s.P * s.MAX_RANK * s.size("h_ptr")


def _grouped_shrink_backward(s: Sizes) -> tuple[int, int]:
    read = tile_map(s, s.tiles_ptr) + s.P * (4 + s.MAX_RANK * s.size("h_ptr"))
    read += s.programs * (4 + 2 * s.size("ranks_ptr") + (4 if s.weights_ptr is not None else 0))
    for tile in tiles_of(s, s.tiles_ptr):
        if tile.expert < s.n * s.E:
            O = s.out_features[tile.expert // s.E]  # noqa: E741
            read += tile.positions * O * s.size("dy_ptrs") * ceil_div(s.MAX_RANK, s.BLOCK_R)
            read += O * rank_of(s, tile.expert) * s.size("b_ptrs")
            read += tile.positions * s.size("weights_ptr")
    written = 2 * s.P * s.MAX_RANK * s.size("h_ptr") + s.P * s.size("dweights_ptr")
    return read, written


def _grouped_expand(s: Sizes) -> tuple[int, int]:
    o_tiles, walks, order = ceil_div(s.O, s.BLOCK_O), ceil_div(s.O, s.walk), s.order_ptr.tolist()
    read, rows = tile_map(s, s.tiles_ptr), 0
    for tile in tiles_of(s, s.tiles_ptr):
        slots = [pair % s.S for pair in order[tile.first : tile.end]]
        pairs = tile.positions if s.PER_PAIR else slots.count(s.slot)
        read += 0 if s.PER_PAIR else 8 * walks
        skipped = not s.PER_PAIR and not slots[0] <= s.slot <= slots[-1]
        if skipped or (s.IN_PLACE and tile.expert >= s.N):
            continue
        rows += pairs
        read += (tile.positions * 4 + 2 * s.size("ranks_ptr") + s.size("seed_ptr")) * walks
        if tile.expert < s.N:
            # A program keeps the first columns of u.
            rank = rank_of(s, tile.expert)
            kept = min(rank, s.BLOCK_R)
            read += pairs * (kept * walks + (rank - kept) * o_tiles) * s.size("u_ptr")
            read += rank * s.O * s.size("matrix_ptr")
        # The dlogits of all experts, or of the tile's expert alone.
        logits = int(tile.expert < s.N) if s.SPARSE_DLOGITS else s.L
        read += logits * (pairs * walks * s.size("dlogits_ptr") + s.O * s.size("router_ptr"))
    return read + rows * s.O * s.size("start_ptr"), rows * s.O * s.size("y_ptr")


def _partial_sums(s: Sizes) -> list[Tile]:
    """Return the range of every partial sum: whole chunks, the last merged with a short rest."""
    partials: list[Tile] = []
    sizes: dict[int, int] = {}
    for tile in tiles_of(s, s.chunks_ptr):
        if tile.expert >= s.n * s.E:
            continue
        size = sizes.setdefault(tile.expert, tile.positions)
        if tile.positions < size:
            previous = partials.pop()
            tile = Tile(tile.expert, previous.first, tile.end, tile.end - previous.first)
        partials.append(tile)
    return partials


def _chunk_ranges(s: Sizes) -> int:
    """Bytes of `load_chunk_range` of all programs."""
    routed = [tile for tile in tiles_of(s, s.chunks_ptr) if tile.expert < s.n * s.E]
    later = len(routed) - len({tile.expert for tile in routed})
    return s.TILES * (8 * len(routed) + 4 * later)


def _grouped_weight_grad(s: Sizes) -> tuple[int, int]:
    partials = _partial_sums(s)
    partials_of_expert = Counter(partial.expert for partial in partials)
    read = tile_map(s, s.chunks_ptr) + _chunk_ranges(s) + s.TILES * 4 * (len(s.chunks_ptr) - 1)
    written = 0
    sides = (
        (s.in_features, "x_ptrs", "dh_ptr", "da_ptrs", s.size("seed_ptr")),
        (s.out_features, "dy_ptrs", "u_ptr", "db_ptrs", 0),
    )
    for expert in range(s.n * s.E):
        if expert not in partials_of_expert:
            read += s.TILES * 2 * s.size("ranks_ptr")
            for widths, *_, out, _ in sides:
                written += rank_of(s, expert) * widths[expert // s.E] * s.size(out)
    for partial in partials:
        is_whole, rank = partials_of_expert[partial.expert] == 1, rank_of(s, partial.expert)
        for widths, wide, narrow, out, seed in sides:
            W = widths[partial.expert // s.E]
            w_tiles = ceil_div(W, s.BLOCK_W)
            programs = w_tiles * s.COLUMN_TILES
            read += programs * (4 + 2 * s.size("ranks_ptr") + seed + 4 * partial.positions)
            read += partial.positions * W * s.COLUMN_TILES * s.size(wide)
            read += partial.positions * rank * w_tiles * s.size(narrow)
            written += rank * W * (s.size(out) if is_whole else 4)
    return read, written


def _reduce_chunks(s: Sizes) -> tuple[int, int]:
    partials_of_expert = Counter(partial.expert for partial in _partial_sums(s))
    routed = [tile for tile in tiles_of(s, s.chunks_ptr) if tile.expert < s.n * s.E]
    read = tile_map(s, s.chunks_ptr) + _chunk_ranges(s) + s.TILES * 4 * len(routed)
    written = 0
    for expert, count in partials_of_expert.items():
        if count > 1:
            read += s.TILES * 2 * s.size("ranks_ptr")
            for widths, out in ((s.in_features, "da_ptrs"), (s.out_features, "db_ptrs")):
                elements = rank_of(s, expert) * widths[expert // s.E]
                read += elements * 4 * count
                written += elements * s.size(out)
    return read, written


KERNELS = {
    "shrink_gate_kernel": _shrink_gate,
    "gate_partials_kernel": _gate_partials,
    "shrink_gate_backward_kernel": _shrink_gate_backward,
    "gate_partials_backward_kernel": _gate_partials_backward,
    "shrink_dx_kernel": _shrink_dx,
    "resident_dx_kernel": _resident_dx,
    "weight_grad_kernel": _weight_grad,
    "reduce_partials_kernel": _reduce_partials,
    "gate_rows_kernel": _gate_rows,
    "topk_gate_kernel": lambda s: (s.G * s.E * s.size("logits_ptr"), s.G * s.K * 8),
    "topk_gate_backward_kernel": _topk_gate_backward,
    "router_logits_kernel": _router_logits,
    "router_grad_kernel": _router_grad,
    "grouped_shrink_kernel": _grouped_shrink,
    "grouped_shrink_backward_kernel": _grouped_shrink_backward,
    "grouped_expand_kernel": _grouped_expand,
    "grouped_weight_grad_kernel": _grouped_weight_grad,
    "reduce_chunks_kernel": _reduce_chunks,
    "pair_table_kernel": traffic_ffn.pair_table,
    "ffn_inner_kernel": traffic_ffn.ffn_inner,
    "ffn_inner_rank_kernel": traffic_ffn.ffn_inner_rank,
    "ffn_inner_backward_kernel": traffic_ffn.ffn_inner_backward,
    "ffn_inner_weight_grad_kernel": traffic_ffn.ffn_inner_weight_grad,
}


def moved(launch: Launch) -> tuple[int, int]:
    """Return the bytes read and the bytes written by all programs of a launch."""
    return KERNELS[launch.kernel.fn.__name__](Sizes(launch))
