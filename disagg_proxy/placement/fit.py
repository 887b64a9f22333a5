"""Lines through samples, the recent ones weighted most. Pure.

An engine starts from what all engines have shown (``pool``), which counts as a few samples of its own.
"""

from __future__ import annotations

from typing import Final

ENOUGH: Final = 8
"""Samples from which on a line is used."""

_KEEP: Final = 0.97
"""Weight of the older samples with each new one: the last 30 count most."""

_FROM_POOL: Final = 4.0
"""Samples that the pool counts as."""

_TOWARDS_PRIOR: Final = 0.02
"""How strongly a coefficient is drawn to its prior value, relative to the samples. Decides where these do not vary."""


class Fit:
    """``y = a + b * x + c * z`` with coefficients of at least 0, by least squares.

    Args:
        pool: the line through the samples of all engines; None for the pool itself.
        from_origin: where ``x`` does not vary, ``b`` explains ``y``; else ``a`` does.

    Attributes:
        samples: how many there were.
        a, b, c: the coefficients; 0 until there is a sample.
    """

    __slots__ = ("_from_origin", "_sums", "a", "b", "c", "pool", "samples")

    def __init__(self, pool: Fit | None = None, from_origin: bool = False) -> None:
        self.pool = pool
        self._from_origin = from_origin
        self.samples = 0
        # Of the weights, and of x, z, y, x*x, x*z, z*z, x*y and z*y.
        self._sums = [0.0] * 9
        self.a = self.b = self.c = 0.0

    @property
    def learnt(self) -> bool:
        """Whether there are enough samples, of this engine or of all."""
        return self.samples >= ENOUGH or (self.pool is not None and self.pool.samples >= ENOUGH)

    def add(self, y: float, x: float, z: float = 0.0, expected_c: float = 0.0) -> None:
        """Add a sample here and to the pool.

        Args:
            expected_c: the value of ``c`` where ``z`` does not vary.
        """
        sums = self._sums
        new = (1.0, x, z, y, x * x, x * z, z * z, x * y, z * y)
        for index in range(9):
            sums[index] = sums[index] * _KEEP + new[index]
        self.samples += 1
        pool = self.pool
        if pool is not None:
            pool.add(y, x, z, expected_c)
            other = pool._sums
            share = _FROM_POOL / other[0]
            sums = [own + share * theirs for own, theirs in zip(sums, other, strict=True)]
        self._solve(sums, expected_c)

    def values(self) -> tuple[float, float, float]:
        """The coefficients ``a``, ``b`` and ``c``; the pool's while this engine has no sample."""
        pool = self.pool
        if self.samples or pool is None:
            return self.a, self.b, self.c
        return pool.a, pool.b, pool.c

    def _solve(self, sums: list[float], expected_c: float) -> None:
        w, sx, sz, sy, sxx, sxz, szz, sxy, szy = sums
        mx, mz, my = sx / w, sz / w, sy / w
        # Centred, so that the intercept follows.
        cxx, cxz, czz = sxx - sx * mx, sxz - sx * mz, szz - sz * mz
        cxy, czy = sxy - sx * my, szy - sz * my
        origin = sxy / sxx if self._from_origin and sxx else 0.0
        weak_x, weak_z = _TOWARDS_PRIOR * sxx, _TOWARDS_PRIOR * szz
        cxx, cxy = cxx + weak_x, cxy + weak_x * origin
        czz, czy = czz + weak_z, czy + weak_z * expected_c
        determinant = cxx * czz - cxz * cxz
        if not szz:
            b, c = cxy / cxx if cxx else 0.0, expected_c
        elif determinant > 0.0:
            b, c = (cxy * czz - czy * cxz) / determinant, (czy * cxx - cxy * cxz) / determinant
        else:
            b, c = 0.0, czy / czz
        if c < 0.0 or b < 0.0:
            # The one that cannot be negative is 0, and the other explains what there is.
            if c < 0.0:
                b, c = max(0.0, cxy / cxx if cxx else 0.0), 0.0
            else:
                b, c = 0.0, max(0.0, czy / czz if czz else 0.0)
        a = my - b * mx - c * mz
        if a < 0.0:
            a = 0.0
            weight = b * mx + c * mz
            if weight > 0.0:
                b, c = b * my / weight, c * my / weight
        self.a, self.b, self.c = a, b, c
