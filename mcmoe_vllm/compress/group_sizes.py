"""How many columns share a scale, for each kind of matrix: as asked for, or the most that fit.

    widths of the model, ranks of tensor parallelism -> {"w13": 128, "w2": 64, "dense": 128}

What each rank holds of a row begins and ends with a group: down projections and linears behind
attention are split by columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mcmoe_vllm.checkpoint.format import DENSE_WIDTH
from mcmoe_vllm.errors import UserError, some
from mcmoe_vllm.limits import GROUP_SIZES, PROJECTION_GROUPS
from mcmoe_vllm.model.layout import SPLIT_INPUTS
from mcmoe_vllm.model.moe_model import Outline


@dataclass(frozen=True)
class Columns:
    """kind: one of PROJECTION_GROUPS; what: the matrices in words; count: their columns; ranks:
    over which these are split."""

    kind: str
    what: str
    count: int
    ranks: int = 1

    def fit(self, group_size: int) -> bool:
        """Whether every rank has whole groups."""
        return self.count % (group_size * self.ranks) == 0

    def __str__(self) -> str:
        split = f" over {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.what}: {self.count} columns{split}"


def quantized_columns(model: Outline, dense_bits: int, ranks: int) -> Iterator[Columns]:
    """Of every matrix that is quantized."""
    yield Columns("w13", "the experts' gate and up projections (hidden size)", model.hidden_size)
    yield Columns("w2", "the experts' down projections (expert width)", model.expert_width, ranks)
    for layer in range(model.num_layers) if dense_bits == DENSE_WIDTH else ():
        for name in model.layout.dense_weights(layer):
            if name in model.checkpoint:
                count = model.checkpoint.tensors[name].shape[1]
                split = ranks if model.layout.parameter(name).endswith(SPLIT_INPUTS) else 1
                yield Columns("dense", name.removesuffix(".weight"), count, split)


def choose_group_sizes(asked: Mapping[str, int], columns: Sequence[Columns]) -> dict[str, int]:
    """The group size of every kind: what was asked for, otherwise the largest that fits.

    Raises UserError listing what no size fits, or not the one asked for.
    """
    fitting = {
        kind: [s for s in GROUP_SIZES if all(c.fit(s) for c in columns if c.kind == kind)]
        for kind in PROJECTION_GROUPS
    }
    largest = {kind: max(sizes, default=min(GROUP_SIZES)) for kind, sizes in fitting.items()}
    chosen = {**largest, **asked}
    wrong = [c for c in columns if not c.fit(chosen[c.kind])]
    if wrong:
        lines = some([f"{c}, group size {chosen[c.kind]}" for c in wrong])
        remedy = _remedy(wrong, {c.kind: fitting[c.kind] for c in wrong})
        raise UserError(
            f"columns are no multiple of their group size in {len(wrong)} "
            f"place{'s' * (len(wrong) != 1)}:{lines}\nRemedy: {remedy}"
        )
    return {kind: chosen[kind] for kind in PROJECTION_GROUPS}


def _remedy(wrong: Sequence[Columns], fitting: Mapping[str, Sequence[int]]) -> str:
    """fitting: of the kinds that are wrong, the sizes that would do."""
    if all(fitting.values()):
        sizes = ",".join(f"{kind}={max(sizes)}" for kind, sizes in fitting.items())
        return f"use --group-size {sizes}, or leave it out"
    hopeless = [c for c in wrong if not fitting[c.kind]]
    if all(c.ranks > 1 and Columns("", "", c.count).fit(min(GROUP_SIZES)) for c in hopeless):
        remedy = "use a smaller --tensor-parallel"
    else:
        remedy = "no group size fits this model"
    return f"{remedy}, or --dense-bits 16" if set(fitting) == {"dense"} else remedy
