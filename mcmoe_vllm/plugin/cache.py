"""How much memory a CPU engine spends on weights that are kept dequantized."""

from __future__ import annotations

from mcmoe_vllm.errors import UserError

GIB = 1 << 30
CACHE_OPTION = "cpu_weight_cache_gib"
# What fits is kept dequantized, which is fastest; larger models compute from 4-bit codes.
DEFAULT_CACHE_GIB = 2.0


class CacheBudget:
    """Bytes that may still be spent on dequantized weights in this engine."""

    def __init__(self, gib: float = DEFAULT_CACHE_GIB) -> None:
        number = isinstance(gib, int | float) and not isinstance(gib, bool)
        if not number or not 0 <= gib < float("inf"):
            raise UserError(
                f"{CACHE_OPTION} is {gib!r}, needs a number of GiB from 0, as in "
                f"--additional-config '{{\"{CACHE_OPTION}\": 4}}'"
            )
        self.bytes = int(gib * GIB)

    def take(self, nbytes: int) -> bool:
        """Whether so much is left; if it is, it is spent."""
        if nbytes > self.bytes:
            return False
        self.bytes -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """What `take` spent is to be spent again."""
        self.bytes += nbytes

    @classmethod
    def from_additional_config(cls, options: object) -> CacheBudget:
        given = options.get(CACHE_OPTION) if isinstance(options, dict) else None
        return cls(DEFAULT_CACHE_GIB if given is None else given)
