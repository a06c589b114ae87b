"""The random numbers of dropout masks, by the published algorithm in integers of any size.

Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11.
"""

from __future__ import annotations

ROUNDS = 7
UINT32 = 2**32 - 1


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Return the four words of Philox-4x32-7 at a counter of four words."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(ROUNDS):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = right >> 32 ^ b ^ key_0, right & UINT32
        c, d = left >> 32 ^ d ^ key_1, left & UINT32
        key_0, key_1 = key_0 + 0x9E3779B9 & UINT32, key_1 + 0xBB67AE85 & UINT32
    return a, b, c, d


def mask_number(seed: int, stream: int, t: int, i: int, width: int) -> int:
    """Return the number of element (t, i) of a mask [*, width]: `reference.mask_numbers`."""
    counter = t * -(-width // 8) + i // 8
    key = seed & UINT32, seed >> 32 & UINT32
    words = philox((counter & UINT32, counter >> 32, stream, 0), key)
    return words[i % 8 // 2] >> 16 * (i % 2) & 0xFFFF
