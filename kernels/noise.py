"""Counter-based normal noise: a sample's bits depend on its seed, number and step alone.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") on int64 tensors,
then Box-Muller in float64 by additions, multiplications, divisions and square roots alone. IEEE 754
rounds those four exactly, so batch size, slot, vector width, thread count and processor cannot
change a bit; torch.log and torch.cos promise no such thing: their vector code and scalar tails
differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**32
_MASK = _WORD - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# the bits of float64 sqrt(1/2), below which a mantissa is doubled and its exponent lowered by one
_HALF_ROOT_BITS = 0x3FE6A09E667F3BCD
_MANTISSA_BITS = 2**52 - 1
# log((1 + q) / (1 - q)) = 2 q sum q^2k / (2k + 1), times -2; 9 terms leave 1e-15 at |q| <= 0.172
_LOG_TERMS = tuple(-4 / (2 * k + 1) for k in range(9))
# sin(a) = a sum (-1)^k a^2k / (2k + 1)!; 8 terms leave 1e-16 at |a| <= pi / 4
_SIN_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))


def philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Four 32-bit words a counter by Philox 4x32-10; words are int64 in [0, 2^32).

    ``even`` [2, ...] holds counter words 0 and 2, ``odd`` [2, ...] words 1 and 3, ``key`` [2, ...]
    both key words; they broadcast together. Returns output words (0, 2) and (1, 3), each [2, ...].
    """
    rows = (2, *[1] * (even.ndim - 1))
    multipliers, weyl = (t.view(rows) for t in _constants(even.device))
    turns = torch.arange(_ROUNDS, device=even.device).view(-1, 1, *rows[1:])
    for round_key in ((key + turns * weyl) & _MASK).unbind():
        # the product wraps modulo 2^64 and so keeps all its bits; only the low 32 of ``odd`` matter
        # until the end, so one mask a round is enough
        product = (even * multipliers).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK)
        odd = product
    return even, odd & _MASK


def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers and Weyl increments, each [2] int64, filled in on the device itself.

    Copies from the host would wait for a GPU, and break the capture of a graph.
    """
    pairs = []
    for first, second in (_MULTIPLIERS, _WEYL):
        pair = torch.full((2,), first, dtype=torch.int64, device=device)
        pair[1].fill_(second)
        pairs.append(pair)
    return pairs[0], pairs[1]


def _horner(terms: Sequence[float], x: Tensor) -> Tensor:
    # mul and add stay two operations: a fused multiply-add would round once instead of twice
    total = x * terms[-1]
    for term in terms[-2:0:-1]:
        total.add_(term).mul_(x)
    return total.add_(terms[0])


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 normals sqrt(-2 log u) (cos a, sin a) from two int64 words in [0, 2^32)."""
    # u = (word + 1/2) / 2^32 in (0, 1) = mantissa 2^exponent, sqrt(1/2) <= mantissa < sqrt(2)
    bits = (radius.double() + 0.5).mul_(1 / _WORD).view(torch.int64) - _HALF_ROOT_BITS
    exponent = (bits >> 52).double()
    mantissa = bits.bitwise_and_(_MANTISSA_BITS).add_(_HALF_ROOT_BITS).view(torch.float64)
    q = (mantissa - 1).div_(mantissa + 1)
    length = _horner(_LOG_TERMS, q * q).mul_(q)
    length.add_(exponent.mul_(-2 * math.log(2))).sqrt_()
    # a quarter of the angle lies in (-pi/4, pi/4); doubling it twice covers the circle
    quarter = angle.double().add_(0.5 - 2**31).mul_(math.pi / 2 / _WORD)
    square = quarter * quarter
    sine = _horner(_SIN_TERMS, square).mul_(quarter)
    square = sine * sine
    half_sine = (1 - square).sqrt_().mul_(sine).mul_(2)
    half_cosine = 1 - square.mul_(2)
    sine = half_cosine.mul_(half_sine).mul_(2)
    cosine = 1 - half_sine.mul_(half_sine).mul_(2)
    return cosine.mul_(length), sine.mul_(length)


def normals(seeds: Tensor, samples: Tensor, steps: Tensor, size: int, draw: int = 0) -> Tensor:
    """Standard normals [S, B, size] fp32 for S steps and B samples.

    ``seeds`` and ``samples`` are int64 [B], ``steps`` int64 [S] or, one for each sample, [1, B],
    all on one device. Element j is number j % 4 of Philox block (j // 4, step, sample, draw) under
    the key ``seed``.
    """
    count = -(-size // 4)
    shape = (2, len(steps), len(seeds), count)
    even = torch.empty(shape, dtype=torch.int64, device=seeds.device)
    even[0] = torch.arange(count, device=seeds.device)
    even[1] = samples[:, None]
    odd = torch.empty_like(even)
    odd[0] = steps[:, None, None] if steps.ndim == 1 else steps[:, :, None]
    odd[1] = draw
    key = torch.stack((seeds & _MASK, seeds >> 32))[:, None, :, None]
    # words 0 and 2 give radii, words 1 and 3 angles
    first, second = _box_muller(*philox(even, odd, key))
    # 2 x [2, S, B, count] -> [S, B, count, 4] -> [S, B, size]
    values = torch.stack((first[0], second[0], first[1], second[1]), dim=-1).flatten(2)
    return values[..., :size].float()
