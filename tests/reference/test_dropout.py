"""The dropout mask: the published generator, uniform and independent numbers, unbiased scale."""

from __future__ import annotations

import itertools

import pytest
import torch

from moelora_kernels import reference
from moelora_kernels.numerics import dropout_threshold, keep_probability
from support.philox import UINT32, mask_number, philox

# counter, key -> the words that Random123 publishes for Philox-4x32 with 7 rounds.
KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((UINT32,) * 4, (UINT32,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
)
TOKENS, WIDTH = 512, 4096
COUNT = TOKENS * WIDTH


def numbers(seed: int = 7, stream: int = 0) -> torch.Tensor:
    """Return the numbers of one mask, [TOKENS, WIDTH] float64."""
    return reference.mask_numbers(TOKENS, WIDTH, torch.tensor([seed]), stream).double()


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the correlation of two tensors of numbers."""
    return torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1].item()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_published_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize("width", (1, 7, 8, 13, 24))
def test_every_number_is_the_published_one(width):
    """For widths that are a multiple of the eight lanes of a counter, and others."""
    for seed, stream in ((0, 0), (-1, 3), (2**62 + 12345, 2**32 - 1), (-(2**63), 1)):
        result = reference.mask_numbers(5, width, torch.tensor([seed]), stream)
        expected = [
            [mask_number(seed, stream, t, i, width) for i in range(width)] for t in range(5)
        ]
        assert result.tolist() == expected


def test_numbers_of_16_bits_are_uniform():
    """Chi-squared over all 2^16 values, and over the two bytes of every lane."""
    lanes = numbers().long().view(-1, 8)
    for values, bins in (
        (lanes, 2**16),
        *((lanes[:, lane] >> 8, 2**8) for lane in range(8)),
        *((lanes[:, lane] & 0xFF, 2**8) for lane in range(8)),
    ):
        expected = values.numel() / bins
        counts = values.flatten().bincount(minlength=bins)
        assert len(counts) == bins
        squared = ((counts - expected) ** 2 / expected).sum().item()
        # Its mean is bins - 1, its variance 2 (bins - 1).
        assert abs(squared - (bins - 1)) < 5 * (2 * (bins - 1)) ** 0.5


def test_neighbours_are_not_correlated():
    """Lanes of one counter, of the next counters, and the same column of the next tokens."""
    lanes = numbers().view(-1, 8)
    for i, j in itertools.combinations(range(8), 2):
        assert abs(correlation(lanes[:, i], lanes[:, j])) < 5 / len(lanes) ** 0.5
    flat = lanes.flatten()
    for lag in (*range(1, 17), WIDTH, 2 * WIDTH):
        assert abs(correlation(flat[lag:], flat[:-lag])) < 5 / (COUNT - lag) ** 0.5


def test_streams_and_seeds_are_not_correlated():
    """Numbers and masks of neighbouring streams and seeds, and of seeds with another high word."""
    masks = [
        numbers(seed, stream)
        for seed, stream in ((1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (1 + (1 << 32), 0), (-1, 0))
    ]
    for left, right in itertools.combinations(masks, 2):
        assert abs(correlation(left, right)) < 5 / COUNT**0.5
        for p in (0.05, 0.5):
            kept = [(mask >= dropout_threshold(p)).double() for mask in (left, right)]
            assert abs(correlation(*kept)) < 5 / COUNT**0.5


def test_threshold_of_p():
    """p 2^16, rounded half to even; a p above 0 drops some elements, a p below 1 keeps some."""
    expected = {
        0.0: 0, 1e-30: 1, 2**-18: 1, 2**-16: 1, 2.5 / 2**16: 2, 3.5 / 2**16: 4, 0.1: 6554,
        0.5: 2**15, 1 - 2**-16: 2**16 - 1, 1 - 2**-20: 2**16 - 1,
    }  # fmt: skip
    for p, threshold in expected.items():
        assert dropout_threshold(p) == threshold
        assert keep_probability(p) == 1 - threshold / 2**16


@pytest.mark.parametrize("p", (1e-9, 2**-16, 0.05, 0.1, 0.5, 0.9, 1 - 2**-20))
def test_the_share_that_is_kept_and_the_mean(p):
    """The scale is that of the p that the mask applies, so the mean of dropout(1) is 1."""
    x = torch.ones(TOKENS, WIDTH, dtype=torch.float64)
    dropped = reference.dropout(x, p, torch.tensor([7]))
    keep = keep_probability(p)
    # Five standard deviations of a mean of COUNT Bernoulli draws.
    deviation = (keep * (1 - keep) / COUNT) ** 0.5
    assert abs((dropped != 0).double().mean() - keep) < 5 * deviation
    assert abs(dropped.mean() - 1) < 5 * deviation / keep
    assert dropped.unique().tolist() == [0, 1 / keep]
