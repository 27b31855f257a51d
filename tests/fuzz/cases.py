"""Sound folders, and what every reader makes of a damaged copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.mutants import mutate, mutate_text
from tests.fuzz.outcomes import Outcome, run

QUICK = ("--samples", "2", "--sequence-length", "32", "--group-size", "32", "--recipe", "paper",
         "--method", "rtn", "--bits", "2", "--device", "cpu")  # fmt: skip
SHORT = ("--windows", "2", "--sequence-length", "32", "--device", "cpu")


@dataclass(frozen=True)
class Sound:
    """Whole input: a 16-bit model, what it was compressed to, and a text."""

    source: Path
    compressed: Path
    text: Path


@dataclass(frozen=True)
class Case:
    """One damaged input and what each reader made of it."""

    number: int
    damage: str
    outcomes: dict[str, Outcome]

    @property
    def faults(self) -> list[str]:
        return [f"{reader}: {f}" for reader, o in self.outcomes.items() for f in o.faults]


def try_compressed(sound: Sound, scratch: Path, number: int) -> Case:
    """A damaged compressed folder before everyone who reads one."""
    folder, secret = _copy(sound.compressed, scratch)
    damage = mutate(folder, Random(number))
    commands: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", folder),
        "inspect --check": ("inspect", folder, "--check"),
        "eval": ("eval", folder, "--text", sound.text, *SHORT),
    }
    outcomes = {name: run(command, folder, secret) for name, command in commands.items()}
    outcomes["load"] = _load(folder, secret)
    for reader in ("inspect --check", "load"):
        if outcomes[reader].code == 0 and not same_content(sound.compressed, folder):
            outcomes[reader].faults.append("damaged content accepted")
    return Case(number, damage, outcomes)


def try_source(sound: Sound, scratch: Path, number: int) -> Case:
    """A damaged 16-bit folder before the compressor."""
    folder, secret = _copy(sound.source, scratch)
    damage = mutate(folder, Random(number))
    command = ("plan", folder, "-o", scratch / "plan.json", "--calibration", sound.text, *QUICK)
    outcome = run(command, folder, secret)
    # What weights hold shows when they are read.
    known_before = not damage.startswith("bytes")
    if known_before and outcome.code == 2 and (scratch / "plan.json.work").exists():
        outcome.faults.append("late: refused after the work had begun")
    return Case(number, damage, {"plan": outcome})


def try_plan(sound: Sound, scratch: Path, number: int) -> Case:
    """A damaged plan.json before the compressor."""
    folder = scratch / "plans"
    folder.mkdir()
    secret = _secret(scratch)
    shutil.copyfile(sound.compressed / "plan.json", folder / "plan.json")
    damage = mutate(folder, Random(number), kinds=("json", "text", "file"))
    command = ("quantize", sound.source, "-o", scratch / "out", "--plan", folder / "plan.json",
               "--calibration", sound.text, "--samples", "2", "--sequence-length", "32",
               "--recipe", "paper", "--method", "rtn", "--device", "cpu")  # fmt: skip
    outcome = run(command, folder, secret)
    if outcome.code == 2 and (scratch / "out").exists():
        outcome.faults.append("wrote: refused, and an output is there")
    return Case(number, damage, {"quantize --plan": outcome})


def try_text(sound: Sound, scratch: Path, number: int) -> Case:
    """A damaged text before who reads texts."""
    folder = scratch / "texts"
    folder.mkdir()
    secret = _secret(scratch)
    text = folder / "text.jsonl"
    shutil.copyfile(sound.text, text)
    damage = mutate_text(text, Random(number))
    command = ("eval", sound.compressed, "--text", text, *SHORT)
    return Case(number, damage, {"eval --text": run(command, folder, secret)})


FAMILIES: dict[str, Callable[[Sound, Path, int], Case]] = {
    "compressed": try_compressed,
    "source": try_source,
    "plan": try_plan,
    "text": try_text,
}


def same_content(sound: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, byte for byte."""
    from mcmoe_vllm.checkpoint.files import open_checkpoint

    first, second = open_checkpoint(sound), open_checkpoint(other)
    names = first.names()
    if sorted(names) != sorted(second.names()):
        return False
    pairs = zip(first.read(names).values(), second.read(names).values(), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.equal(b) for a, b in pairs)


def _load(folder: Path, secret: Path) -> Outcome:
    """What `--load-format mcmoe` does before vLLM is given a tensor; needs vLLM."""
    import torch

    from mcmoe_vllm.errors import UserError

    try:
        from mcmoe_vllm.plugin.completeness import open_whole
        from mcmoe_vllm.plugin.loader import ReadCount, read_verified
    except ImportError:
        return Outcome(None, "vLLM is not installed")
    try:
        whole = open_whole(folder, torch.nn.Module())
        if whole.manifest is None:
            return Outcome(2, "no manifest")
        for _ in read_verified(whole, lambda _: False, ReadCount()):
            pass
    except UserError as e:
        return Outcome(2, str(e))
    except Exception as e:
        return Outcome(None, "", [f"traceback: {type(e).__name__}: {str(e)[:200]}"])
    return Outcome(0, "")


def _copy(folder: Path, scratch: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(folder, scratch / "model")), _secret(scratch)


def _secret(scratch: Path) -> Path:
    secret = scratch / "secret"
    secret.write_text("the secret of another folder")
    return secret
