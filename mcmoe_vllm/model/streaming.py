"""A causal language model run one decoder layer at a time.

The skeleton is a transformers model on the meta device, so it takes no memory; a layer's
weights are read when it is needed and dropped after it. Hidden states live in blocks of a few
windows each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mcmoe_vllm.checkpoint.files import Checkpoint
from mcmoe_vllm.errors import UserError
from mcmoe_vllm.model.architectures import Architecture
from mcmoe_vllm.model.memory import return_freed_memory

BLOCK_TOKENS = 8192  # tokens that go through a layer at once


# decoder layer, expert -> (w13 [2I, H], w2 [H, I]), or None for a dropped expert
ExpertWeights = Callable[[int], tuple[torch.Tensor, torch.Tensor] | None]


ReadTensors = Callable[[list[str]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens: hidden [T, H] goes in, ids int64 [T, k] and
    weights [T, k] come out."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows routed to an expert, ascending, and their weights."""
        rows, slots = torch.where(self.ids == expert)
        return rows, self.weights[rows, slots]


class _RoutedExpertsTap(nn.Module):
    """Stands where transformers keeps the routed experts: records the routing and adds nothing,
    so that a layer returns everything but the routed experts' part."""

    def __init__(self) -> None:
        super().__init__()
        self.routing: Routing | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.routing = Routing(hidden_states, top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)


class StreamedModel:
    """Embedding, decoder layers and head of a checkpoint, each in memory only while in use.

    read: how tensors are fetched, by checkpoint name (dequantizing ones that are packed).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        *,
        device: torch.device,
        dtype: torch.dtype,
        read: ReadTensors | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint = checkpoint
        self.architecture = architecture
        self.device, self.dtype = device, dtype
        self._read = read or checkpoint.read_weights
        settings = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        try:
            self.config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            with torch.device("meta"):
                self.skeleton = AutoModelForCausalLM.from_config(
                    self.config, attn_implementation="sdpa", dtype=dtype
                ).eval()
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{checkpoint.path}/config.json cannot be used: {e}") from None
        body = self.skeleton.model
        with torch.device(device):
            body.rotary_emb = type(body.rotary_emb)(config=self.config)
        self.num_layers = len(body.layers)
        self._head: torch.Tensor | None = None
        self._layer_arguments: dict[int, list[dict[str, Any]]] = {}

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Token windows [S, L] to blocks of hidden states [B, L, hidden]."""
        body = self.skeleton.model
        weight = self._read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        weight = weight.to(self.device, self.dtype)
        per_block = max(1, BLOCK_TOKENS // windows.shape[1])
        blocks = [
            nn.functional.embedding(part.to(self.device), weight)
            for part in windows.split(per_block)
        ]
        self._layer_arguments = {
            size: _record_layer_arguments(body, next(b for b in blocks if b.shape[0] == size))
            for size in {b.shape[0] for b in blocks}
        }
        return blocks

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, routed experts left out.

        Raises UserError if the checkpoint lacks a parameter of the layer or has it in another
        shape.
        """
        layer = self.skeleton.model.layers[index]
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = _RoutedExpertsTap()
        prefix = f"model.layers.{index}."
        names = {
            self.architecture.module_name(name).removeprefix(prefix): name
            for name in self.parameter_names(index)
        }
        wanted = dict(layer.named_parameters())
        missing = sorted(set(wanted) - set(names))
        if missing:
            raise UserError(f"{self.checkpoint.path} lacks {prefix}{{{', '.join(missing)}}}")
        tensors = self._read([names[name] for name in wanted])
        wrong = [
            f"{names[name]} is {tuple(tensors[names[name]].shape)}, needs {tuple(p.shape)}"
            for name, p in wanted.items()
            if tensors[names[name]].shape != p.shape
        ]
        if wrong:
            raise UserError(f"{self.checkpoint.path} contradicts its config: {'; '.join(wrong)}")
        state = {name: tensors[names[name]].to(self.device, self.dtype) for name in wanted}
        layer.load_state_dict(state, strict=False, assign=True)
        return layer

    def parameter_names(self, index: int) -> list[str]:
        """Checkpoint names of a layer's tensors that are not routed experts'."""
        return [
            name
            for name in self.checkpoint.names(f"model.layers.{index}.")
            if not self.architecture.is_routed_expert(name)
        ]

    def release_layer(self, index: int) -> None:
        self.skeleton.model.layers[index].to("meta")
        return_freed_memory()

    def run_layer(
        self,
        layer: nn.Module,
        index: int,
        block: torch.Tensor,
        changed: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """One block through a loaded layer, without its routed experts; and what they would be
        given (None for a dense layer). changed: parameters to use instead of the layer's, by their
        names in it; gradients flow to these alone."""
        windows = block.shape[0]
        if windows not in self._layer_arguments:
            self._layer_arguments[windows] = _record_layer_arguments(self.skeleton.model, block)
        arguments = self._layer_arguments[windows][index]
        if changed is None:
            with torch.no_grad():
                output = layer(block, **arguments)
        else:
            output = torch.func.functional_call(layer, dict(changed), (block,), arguments)
        output = output[0] if isinstance(output, tuple) else output
        tap = getattr(layer.mlp, "experts", None)
        if not isinstance(tap, _RoutedExpertsTap):
            return output, None
        routing, tap.routing = tap.routing, None
        return output, routing

    @torch.no_grad()
    def logits(self, blocks: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Final hidden states to float32 logits [L, vocabulary], window by window."""
        self._load_head()
        for block in blocks:
            for window in block:
                yield self.head(window.to(self.device))

    def head(self, window: torch.Tensor) -> torch.Tensor:
        """Final hidden states [L, H] to float32 logits [L, vocabulary]; gradients may flow."""
        self._load_head()
        assert self._head is not None
        return nn.functional.linear(self.skeleton.model.norm(window), self._head).float()

    def _load_head(self) -> None:
        if self._head is not None:
            return
        tied = "lm_head.weight" not in self.checkpoint
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        tensors = self._read(["model.norm.weight", name])
        weight = tensors["model.norm.weight"].to(self.device, self.dtype)
        self.skeleton.model.norm.load_state_dict({"weight": weight}, assign=True)
        self.skeleton.model.norm.requires_grad_(False)
        self._head = tensors[name].to(self.device, self.dtype)

    def activation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The experts' activation function."""
        from transformers.activations import ACT2FN

        return ACT2FN[self.config.hidden_act]


def choose_device(name: str) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". Raises UserError for others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}, allowed are auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r} but torch finds no CUDA GPU; use --device cpu")
    return device


@torch.no_grad()
def experts_output(
    routing: Routing,
    experts: ExpertWeights,
    num_experts: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The routed experts' weighted outputs, summed by token: float32 [T, H]."""
    total = torch.zeros_like(routing.hidden, dtype=torch.float32)
    for expert in range(num_experts):
        rows, weights = routing.tokens_of(expert)
        pair = experts(expert) if rows.numel() else None
        if pair is None:
            continue
        for part, weight in zip(rows.split(BLOCK_TOKENS), weights.split(BLOCK_TOKENS), strict=True):
            x = routing.hidden[part].to(pair[0].device)
            output = run_expert(x, *pair, activation).float().to(total.device)
            total.index_add_(0, part, output * weight.float().unsqueeze(1))
    return total


def expert_hidden(
    x: torch.Tensor, w13: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What the down projection is given: act(x w1^T) * (x w3^T), [T, I]."""
    gate, up = nn.functional.linear(x, w13).chunk(2, dim=-1)
    return activation(gate) * up


def run_expert(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x [T, H] through one expert: w13 [2I, H] (gate rows first), w2 [H, I] -> [T, H]."""
    return nn.functional.linear(expert_hidden(x, w13, activation), w2)


def _record_layer_arguments(body: Any, block: torch.Tensor) -> list[dict[str, Any]]:
    """The keyword arguments (mask, rotary tables, ...) that each decoder layer would be given."""
    recorded: list[dict[str, Any]] = []

    class Recorder(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            # Models may choose masks by an attribute of the layer.
            for name in ("attention_type", "layer_type"):
                if hasattr(layer, name):
                    setattr(self, name, getattr(layer, name))

        def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            recorded.append(arguments)
            return hidden_states

    layers, norm = body.layers, body.norm
    try:
        body.layers = nn.ModuleList(Recorder(layer) for layer in layers)
        body.norm = nn.Identity()
        with torch.no_grad():
            body(inputs_embeds=block, use_cache=False)
    finally:
        body.layers, body.norm = layers, norm
    return recorded


def concatenate(routings: Sequence[Routing]) -> Routing:
    """The routings of all blocks as one."""
    return Routing(
        torch.cat([r.hidden for r in routings]),
        torch.cat([r.ids for r in routings]),
        torch.cat([r.weights for r in routings]),
    )
