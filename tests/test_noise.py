"""Philox against its published vectors and a plain-integer copy; bits independent of the batch."""

import hashlib
import math

import pytest
import torch
from fastscore_kernels import normals
from fastscore_kernels.noise import philox

from fastscore.noise import NoiseSource, seed_tensor

SHAPE = (1, 80, 64)


def philox_plain(counter, key):
    """Philox 4x32-10 on Python integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (b >> 32) ^ c[1] ^ k[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ c[3] ^ k[1],
            a & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words(counter, key):
    c = torch.tensor(counter)
    even, odd = philox(c[0::2], c[1::2], torch.tensor(key))
    return [int(even[0]), int(odd[0]), int(even[1]), int(odd[1])]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # the known-answer vectors published with Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert words(counter, key) == expected
    assert philox_plain(counter, key) == expected


def test_normals_are_box_muller_of_the_documented_counters():
    seed, sample, step, draw = 2**63 - 25, 7, 3, 2
    source = NoiseSource([5, seed], [0, sample])
    z = source(step, (2, 6, 67), draw)[1].flatten()
    for block in (0, 1, 57, 100):
        w = philox_plain([block, step, sample, draw], [seed & 0xFFFFFFFF, seed >> 32])
        expected = []
        for radius, angle in ((w[0], w[1]), (w[2], w[3])):
            length = math.sqrt(-2 * math.log((radius + 0.5) / 2**32))
            turn = 2 * math.pi * (angle + 0.5 - 2**31) / 2**32
            expected += [length * math.cos(turn), length * math.sin(turn)]
        expected = expected[: z.numel() - 4 * block]
        torch.testing.assert_close(
            z[4 * block : 4 * block + 4].double(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=2**-24 + 1e-10,
            atol=1e-14,
        )


def test_bits_are_the_same_on_every_machine():
    z = NoiseSource([0, 1, 2**62 + 3], [0, 5, 0]).block((0, 1, 59), (3, *SHAPE))
    # little-endian bytes; additions, products, quotients and roots are exact in IEEE 754
    assert (
        hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest()
        == "6e90c2a51c1748ed19d348f39410e00ec5cd5b2789624050f36231bebda218a0"
    )


@pytest.mark.parametrize("size", [1, 3, 67, 4801, 5120, 5123])
def test_bits_do_not_depend_on_batch_slot_or_neighbours(size):
    seeds = [11, 4, 2**40 + 1, 11, 9, 0, 77]
    alone = {seed: NoiseSource([seed])(5, (1, size))[0] for seed in seeds}
    for batch in (seeds, seeds[::-1], seeds * 5, seeds[2:5]):
        z = NoiseSource(batch)(5, (len(batch), size))
        for slot, seed in enumerate(batch):
            assert torch.equal(z[slot], alone[seed]), (len(batch), slot)


def test_bits_do_not_depend_on_order_tiling_or_threads():
    shape = (2, *SHAPE)
    source, again = NoiseSource([3, 8]), NoiseSource([3, 8])
    forward = [source(step, shape) for step in range(12)]
    for step in (11, 0, 7, 8, 3):
        assert torch.equal(again(step, shape), forward[step])
    assert torch.equal(again.block(range(12), shape), torch.stack(forward))
    plain = normals(torch.tensor([3, 8]), torch.tensor([0, 0]), torch.tensor([10]), 5120)
    assert torch.equal(plain[0].view(shape), forward[10])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        # large enough that torch splits the work over threads
        assert torch.equal(again.block(range(12), shape), torch.stack(forward))
        wide = normals(
            torch.arange(40), torch.zeros(40, dtype=torch.int64), torch.tensor([10]), 5120
        )
        assert torch.equal(wide[0, 3].view(SHAPE), forward[10][0])
    finally:
        torch.set_num_threads(threads)


def test_a_caller_may_write_into_its_noise():
    source = NoiseSource([1])
    first = source(2, (1, *SHAPE)).zero_()
    assert torch.equal(first, torch.zeros_like(first))
    assert torch.equal(source(2, (1, *SHAPE)), NoiseSource([1])(2, (1, *SHAPE)))


def test_distribution_is_standard_normal():
    z = NoiseSource(range(100, 108)).block(range(16), (8, *SHAPE)).flatten().double()
    n = z.numel()
    assert n == 8 * 16 * 5120
    # standard errors of the first four moments of n normals
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < 4.5 * math.sqrt(spread / n)
    ordered = z.sort().values
    cdf = torch.special.ndtr(ordered)
    rank = torch.arange(1, n + 1) / n
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand
    assert float((cdf - rank).abs().max()) < 1.95 / math.sqrt(n)
    beyond = int((z.abs() > 4).sum())
    expected = n * math.erfc(4 / math.sqrt(2))
    assert abs(beyond - expected) < 4.5 * math.sqrt(expected)


def test_different_keys_and_counters_are_uncorrelated():
    base = NoiseSource([1])(3, (1, 20000))
    others = [
        NoiseSource([2])(3, (1, 20000)),
        NoiseSource([1 + 2**32])(3, (1, 20000)),
        NoiseSource([1], [1])(3, (1, 20000)),
        NoiseSource([1])(4, (1, 20000)),
        NoiseSource([1])(3, (1, 20000), draw=1),
        base.roll(1, dims=1),
    ]
    for other in others:
        assert abs(float((base * other).mean())) < 4.5 / math.sqrt(20000)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.5, True, "7", None])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match="seed"):
        NoiseSource([0, seed])


def test_seed_limits_and_tensors():
    edge = seed_tensor([0, 2**63 - 1])
    assert edge.dtype == torch.int64
    z = NoiseSource(edge)(0, (2, 8))
    assert torch.isfinite(z).all()
    with pytest.raises(ValueError, match="seed -1 "):
        NoiseSource(torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        NoiseSource(torch.tensor([3.0]))


def test_mismatched_requests():
    with pytest.raises(ValueError, match="batch of 2 seeds"):
        NoiseSource([1, 2])(0, (3, 4))
    with pytest.raises(ValueError, match="1 sample numbers for 2 seeds"):
        NoiseSource([1, 2], [0])
    with pytest.raises(ValueError, match=r"not below 2\^32"):
        NoiseSource([1], [2**32])
    with pytest.raises(ValueError, match="step or draw -1"):
        NoiseSource([1])(-1, (1, 4))
