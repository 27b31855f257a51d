"""What holds for one compressed folder on this machine: `mcmoe doctor --self-test DIR`.

    folder -> checks in order -> findings, with a remedy in each that is not "ok"

A check stands on those before it that it names; where one of them has failed it is not asked, and
says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mcmoe_vllm.checkpoint.files import Checkpoint, open_checkpoint, read_config
from mcmoe_vllm.checkpoint.format import DENSE_WIDTH, MANIFEST_FILE, QuantizationConfig
from mcmoe_vllm.checkpoint.manifest import read_manifest
from mcmoe_vllm.checkpoint.sizes import size
from mcmoe_vllm.doctor import Finding, Status, in_one_line, run_doctor
from mcmoe_vllm.errors import UserError, count
from mcmoe_vllm.inspection import inspect_checkpoint
from mcmoe_vllm.model.architectures import find_architecture, why_unsure
from mcmoe_vllm.model.layout import SPLIT_INPUTS, Layout, find_layout
from mcmoe_vllm.model.packed import with_original_names
from mcmoe_vllm.model.skeleton import Skeleton, make_skeleton
from mcmoe_vllm.model.text import load_tokenizer
from mcmoe_vllm.pruning.table import read_table
from mcmoe_vllm.widths import describe_group_sizes

OF_THE_MACHINE = ("vllm", "vLLM plugin", "GPU")  # checks of the doctor's that serving depends on
RANKS = (1, 2, 4, 8)
USABLE = 0.9  # of a GPU's memory, which vLLM takes by default
MEMORY_FILE = Path("/proc/meminfo")

Answer = tuple[Status, str]


@dataclass(frozen=True)
class Folder:
    """A compressed folder, opened as far as a check asks for it."""

    path: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.path)

    @cached_property
    def config(self) -> QuantizationConfig:
        return read_config(self.checkpoint)

    @cached_property
    def skeleton(self) -> Skeleton:
        return make_skeleton(self.checkpoint, find_architecture(self.checkpoint.config))

    @cached_property
    def layout(self) -> Layout:
        return find_layout(with_original_names(self.checkpoint).tensors, self.skeleton)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)


@dataclass(frozen=True)
class Check:
    """name: what is asked about; needs: checks without which it means nothing."""

    name: str
    ask: Callable[[Folder], Answer]
    needs: tuple[str, ...] = ()


def run_self_test(path: str | os.PathLike[str]) -> list[Finding]:
    """All checks in order, then the doctor's of this machine. Raises UserError for no folder."""
    if not Path(path).is_dir():
        raise UserError(f"{path} is not a folder; give one that `mcmoe quantize` made")
    folder = Folder(Path(path))
    findings: list[Finding] = []
    failed: set[str] = set()
    for check in CHECKS:
        found = _run(check, folder, failed)
        if found.status == "error" or failed.intersection(check.needs):
            failed.add(check.name)
        findings.append(found)
    return [*findings, *run_doctor(OF_THE_MACHINE)]


def _run(check: Check, folder: Folder, failed: set[str]) -> Finding:
    for need in check.needs:
        if need in failed:
            return Finding(check.name, "warning", f"not asked, because of: {need}")
    try:
        status, detail = check.ask(folder)
    except UserError as e:
        return Finding(check.name, "error", in_one_line(str(e)))
    except Exception as e:  # whatever breaks is what the user came to learn
        return Finding(check.name, "error", in_one_line(f"{type(e).__name__}: {e}"))
    return Finding(check.name, status, detail)


def _ask_files(folder: Folder) -> Answer:
    tensors = folder.checkpoint.tensors
    shards = len({info.shard for info in tensors.values()})
    return "ok", (
        f"{len(tensors)} tensors, {size(folder.checkpoint.nbytes)}, in {shards} "
        f"shard{'s' * (shards != 1)}; headers, lengths and index agree"
    )


def _ask_settings(folder: Folder) -> Answer:
    config = folder.config
    sizes = describe_group_sizes(config.group_size)
    return "ok", f"format version {config.format_version}; group sizes: {sizes}"


def _ask_architecture(folder: Folder) -> Answer:
    skeleton, names = folder.skeleton, folder.skeleton.architecture
    setting, activation = skeleton.activation_setting
    if activation not in names.activations:
        return "error", (
            f"{names.name} with {setting} {activation!r}, but vLLM computes "
            f"{' or '.join(names.activations)}: do not serve it; compress the original model, "
            "whose config.json says what its experts compute"
        )
    if unsure := why_unsure(names.name):
        return "warning", unsure
    return "ok", f"{names.name}, {activation}: vLLM computes the same"


def _ask_tensors(folder: Folder) -> Answer:
    found = inspect_checkpoint(folder.path)
    return "ok", (
        f"names, shapes and types as config.json says: {len(found.layers)} layers x "
        f"{found.num_experts} experts, {found.expert_bits:.3f} bits a weight"
    )


def _ask_manifest(folder: Folder) -> Answer:
    if not (folder.path / MANIFEST_FILE).exists():
        return "error", (
            f"no {MANIFEST_FILE}, so that nothing can be said of the bytes; download the "
            "checkpoint again"
        )
    uncovered = read_manifest(folder.path).uncovered
    return ("warning", uncovered) if uncovered else ("ok", "a hash of every shard and tensor")


def _ask_content(folder: Folder) -> Answer:
    inspect_checkpoint(folder.path, check=True)
    return "ok", "every hash is the manifest's, every scale and zero is allowed"


def _ask_numbers(folder: Folder) -> Answer:
    floats = [n for n, t in folder.checkpoint.tensors.items() if t.dtype in ("BF16", "F16", "F32")]
    for name in floats:  # one at a time: they may not fit into memory together
        folder.checkpoint.read_weights([name])
    return "ok", f"no NaN and no infinity in {len(floats)} tensors of floats"


def _ask_pruning(folder: Folder) -> Answer:
    table = read_table(folder.config)
    if table is None:
        return "ok", "not calibrated, nothing is pruned; `mcmoe calibrate-pruning` would"
    if folder.skeleton.top_k == 1:
        return "error", (
            "the table is of no use, a token has one expert: remove `pruning` from "
            "quantization_config"
        )
    return "ok", (
        f"{table.target_drop:.1%} of expert activations are dropped unless the launch says "
        f"otherwise, at most {max(table.ratios):.1%}"
    )


def _ask_tokenizer(folder: Folder) -> Answer:
    try:
        tokenizer = folder.tokenizer
        ids = tokenizer("Mixture of experts")["input_ids"]
    except UserError as e:
        return "error", (
            f"{in_one_line(str(e))}; copy the tokenizer's files of the original model into the "
            "folder, or serve with --tokenizer MODEL"
        )
    rows = int(folder.skeleton.text_config.vocab_size)
    if not ids or max(ids) >= rows:
        return "error", (
            f"it makes {ids} of a text, the model knows 0 to {rows - 1}: it is another model's; "
            "copy the original model's tokenizer files"
        )
    if len(tokenizer) > rows:
        return "warning", (
            f"it has {len(tokenizer)} tokens, the model knows {rows}: a text with one of the "
            "others is refused, or crashes the server; copy the original model's tokenizer files"
        )
    return "ok", f"it loads, {len(tokenizer)} tokens for {rows} rows of the embedding"


def _ask_chat_template(folder: Folder) -> Answer:
    tokenizer = folder.tokenizer
    if not tokenizer.chat_template:
        return "warning", "none: /v1/chat/completions needs `vllm serve --chat-template FILE`"
    message = [{"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception as e:  # jinja's, and whatever a template raises
        return "error", in_one_line(
            f"it cannot be rendered ({e}): mend it, or serve with --chat-template FILE"
        )
    return "ok", f"a message becomes {len(text)} characters"


def _ask_links(folder: Folder) -> Answer:
    root = folder.path.resolve()
    # Of a model in the Hub's cache, every file is a link into a folder beside its snapshots.
    cache = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    links = [file for file in sorted(folder.path.rglob("*")) if file.is_symlink()]
    dangling = [f.name for f in links if not f.exists()]
    if dangling:
        return "error", f"lead nowhere: {count(dangling, 'link')}; copy or download them again"
    homes = (root, cache)
    outside = [f.name for f in links if not any(f.resolve().is_relative_to(h) for h in homes)]
    if outside:
        return "warning", (
            f"lead out of the folder: {count(outside, 'link')}; to move or publish it, copy it "
            "with `cp -rL`"
        )
    return "ok", f"{len(links)} links, none leads out" if links else "no links"


def _ask_leftovers(folder: Folder) -> Answer:
    path = folder.path.resolve()
    work = path.with_name(f"{path.name}.work")
    parts = [f.name for f in path.rglob(".*.partial")]
    parts += [f.name for f in path.parent.glob(".*.partial") if path.name[:32] in f.name]
    if work.exists():
        return "warning", (
            f"{work} holds an unfinished job, or the rest of one: add --resume to its command, or "
            "remove the folder"
        )
    if parts:
        return "warning", f"a killed process was writing {count(sorted(parts), 'file')}; remove it"
    return "ok", "nothing of an unfinished job in it or beside it"


def _ask_ranks(folder: Folder) -> Answer:
    against = {ranks: "; ".join(_against(folder, ranks)) for ranks in RANKS}
    possible = ", ".join(str(ranks) for ranks, reasons in against.items() if not reasons)
    first = next((f"; with {n}: {reasons}" for n, reasons in against.items() if reasons), "")
    if against[1]:
        return "error", f"not even one rank: {against[1]}; compress with a smaller --group-size"
    remedy = ". --enable-expert-parallel gives each rank whole ones" if "expert" in first else ""
    return "ok", f"--tensor-parallel-size {possible}{first}{remedy}"


def _against(folder: Folder, ranks: int) -> Iterator[str]:
    """What keeps a model from being split over so many ranks."""
    skeleton, group = folder.skeleton, folder.config.group_size
    heads = int(skeleton.text_config.num_attention_heads)
    if heads % ranks:
        yield f"{heads} attention heads"
    if skeleton.expert_width % (ranks * group["w2"]):
        yield f"an expert's {skeleton.expert_width} columns are in groups of {group['w2']}"
    if folder.config.dense_bits == DENSE_WIDTH:
        for name in folder.layout.dense_weights(skeleton.moe_layers[0]):
            columns = skeleton.shapes[folder.layout.parameter(name)][1]
            if name.endswith(SPLIT_INPUTS) and columns % (ranks * group["dense"]):
                yield f"{name} has {columns} columns in groups of {group['dense']}"


def _ask_memory(folder: Folder) -> Answer:
    import torch

    needed = folder.checkpoint.nbytes
    if not torch.cuda.is_available():
        free = _available_memory()
        said = f"the weights take {size(needed)}, {size(free)} of main memory are free"
        if free < needed:
            return "warning", f"{said}: serve it on a machine with more"
        return "ok", said
    free = min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    said = f"the weights take {size(needed)}, {size(free)} of a GPU are free"
    ranks = -(-needed // int(free * USABLE))
    if ranks > 1:
        return "warning", f"{said}: use --tensor-parallel-size, {ranks} or more, or end what runs"
    return "ok", said


def _available_memory() -> int:
    lines = MEMORY_FILE.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


FILES, SETTINGS, ARCHITECTURE, TENSORS = "files", "settings", "architecture", "tensors"
CHECKS = (
    Check(FILES, _ask_files),
    Check(SETTINGS, _ask_settings, (FILES,)),
    Check(ARCHITECTURE, _ask_architecture, (FILES,)),
    Check(TENSORS, _ask_tensors, (SETTINGS, ARCHITECTURE)),
    Check("manifest", _ask_manifest),
    Check("hashes and scales", _ask_content, (TENSORS, "manifest")),
    Check("numbers", _ask_numbers, (FILES,)),
    Check("pruning", _ask_pruning, (SETTINGS, ARCHITECTURE)),
    Check("tokenizer", _ask_tokenizer, (ARCHITECTURE,)),
    Check("chat template", _ask_chat_template, ("tokenizer",)),
    Check("links", _ask_links),
    Check("leftovers", _ask_leftovers),
    Check("ranks", _ask_ranks, (SETTINGS, ARCHITECTURE)),
    Check("memory", _ask_memory, (FILES,)),
)
