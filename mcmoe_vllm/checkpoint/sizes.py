"""Bytes and bits before and after."""

from __future__ import annotations

from dataclasses import dataclass

from mcmoe_vllm.widths import bits_per_weight


@dataclass(frozen=True)
class Sizes:
    """Bytes and parameters before and after; scales and zeros are counted."""

    original_bytes: int
    expert_bytes: int
    other_bytes: int
    expert_parameters: int
    parameters: int

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes + self.other_bytes

    @property
    def expert_bits(self) -> float:
        """True bits per routed expert weight."""
        return bits_per_weight(self.expert_bytes, self.expert_parameters)

    @property
    def model_bits(self) -> float:
        """True bits per weight of the whole model."""
        return bits_per_weight(self.total_bytes, self.parameters)


def size(nbytes: float) -> str:
    """12345678 -> '11.8 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
