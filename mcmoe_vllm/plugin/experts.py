"""The routed experts of one layer inside vLLM: parameters, loading, and the call of the operator.

Parameters of the layer, for its E' present local experts (w2 likewise):

    w13_weight_packed  uint8    flat: expert e at byte packed_offsets(...)[e], [2I, H*bits/8]
    w13_weight_scale   int16    [E', 2I, H/G]
    w13_bias           float    [E, 2I], with biases alone: of all local experts, as vLLM's class
                                copies them, in pairs of rows if that is what its activation takes

Gate rows lie above up rows. Tensor parallelism takes rows of w1 and w3 and whole groups of w2's
columns; expert parallelism takes whole experts. Loading fills views of these buffers and counts
what it filled: a gap, a surplus or a shape that contradicts config.json is an error.

vLLM may load again (reload_weights): it puts parameters as `create_weights` made them in the place
of what is there, loads, and calls `process_weights_after_loading` once more.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
import vllm
from packaging.version import Version
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from mcmoe_kernels.formats.packing import pack_scale
from mcmoe_kernels.layer import ExpertLayer, ExpertMatrices, packed_offsets, split_flat
from mcmoe_vllm.checkpoint.format import EXPERT_SCALES, QuantizationConfig, stored_scale
from mcmoe_vllm.checkpoint.verification import wrong_values
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.experts import deinterleave
from mcmoe_vllm.plugin.activation import find_activation, takes_pairs
from mcmoe_vllm.plugin.launch import Launch
from mcmoe_vllm.plugin.operator import add_layer, prepare_experts
from mcmoe_vllm.plugin.prepared import PreparedExperts, renew
from mcmoe_vllm.plugin.pruning import LayerPruning
from mcmoe_vllm.plugin.routing import refuse_routing, route
from mcmoe_vllm.plugin.unsupported import refuse_experts, refuse_state_dict
from mcmoe_vllm.widths import code_bits

PROJECTIONS = ("w1", "w3", "w2")
KINDS = ("weight_packed", "weight_scale")
SCALE_DTYPES = {"F16": torch.float16, "I16": torch.int16}
# vLLM's name of a shard -> the group whose parameter it goes to, and the projections that it holds.
SHARDS = {
    "w1": ("w13", ("w1",)),
    "w3": ("w13", ("w3",)),
    "w2": ("w2", ("w2",)),
    "gpt_oss_w13": ("w13", ("w1", "w3")),  # in pairs of rows
    "gpt_oss_w2": ("w2", ("w2",)),
}
SHOWN_GAPS = 8
DUMMY_SCALE = int(pack_scale(torch.tensor(2.0**-7), torch.tensor(1.0), bits=3))


class McmoeExpertsMethod(FusedMoEMethodBase):
    """One instance per layer. `moe_kernel` stays None, so vLLM's runner reduces over the ranks.

    counted: the layer's parameters of which it knows itself whether all of them was loaded.
    """

    counted = tuple(f"{group}_{kind}" for group in ("w13", "w2") for kind in KINDS)

    def __init__(
        self,
        config: QuantizationConfig,
        launch: Launch,
        moe: FusedMoEConfig,
        prefix: str,
        index: int,
    ) -> None:
        super().__init__(moe)
        self.config = config
        self.launch = launch
        self.prefix = prefix
        self.layer_index = index
        self.local: dict[int, int] = {}  # global expert -> local expert
        self.widths = {group: config.bits(index, group) for group in ("w13", "w2")}
        self.group_size = config.group_size
        self.filled: set[tuple[int, str, str]] = set()
        # Group -> where its buffers lay when the views of its experts were made, and the views.
        self._views: dict[str, tuple[tuple[int, ...], ExpertMatrices]] = {}
        self.prepared: PreparedExperts | None = None
        _refuse_unsupported(moe, prefix)

    @property
    def is_monolithic(self) -> bool:
        """Whether it routes as well, which vLLM asks it."""
        return current_platform.is_cpu()

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters. Raises UserError for a model or a split that does not fit."""
        given, configured = self.moe.num_experts, len(self.widths["w13"])
        if given != configured:
            raise UserError(
                f"{self.prefix} has {given} experts, but expert_bits in config.json has "
                f"{configured}. If --eplb or redundant experts are on, switch them off."
            )
        refuse_experts(layer, self.moe, self.prefix)
        if self.is_monolithic:
            refuse_routing(layer, self.moe, self.prefix)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size_per_partition
        self.dtype = params_dtype
        self.activation = find_activation(layer, self.moe, self.prefix)
        self._check_groups()
        self.local = {
            e: local
            for e in range(given)
            if (local := layer._map_global_expert_id_to_local_expert_id(e)) >= 0
        }
        self.bits = {
            group: tuple(widths[e] for e, _ in sorted(self.local.items(), key=lambda pair: pair[1]))
            for group, widths in self.widths.items()
        }
        assert len(self.local) == num_experts, f"{len(self.local)} mapped, {num_experts} local"
        present = sum(b > 0 for b in self.bits["w13"])
        for group in ("w13", "w2"):
            rows, columns = self._shape(group)
            size = packed_offsets(self.bits[group], rows, columns)[-1]
            scale = (present, rows, columns // self.group_size[group])
            self._register(layer, f"{group}_weight_packed", torch.zeros(size, dtype=torch.uint8))
            self._register(layer, f"{group}_weight_scale", torch.zeros(scale, dtype=torch.int16))
            self._matrices(layer, group)
            if self.moe.has_bias:
                bias = torch.zeros(num_experts, rows, dtype=params_dtype)
                layer.register_parameter(f"{group}_bias", torch.nn.Parameter(bias, False))

    def load_weight(
        self,
        layer: Any,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's part of one checkpoint tensor to its place.

        Raises UserError if the tensor's shape or type contradicts the width in config.json.
        """
        local = self.local.get(expert_id)
        if local is None:  # another rank's expert
            return False if return_success else None
        kind = f"weight_{weight_name.rpartition('_')[2]}"
        group, projections = SHARDS[shard_id]
        name = f"{self.prefix}: expert {expert_id} {shard_id}.{kind}"
        self._check_tensor(name, loaded_weight, projections, expert_id, kind)
        if kind == "weight_scale":
            loaded_weight = stored_scale(loaded_weight, self.widths[group][expert_id], name)
        parallel = self.moe.moe_parallel_config
        # w2 is split over its columns, w1 and w3 over their rows, together over pairs of rows.
        dim = 1 if group == "w2" else 0
        size = loaded_weight.shape[dim] // parallel.tp_size
        part = loaded_weight.narrow(dim, parallel.tp_rank * size, size)
        target = getattr(self._matrices(layer, group), kind.removeprefix("weight_"))[local]
        if projections == ("w1", "w3"):
            part = deinterleave(part)
        elif projections == ("w1",):
            target = target[: self.intermediate_size]
        elif projections == ("w3",):
            target = target[self.intermediate_size :]
        assert target.shape == part.shape, f"{tuple(target.shape)}, {tuple(part.shape)}"
        target.copy_(part)
        self.filled.update((expert_id, projection, kind) for projection in projections)
        return True if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.launch.dummy:
            self._fill_dummy(layer)
        else:
            self._refuse_gaps()
            self._refuse_values(layer)
        expert_map = layer.expert_map
        experts = ExpertLayer(
            self.hidden_size,
            self.intermediate_size,
            self._with_bias(layer, "w13"),
            self._with_bias(layer, "w2"),
            self.activation,
            None if expert_map is None else expert_map.to(torch.int32),
        )
        parallel = self.moe.moe_parallel_config
        first_rank = parallel.tp_rank == parallel.ep_rank == 0  # all ranks route the same tokens
        pruning = self.launch.pruning(
            self.layer_index, layer.w13_weight_scale.device, counting=first_rank
        )
        if self.prepared is None:
            layer.register_state_dict_pre_hook(refuse_state_dict)
        self._prepare(experts, pruning)
        assert self.prepared is not None
        self.filled.clear()  # what is loaded next must be whole by itself
        self._views.clear()  # they keep the buffers alive
        if not self.prepared.keeps_packed:
            for name in self.counted:
                param = getattr(layer, name)
                param.data = torch.empty(0, dtype=param.dtype)
        if pruning is not None and pruning.counts is not None:
            # vLLM keeps buffers through a sleep of level 2, which loses all other memory.
            layer.register_buffer("pruning_counts", pruning.counts.sums, persistent=False)
        if current_platform.is_cpu():
            add_layer(self.prefix, self.prepared)
        self.moe_quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
        self.launch.ready(self.prefix, self.prepared.path, announce=first_rank)

    def _prepare(self, experts: ExpertLayer, pruning: LayerPruning | None) -> None:
        """Make `prepared`, or renew it where the weights were loaded again."""
        if self.prepared is not None:
            self.launch.budget.give(self.prepared.booked)
        new = prepare_experts(
            experts, self.dtype, self.launch.budget, self.moe.experts_per_token, pruning
        )
        self.prepared = new if self.prepared is None else renew(self.prepared, new)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's part of the sum over experts, [T, H]. The runner adds shared experts."""
        if current_platform.is_cpu():  # vLLM compiles the CPU's graph through this call
            return torch.ops.mcmoe.experts(x, topk_weights, topk_ids, self.prefix)
        assert self.prepared is not None
        return self.prepared.compute(x, topk_weights, topk_ids)

    def apply_monolithic(
        self,
        layer: Any,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same from what the router computes [T, E], on a CPU."""
        return self.apply(layer, x, *route(layer, x, router_logits))

    def _shape(self, group: str) -> tuple[int, int]:
        """Rows and columns of this rank's matrix."""
        if group == "w13":
            return 2 * self.intermediate_size, self.hidden_size
        return self.hidden_size, self.intermediate_size

    def _matrices(self, layer: Any, group: str) -> ExpertMatrices:
        """Views of the layer's buffers, made anew only where vLLM has put other buffers in their
        place. The views keep the old ones alive, so that an address tells them apart."""
        packed, scale = (getattr(layer, f"{group}_{kind}").data for kind in KINDS)
        place = (packed.data_ptr(), scale.data_ptr())
        if group not in self._views or self._views[group][0] != place:
            matrices = split_flat(packed, scale, self.bits[group], *self._shape(group))
            self._views[group] = place, matrices
        return self._views[group][1]

    def _with_bias(self, layer: Any, group: str) -> ExpertMatrices:
        """What the kernels are given: gates above ups in biases too."""
        bias = getattr(layer, f"{group}_bias").data if self.moe.has_bias else None
        if bias is not None and group == "w13" and takes_pairs(layer):
            bias = deinterleave(bias, 1)
        widths = self.config.widths(group)
        return replace(self._matrices(layer, group), model_bits=widths, bias=bias)

    def _register(self, layer: Any, name: str, value: torch.Tensor) -> None:
        param = torch.nn.Parameter(value, requires_grad=False)
        layer.register_parameter(name, param)
        # vLLM keeps a parameter's attributes for as long as the layer lives, so one that held the
        # layer would keep a deleted engine's weights.
        held = weakref.proxy(layer)

        # vLLM asks for its name and binds its arguments by theirs.
        def weight_loader(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            return self.load_weight(
                held, param, loaded_weight, weight_name, shard_id, expert_id, return_success
            )

        set_weight_attrs(param, {"weight_loader": weight_loader})

    def _check_groups(self) -> None:
        wrong = [
            f"{what} of {size} is no multiple of the group size {self.group_size[group]}"
            for group, what, size in (
                ("w13", "hidden size", self.hidden_size),
                ("w2", "expert width per rank", self.intermediate_size),
            )
            if size % self.group_size[group]
        ]
        if wrong:
            ranks = self.moe.moe_parallel_config.tp_size
            raise UserError(
                f"{self.prefix} cannot be split over {ranks} tensor-parallel rank(s): "
                f"{'; '.join(wrong)}. Add --enable-expert-parallel, which gives each rank whole "
                f"experts, or compress with --tensor-parallel {ranks}."
            )

    def _check_tensor(
        self,
        name: str,
        tensor: torch.Tensor,
        projections: tuple[str, ...],
        expert: int,
        kind: str,
    ) -> None:
        group = "w2" if projections == ("w2",) else "w13"
        bits = self.widths[group][expert]
        if bits == 0:
            raise UserError(
                f"{name} is in the checkpoint, but config.json says that the expert was dropped "
                f"(width 0). The folder mixes two checkpoints: compress again, or restore its "
                f"config.json."
            )
        full = self.intermediate_size * self.moe.moe_parallel_config.tp_size
        rows, columns = self.hidden_size, full
        if group == "w13":
            rows, columns = len(projections) * full, self.hidden_size
        expected, dtype = (rows, columns * code_bits(bits) // 8), torch.uint8
        if kind == "weight_scale":
            stored, per_group = EXPERT_SCALES[self.config.format_version]
            expected = (rows, per_group * columns // self.group_size[group])
            dtype = SCALE_DTYPES[stored]
        if tuple(tensor.shape) == expected and tensor.dtype == dtype:
            return
        raise UserError(
            f"{name} is {_describe(tensor.shape, tensor.dtype)}, but width {bits} in config.json "
            f"(group size {self.group_size[group]}) needs {_describe(expected, dtype)}. The folder "
            f"mixes two checkpoints: compress again, or restore its config.json."
        )

    def _fill_dummy(self, layer: Any) -> None:
        """Weights for --load-format dummy that the kernels treat like real ones: random codes,
        and scales and zeros that every 16-bit format holds. vLLM itself fills neither so."""
        for group in ("w13", "w2"):
            packed, scale = (getattr(layer, f"{group}_{kind}").data for kind in KINDS)
            packed.random_(0, 256)
            scale.fill_(DUMMY_SCALE)

    def _refuse_values(self, layer: Any) -> None:
        """Raise UserError for scales and zeros that docs/FORMAT.md does not allow."""
        wrong: list[str] = []
        for group, widths in self.bits.items():
            scale = getattr(layer, f"{group}_weight_scale").data
            present = [bits for bits in widths if bits]
            for bits in sorted(set(present)):
                part = scale[[i for i, b in enumerate(present) if b == bits]]
                wrong += wrong_values(f"{bits}-bit {group}.weight_scale", part, bits)
        if wrong:
            raise UserError(
                f"{self.prefix}: {'; '.join(wrong)}. The folder is damaged: copy or compress it "
                f"again. `mcmoe inspect --check <folder>` names the tensors."
            )

    def _refuse_gaps(self) -> None:
        missing = [
            f"expert {e} {p}.{kind}"
            for e in sorted(self.local)
            if self.widths["w13"][e]
            for p in PROJECTIONS
            for kind in KINDS
            if (e, p, kind) not in self.filled
        ]
        if missing:
            shown = "\n  - ".join(missing[:SHOWN_GAPS])
            rest = f"\n  and {len(missing) - SHOWN_GAPS} more" if len(missing) > SHOWN_GAPS else ""
            raise UserError(
                f"{self.prefix}: the checkpoint lacks {len(missing)} expert tensor(s) that "
                f"config.json promises:\n  - {shown}{rest}\nThe folder is incomplete: copy or "
                f"compress it again. `mcmoe inspect --check <folder>` lists what is there."
            )


def _refuse_unsupported(moe: FusedMoEConfig, prefix: str) -> None:
    """Raise UserError listing every setting that the experts cannot be served with."""
    parallel = moe.moe_parallel_config
    backend = getattr(parallel, "all2all_backend", None)
    refused = {
        f"experts with biases on vLLM {vllm.__version__}, which leaves compressed ones unread: "
        "use vLLM 0.32 or newer": moe.has_bias and Version(vllm.__version__).release < (0, 32),
        "expert load balancing: drop --enable-eplb": getattr(parallel, "enable_eplb", False),
        f"--all2all-backend {backend}: use allgather_reducescatter": (
            getattr(parallel, "use_all2all_kernels", False) and backend != "allgather_reducescatter"
        ),
    }
    wrong = [what for what, given in refused.items() if given]
    if wrong:
        raise UserError(f"{prefix}: mcmoe does not serve " + "; ".join(wrong))


def _describe(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
