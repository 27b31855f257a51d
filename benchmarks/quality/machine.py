"""What a row of results says of where it was measured."""

import datetime
import platform
import subprocess

import torch

from mcmoe_vllm import __version__


def machine(commit: str | None) -> dict[str, str]:
    """What a figure needs to be understood later."""
    commit = (
        commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "mcmoe": __version__,
        "torch": torch.__version__,
        "commit": commit,
    }
