"""What every command of `mcmoe` can be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from mcmoe_vllm import __version__
from mcmoe_vllm.compress.options import DECIDED_BY_PLAN, QuantizeOptions, plan_decides
from mcmoe_vllm.errors import UserError, brief
from mcmoe_vllm.flags import add_flags, flag_name, json_object, numbers, share_or_word, words


@dataclass(frozen=True)
class Contradiction:
    """Flags of a command that mean nothing, or another thing, beside one of its flags.

    why: says what to do, given the flags that contradict it.
    """

    command: str
    flag: str
    others: Sequence[str]
    why: Callable[[Sequence[str]], str]


def _beside(flag: str, reason: str) -> Callable[[Sequence[str]], str]:
    return lambda names: f"{_flags(names)} cannot be given with {flag}: {reason}"


CONTRADICTIONS = (
    Contradiction("quantize", "plan", DECIDED_BY_PLAN, plan_decides),
    Contradiction(
        "plan",
        "sweep",
        ("output", "bits", "pins", "work_dir", "resume"),
        _beside("--sweep", "it prints what averages cost and writes no plan"),
    ),
    Contradiction(
        "eval",
        "tasks",
        ("windows", "sequence_length", "device"),
        _beside("--tasks", "the tasks bring their own text, and vLLM runs the model"),
    ),
    Contradiction(
        "eval",
        "text",
        ("num_fewshot", "limit", "include_path", "engine_args"),
        _beside("--text", "they are about --tasks"),
    ),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What a command line asks for: its `command`, and of the flags those that were given.

    Raises UserError for flags that contradict each other, all of them named.
    """
    parsed = build_parser().parse_args(arguments)
    given = set(vars(parsed))
    wrong = [
        row.why(both)
        for row in CONTRADICTIONS
        if row.command == parsed.command and row.flag in given
        if (both := [name for name in row.others if name in given])
    ]
    if parsed.command == "eval" and "tasks" in given:
        wrong += ["--engine is transformers, but vLLM runs --tasks"] * (
            getattr(parsed, "engine", "vllm") != "vllm"
        )
    if parsed.command == "plan" and "plot" in given and "sweep" not in given:
        wrong.append("--plot draws what --sweep prints; give --sweep 1.5,2,2.5,3 too")
    if wrong:
        raise UserError("\n".join(wrong))
    if parsed.command == "plan" and "output" not in given:
        parsed.output = "plan.json"
    return parsed


def _flags(names: Sequence[str]) -> str:
    return ", ".join({"output": "-o", "pins": "--pin"}.get(n, flag_name(n)) for n in names)


class _Parser(argparse.ArgumentParser):
    """Says in a brief way what it cannot read; a value may be long."""

    def error(self, message: str) -> NoReturn:
        super().error(brief(message))


def build_parser() -> argparse.ArgumentParser:
    """The parser of `mcmoe`; what it parses names its `command`."""
    parser = _Parser(
        prog="mcmoe", description="Compress Mixture-of-Experts models; serve them with vLLM."
    )
    parser.add_argument("--version", action="version", version=f"mcmoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_arguments, summary, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"Example:\n  mcmoe {name}{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,  # so that what is parsed was given
        )
        add_arguments(command)
        command.set_defaults(command=name)
    return parser


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hugging Face Hub name")
    parser.add_argument("-o", "--output", required=True, help="folder to write; absent or empty")
    parser.add_argument("--json", action="store_true", help="print report.json to stdout")
    add_flags(parser, QuantizeOptions)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hugging Face Hub name")
    parser.add_argument("-o", "--output", help="file to write (plan.json)")
    parser.add_argument(
        "--sweep",
        type=numbers,
        metavar="1.5,2,3",
        help="print the KL that each of these averages is expected to cost; write no plan",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also draw what --sweep prints")
    add_flags(parser, QuantizeOptions, without=("plan", "target_drop"))


def _add_allocate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("factors_path", metavar="FACTORS.json")
    add("-o", "--output", dest="out_path", metavar="FILE", required=True)
    add("--scope", choices=("layer", "global"), help="of a budget: layer (default) or global")
    add("--layer-budget", type=int, help="bits summed over a layer's experts")
    add("--total-budget", type=int, help="bits summed over all layers")
    add("--alpha", type=float, help="exponent of the frequency (default 1)")
    add("--beta", type=float, help="exponent of the routing weight (default 1.5)")
    add("--gamma", type=float, help="exponent of the reconstruction error (default 1)")
    add("--pin", action="append", dest="pins", metavar="PATTERN=BITS")


def _add_calibrate_pruning(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="a folder made by `mcmoe quantize`")
    add("--text", required=True, metavar="FILE", help="calibration text")
    add(
        "--target-drop",
        type=float,
        help="share of expert activations to drop, up to 0.5 (default 0.15)",
    )
    add(
        "--rule",
        choices=("sensitivity", "median"),
        help="least measured KL (default), or the paper's median of every layer",
    )
    add("--samples", type=int, help="windows of text (default 64)")
    _add_running(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--check", action="store_true", help="verify shapes, widths and hashes")
    parser.add_argument("--heatmap", metavar="FILE.png", help="write bits by layer and expert")
    parser.add_argument("--json", action="store_true")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--against", metavar="BASE", help="the original model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="text to predict, .jsonl or plain")
    what.add_argument(
        "--tasks",
        type=words,
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness, scored through vLLM",
    )
    add = parser.add_argument
    add("--engine", choices=("transformers", "vllm"), help="what runs the model (transformers)")
    add("--windows", type=int, help="windows to score (default 256)")
    add(
        "--pruning",
        type=share_or_word,
        metavar="on|off|SHARE",
        help="online pruning (default: on if the checkpoint is calibrated, as in serving)",
    )
    _add_running(parser)
    add("--json", metavar="FILE", help="also write the figures as JSON")
    add = parser.add_argument_group("with --tasks").add_argument
    add("--num-fewshot", type=int, help="examples before each question")
    add("--limit", type=float, help="documents of each task (below 1: a share)")
    add("--include-path", metavar="DIR", help="a folder with tasks of your own")
    add(
        "--engine-args",
        type=json_object,
        metavar="JSON",
        help="""further arguments of vLLM, such as '{"gpu_memory_utilization": 0.8}'""",
    )


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--self-test", metavar="DIR", help="instead: what holds for a compressed folder here"
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequence-length", type=int, help="tokens in a window")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--trust-remote-code", action="store_true")


# Name -> what adds its flags, a summary, and an example of what follows the name.
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str, str]] = {
    "quantize": (
        _add_quantize,
        "Compress a model into a folder that vLLM serves.",
        " mistralai/Mixtral-8x7B-Instruct-v0.1 -o mixtral-2.5bit --bits 2.5",
    ),
    "plan": (
        _add_plan,
        "Measure a model and choose the widths; write plan.json and stop.",
        " mistralai/Mixtral-8x7B-Instruct-v0.1 -o plan.json --bits 2.5",
    ),
    "allocate": (
        _add_allocate,
        "Choose widths from a file of measured factors alone.",
        " factors.json --scope layer --layer-budget 14 -o bits.json",
    ),
    "calibrate-pruning": (
        _add_calibrate_pruning,
        "Calibrate online pruning of a compressed checkpoint; serving then prunes by default.",
        " mixtral-2.5bit --text calibration.jsonl --target-drop 0.15",
    ),
    "inspect": (
        _add_inspect,
        "Show what a compressed checkpoint holds, from its headers.",
        " mixtral-2.5bit --check",
    ),
    "eval": (
        _add_eval,
        "Measure perplexity, KL divergence to a base model, and scores on tasks.",
        " mixtral-2.5bit --against mistralai/Mixtral-8x7B-v0.1 --text eval.jsonl",
    ),
    "doctor": (
        _add_doctor,
        "Check versions, GPU, solver and whether vLLM sees the plugin.",
        " --self-test mixtral-2.5bit",
    ),
}
