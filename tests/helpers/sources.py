"""Quantized originals made by hand, and what their codes and scales mean, number by number."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 128


def e4m3(code: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; subnormals where the former are
    zero."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    return sign * (
        mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 3), code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if not exponent else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def low_first(word: int, codes: int) -> list[int]:
    """The codes of 4 bits in an integer."""
    return [word >> 4 * i & 15 for i in range(codes)]


def scaled(numbers: list[list[float]], scale: list[list[float]], rows: int, columns: int):
    """numbers [N, K] times the scale of the block that each is in; float64, exact for scales of
    float32."""
    found = [
        [value * scale[i // rows][j // columns] for j, value in enumerate(row)]
        for i, row in enumerate(numbers)
    ]
    return torch.tensor(found, dtype=torch.float64)


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [N, K] in codes and a scale for each 128 x 128 block, the last ones smaller."""
    n, k = (-(-size // BLOCK) for size in weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def from_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The inverse, in float32."""
    found = codes.float()
    for i, j in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
        found[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j]
    return found


def make_fp8_pair(source: Path, folder: Path) -> tuple[Path, Path]:
    """A 16-bit model with the matrices of its layers, but for routers, in fp8; and the same
    numbers stored in 16 bits."""
    tensors = load_file(source / "model.safetensors")
    quantized, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".layers." in name and weight.dim() == 2 and not name.endswith("gate.weight"):
            codes, scale = to_fp8(weight)
            quantized |= {name: codes, f"{name}_scale_inv": scale}
            plain[name] = from_fp8(codes, scale).to(weight.dtype)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    made = folder / "fp8", folder / "plain"
    for path, held, extra in zip(
        made, (quantized, plain), ({"quantization_config": settings}, {}), strict=True
    ):
        shutil.copytree(source, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    return made


def write_source(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A folder that `open_checkpoint` opens; no model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
