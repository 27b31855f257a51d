"""A checkpoint as if it held other tensors than it does: those are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from mcmoe_vllm.checkpoint.files import Checkpoint


@dataclass(frozen=True)
class Computed:
    """A tensor that is not stored.

    parts: the stored tensors that it is computed from; compute: of those, in that order. Index i of
    the first dimension follows from index i of every part's.
    """

    parts: tuple[str, ...]
    compute: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class View(Checkpoint):
    """config and tensors are what the readers are to see, the latter with the shapes, dtypes and
    sizes of what they are given.

    stored: what lies on disk; computed: by name in `tensors`, all others are read as they are.
    """

    stored: Checkpoint
    computed: Mapping[str, Computed]

    @property
    def on_disk(self) -> Checkpoint:
        return self.stored

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return self._read(names, self.stored.read)

    def read_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        # Of the parts too: a damaged one is named by itself.
        return self.require_finite(self._read(names, self.stored.read_weights))

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        if name not in self.computed:
            return self.stored.read_slice(name, index)
        wanted = self.computed[name]
        found = wanted.compute(*(self.stored.read_slice(part, index) for part in wanted.parts))
        return self.require_finite({f"{name}[{index}]": found}).popitem()[1]

    def _read(
        self, names: Iterable[str], read: Callable[[Iterable[str]], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        names = list(dict.fromkeys(names))
        parts = {n: self.computed[n].parts if n in self.computed else (n,) for n in names}
        held = read([part for of in parts.values() for part in of])
        found = {}
        for name in names:
            given = [held.pop(part) for part in parts[name]]  # kept no longer than needed
            found[name] = self.computed[name].compute(*given) if name in self.computed else given[0]
        return found
