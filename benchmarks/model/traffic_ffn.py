"""The bytes that the launches of `ffn_inner` and its backward move; see `traffic.py`."""

from __future__ import annotations

from benchmarks.model.sizes import Sizes, rank_of, tile_map, tiles_of
from moelora_kernels.kernels.common.launcher import ceil_div


def _routed(s: Sizes) -> tuple[int, int]:
    """Return the number of routed pairs, and the sum of their ranks.

    The table of pairs has no data on the meta device: all pairs are routed then, and every expert
    has as many as the others.
    """
    pairs = s.T * s.K
    if s.table_ptr.is_meta:
        return pairs, pairs * s.R // s.E
    experts = [expert for _, expert in s.table_ptr.tolist() if expert < s.E]
    return len(experts), sum(rank_of(s, expert) for expert in experts)


def _pair_rows(s: Sizes, token_tiles: int, narrow: int, times: int) -> int:
    """Bytes read of the pairs of all tokens, `times` times, and of `narrow` rank spaces."""
    routed, ranks = _routed(s)
    read = times * (s.T * s.K * 8 + token_tiles * s.BLOCK_P * 2 * s.size("ranks_ptr"))
    return read + routed * s.size("weights_ptr") + narrow * ranks * s.size("u_gate_ptr")


def _matrices(s: Sizes) -> int:
    """Bytes read of both B and of A."""
    b = 2 * s.F * s.B_COLUMNS * s.size("gate_b_ptr")
    return b + s.R * s.F * s.size("down_a_ptr")


def _token_tiles(s: Sizes) -> int:
    return ceil_div(s.T, s.BLOCK_P // s.SLOTS)


def pair_table(s: Sizes) -> tuple[int, int]:
    return tile_map(s, s.tiles_ptr) + s.P * 4, s.P * 8


def ffn_inner(s: Sizes) -> tuple[int, int]:
    token_tiles = _token_tiles(s)
    splits = s.programs // token_tiles
    read = splits * _pair_rows(s, token_tiles, 2, 2) + token_tiles * _matrices(s)
    read += 2 * s.T * s.K * s.F * s.size("gate_out_ptr") + s.programs * s.size("seed_ptr")
    return read, s.T * s.F * s.size("summed_ptr") + splits * _routed(s)[1] * 4


def ffn_inner_rank(s: Sizes) -> tuple[int, int]:
    routed = [tile for tile in tiles_of(s, s.tiles_ptr) if tile.expert < s.E]
    read = tile_map(s, s.tiles_ptr) + s.P * 4 + s.programs * (4 + 2 * s.size("ranks_ptr"))
    for tile in routed:
        read += tile.positions * (s.splits * rank_of(s, tile.expert) * 4 + s.size("weights_ptr"))
    return read, 2 * s.P * s.MAX_RANK * s.size("h_ptr")


def ffn_inner_backward(s: Sizes) -> tuple[int, int]:
    token_tiles, pairs = _token_tiles(s), s.T * s.K
    splits = s.programs // token_tiles
    read = splits * _pair_rows(s, token_tiles, 3, 2) + token_tiles * _matrices(s)
    read += 3 * pairs * s.F * s.size("gate_out_ptr")
    read += s.programs * (s.size("seed_ptr") + s.BLOCK_P * 4)
    # The weights of the pairs are read in every step.
    steps = ceil_div(s.F, s.BLOCK_F) - splits
    read += steps * _routed(s)[0] * s.size("weights_ptr")
    written = 2 * s.T * s.F * s.size("dgate_out_ptr")
    return read, written + splits * pairs * (2 * s.MAX_RANK * s.size("dh_gate_ptr") + 4)


def ffn_inner_weight_grad(s: Sizes) -> tuple[int, int]:
    f_tiles = ceil_div(s.F, s.BLOCK_F)
    splits = s.programs // f_tiles
    read = f_tiles * _pair_rows(s, _token_tiles(s), 3, 1) + splits * _matrices(s)
    read += 3 * s.T * s.K * s.F * s.size("gate_out_ptr") + s.programs * s.size("seed_ptr")
    written = 2 * s.size("dgate_b_ptr") + s.size("ddown_a_ptr")
    return read, splits * s.R * s.WIDTH * written
