"""A permutation of any length in constant memory: an element is computed when it is asked for."""

from __future__ import annotations

import numpy as np

_TABLE = 1024
"""Up to this length a table is drawn: uniform over all permutations, and as quick to make as a few reads."""
_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """One permutation of 0 ... n - 1, fixed by the generator that made it.

    Longer ones are a Feistel network over two unequal digits (Black and Rogaway), walked until the image lies
    inside: digits of about sqrt(n) leave so little outside that a second walk is rare. Neither time nor memory
    depends on n, so a position in an epoch of 10^10 samples costs what one in ten costs.
    """

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        """Draw the permutation.

        Args:
            n: length, at least 0.
            rng: source of the draws; equal generators give equal permutations.
        """
        self.n = n
        self._table: list[int] | None = rng.permutation(n).tolist() if n <= _TABLE else None
        self._low = int(np.ceil(np.sqrt(n)))
        self._high = -(-n // self._low) if n else 0
        keys = rng.integers(0, _MASK, size=_ROUNDS, dtype=np.uint64, endpoint=True)
        self._keys = [int(key) for key in keys]

    def __call__(self, i: int) -> int:
        """Return the image of `i`, 0 <= i < n."""
        if self._table is not None:
            return self._table[i]
        while True:
            i = self._once(i)
            if i < self.n:
                return i

    def _once(self, i: int) -> int:
        """Permute the numbers below low * high."""
        high, low = divmod(i, self._low)
        for number, key in enumerate(self._keys):
            if number % 2:
                low = (low + _mix(high ^ key)) % self._low
            else:
                high = (high + _mix(low ^ key)) % self._high
        return high * self._low + low


def _mix(x: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
