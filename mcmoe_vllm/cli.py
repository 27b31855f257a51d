"""`mcmoe`: parse -> call -> render. Results go to stdout, talk to stderr; exit codes are honest:
0 done, 1 a check failed, 2 the user's input cannot be used, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcmoe_vllm import __version__
from mcmoe_vllm.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished layers are kept, add --resume to continue", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mcmoe", description="Compress Mixture-of-Experts models; serve them with vLLM."
    )
    parser.add_argument("--version", action="version", version=f"mcmoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_plan(commands)
    _add_allocate(commands)
    _add_calibrate_pruning(commands)
    _add_inspect(commands)
    _add_eval(commands)
    _add_doctor(commands)
    return parser


def _command(commands, name, run, summary, example):  # type: ignore[no-untyped-def]
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    """What `quantize` and `plan` share."""
    parser.add_argument("model", metavar="MODEL", help="a local folder or a Hugging Face Hub name")
    target = parser.add_argument_group("target")
    target.add_argument(
        "--bits",
        type=float,
        default=2.5,
        help="average width over expert weights, scales and zeros not counted (default 2.5)",
    )
    target.add_argument(
        "--scope",
        choices=("layer", "global"),
        help="one budget per layer, as in the paper, or one over all layers",
    )
    target.add_argument(
        "--candidate-bits",
        type=_integers,
        metavar="1,2,3",
        help="widths to choose from, out of 0 (dropped) to 4 (default: of the recipe)",
    )
    target.add_argument("--group-size", type=int, default=128, help="32, 64 or 128 (default)")
    target.add_argument(
        "--dense-bits", type=int, default=4, help="attention and shared experts: 4 (default) or 16"
    )
    target.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PATTERN=BITS",
        help="fix widths, e.g. 'layers.0.*=3' or 'layers.*.experts.5=1'; may be repeated",
    )
    recipe = parser.add_argument_group("recipe; its traits change one by one with the other flags")
    recipe.add_argument(
        "--recipe",
        choices=("best", "paper"),
        help="best: the most accurate (default); paper: as MC-MoE was published",
    )
    for name, meaning in (
        ("alpha", "frequency"),
        ("beta", "routing weight"),
        ("gamma", "reconstruction error"),
    ):
        recipe.add_argument(f"--{name}", type=float, help=f"exponent of the {meaning}")
    recipe.add_argument(
        "--method", choices=("gptq", "rtn"), help="error compensation, or rounding to nearest"
    )
    recipe.add_argument(
        "--tuning-passes",
        type=int,
        help="passes over the calibration text that tune scales, norms and routers; 0 = none",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        default="allenai/c4",
        metavar="SOURCE",
        help="FILE.jsonl (field text), FILE.txt or a Hub dataset (default: C4 from the Hub)",
    )
    calibration.add_argument("--samples", type=int, default=128, help="windows of text")
    calibration.add_argument(
        "--sequence-length",
        type=int,
        help="tokens in a window (default: 2048 or the model's maximum)",
    )
    calibration.add_argument("--seed", type=int, default=0)
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    running.add_argument(
        "--work-dir", help="unfinished work lives here (default: beside the output)"
    )
    running.add_argument("--resume", action="store_true", help="continue an interrupted job")
    running.add_argument("--revision", help="branch, tag or commit of a Hub model")
    running.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="DANGER: run code that comes with the model's tokenizer",
    )


def _options(parsed: argparse.Namespace, plan: str | None):  # type: ignore[no-untyped-def]
    from mcmoe_vllm.compress.options import QuantizeOptions

    return QuantizeOptions(
        model=parsed.model,
        output=parsed.output,
        bits=parsed.bits,
        recipe=parsed.recipe,
        scope=parsed.scope,
        group_size=parsed.group_size,
        candidate_bits=parsed.candidate_bits,
        dense_bits=parsed.dense_bits,
        calibration=parsed.calibration,
        samples=parsed.samples,
        sequence_length=parsed.sequence_length,
        method=parsed.method,
        alpha=parsed.alpha,
        beta=parsed.beta,
        gamma=parsed.gamma,
        tuning_passes=parsed.tuning_passes,
        pins=tuple(parsed.pin),
        plan=plan,
        target_drop=getattr(parsed, "target_drop", None),
        device=parsed.device,
        seed=parsed.seed,
        work_dir=parsed.work_dir,
        resume=parsed.resume,
        revision=parsed.revision,
        trust_remote_code=parsed.trust_remote_code,
    )


def _add_quantize(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "quantize",
        _run_quantize,
        "Compress a model into a folder that vLLM serves.",
        "mcmoe quantize mistralai/Mixtral-8x7B-Instruct-v0.1 -o mixtral-2.5bit --bits 2.5",
    )
    _add_measuring_flags(parser)
    parser.add_argument("-o", "--output", required=True, help="folder to write; absent or empty")
    parser.add_argument("--plan", help="use the widths of this plan.json; nothing is measured")
    parser.add_argument(
        "--target-drop",
        type=float,
        metavar="SHARE",
        help="also calibrate online pruning: this share of expert activations is dropped when "
        "serving (default: no pruning; `mcmoe calibrate-pruning` adds it later)",
    )
    parser.add_argument("--json", action="store_true", help="print report.json to stdout")


def _run_quantize(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.compress.pipeline import quantize

    result = quantize(_options(parsed, parsed.plan))
    if parsed.json:
        print(json.dumps(result, indent=2))


def _add_plan(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "plan",
        _run_plan,
        "Measure a model and choose the widths; write plan.json and stop.",
        "mcmoe plan mistralai/Mixtral-8x7B-Instruct-v0.1 -o plan.json --bits 2.5",
    )
    _add_measuring_flags(parser)
    parser.add_argument("-o", "--output", default="plan.json", help="file to write (plan.json)")
    parser.add_argument(
        "--sweep",
        type=_numbers,
        metavar="1.5,2,3",
        help="print the KL that each of these averages is expected to cost; write no plan",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also draw what --sweep prints")


def _run_plan(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.compress.pipeline import plan, sweep
    from mcmoe_vllm.disk import explain_os_errors, require_parent
    from mcmoe_vllm.report.plots import write_sweep

    if parsed.plot is not None:
        if not parsed.sweep:
            raise UserError("--plot draws what --sweep prints; give --sweep 1.5,2,2.5,3 too")
        require_parent(Path(parsed.plot))
    if parsed.sweep:
        points = sweep(_options(parsed, None), parsed.sweep)
        print(" bits  expected KL (nats per token, before tuning)")
        for bits, divergence in points:
            print(f"{bits:5.2f}  {divergence:.4f}")
        if parsed.plot is not None:
            with explain_os_errors(f"writing {parsed.plot}"):
                write_sweep(points, Path(parsed.plot))
        return
    plan(_options(parsed, None))
    print(parsed.output)


def _add_allocate(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "allocate",
        _run_allocate,
        "Choose widths from a file of measured factors alone.",
        "mcmoe allocate factors.json --scope layer --layer-budget 14 -o bits.json",
    )
    parser.add_argument("factors", metavar="FACTORS.json")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--layer-budget", type=int, help="bits summed over a layer's experts")
    parser.add_argument("--total-budget", type=int, help="bits summed over all layers")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=1.5)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--pin", action="append", default=[], metavar="PATTERN=BITS")


def _run_allocate(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.allocate.pmq import allocate_file

    result = allocate_file(
        parsed.factors,
        parsed.output,
        scope=parsed.scope,
        layer_budget=parsed.layer_budget,
        total_budget=parsed.total_budget,
        alpha=parsed.alpha,
        beta=parsed.beta,
        gamma=parsed.gamma,
        pins=parsed.pin,
    )
    for layer, row in enumerate(result.bits):
        print(f"{layer:4d} {''.join(map(str, row))}")
    print(f"objective {result.objective:.6g}, {result.seconds:.2f} s", file=sys.stderr)


def _add_calibrate_pruning(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "calibrate-pruning",
        _run_calibrate_pruning,
        "Calibrate online pruning of a compressed checkpoint; serving then prunes by default.",
        "mcmoe calibrate-pruning mixtral-2.5bit --text calibration.jsonl --target-drop 0.15",
    )
    parser.add_argument("model", metavar="DIR", help="a folder made by `mcmoe quantize`")
    parser.add_argument("--text", required=True, metavar="FILE", help="calibration text")
    parser.add_argument(
        "--target-drop",
        type=float,
        default=0.15,
        help="share of expert activations to drop, up to 0.5 (default 0.15)",
    )
    parser.add_argument(
        "--rule",
        choices=("sensitivity", "median"),
        default="sensitivity",
        help="least measured KL (default), or the paper's median of every layer",
    )
    parser.add_argument("--samples", type=int, default=64, help="windows of text (default 64)")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")


def _run_calibrate_pruning(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.pruning.calibration import calibrate_checkpoint

    table = calibrate_checkpoint(
        parsed.model,
        parsed.text,
        target_drop=parsed.target_drop,
        rule=parsed.rule,
        samples=parsed.samples,
        sequence_length=parsed.sequence_length,
        device=parsed.device,
        trust_remote_code=parsed.trust_remote_code,
    )
    print("layer  drop below this share of a token's largest weight")
    for layer, ratio in table.layer_ratios().items():
        print(f"{layer:5d}  {ratio:.4f}")


def _add_inspect(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "inspect",
        _run_inspect,
        "Show what a compressed checkpoint holds, from its headers.",
        "mcmoe inspect mixtral-2.5bit --check",
    )
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--check", action="store_true", help="verify shapes, widths and hashes")
    parser.add_argument("--heatmap", metavar="FILE.png", help="write bits by layer and expert")
    parser.add_argument("--json", action="store_true")


def _run_inspect(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.disk import explain_os_errors, require_parent
    from mcmoe_vllm.inspection import inspect_checkpoint, print_inspection
    from mcmoe_vllm.report.plots import write_bits_heatmap

    if parsed.heatmap:
        require_parent(Path(parsed.heatmap))
    found = inspect_checkpoint(parsed.model, check=parsed.check)
    if parsed.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(found)
    if parsed.heatmap:
        name = found.path.absolute().name
        with explain_os_errors(f"writing {parsed.heatmap}"):
            pairs = list(found.pairs().values())
            write_bits_heatmap(found.layers, pairs, Path(parsed.heatmap), name)
    if parsed.check:
        print("all checks passed", file=sys.stderr)


def _add_eval(commands) -> None:  # type: ignore[no-untyped-def]
    parser = _command(
        commands,
        "eval",
        _run_eval,
        "Measure perplexity, KL divergence to a base model, and scores on tasks.",
        "mcmoe eval mixtral-2.5bit --against mistralai/Mixtral-8x7B-v0.1 --text eval.jsonl",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--against", metavar="BASE", help="the original model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="text to predict, .jsonl or plain")
    what.add_argument(
        "--tasks",
        type=_words,
        metavar="NAME,...",
        help="tasks of lm-evaluation-harness, scored through vLLM",
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--windows", type=int, default=256, help="windows to score (default 256)")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument(
        "--pruning",
        type=_switch,
        metavar="on|off|SHARE",
        help="online pruning (default: on if the checkpoint is calibrated, as in serving)",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question")
    tasks.add_argument("--limit", type=float, help="documents of each task (below 1: a share)")
    tasks.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own")
    tasks.add_argument(
        "--engine-args",
        type=_object,
        metavar="JSON",
        help="""further arguments of vLLM, such as '{"gpu_memory_utilization": 0.8}'""",
    )


def _run_eval(parsed: argparse.Namespace) -> None:
    from mcmoe_vllm.disk import write_json

    if parsed.tasks:
        from mcmoe_vllm.evaluate.tasks import evaluate_tasks, print_scores

        scores = evaluate_tasks(
            parsed.model,
            parsed.tasks,
            against=parsed.against,
            num_fewshot=parsed.num_fewshot,
            limit=parsed.limit,
            include_path=parsed.include_path,
            pruning=parsed.pruning,
            engine=parsed.engine_args,
            trust_remote_code=parsed.trust_remote_code,
        )
        print_scores(parsed.model, scores, parsed.against)
        if parsed.json:
            write_json(parsed.json, [score.to_dict() for score in scores])
        return
    from mcmoe_vllm.evaluate.perplexity import evaluate, print_evaluation

    result = evaluate(
        parsed.model,
        parsed.text,
        against=parsed.against,
        engine=parsed.engine,
        windows=parsed.windows,
        sequence_length=parsed.sequence_length,
        pruning=parsed.pruning,
        device=parsed.device,
        trust_remote_code=parsed.trust_remote_code,
    )
    print_evaluation(result)
    if parsed.json:
        write_json(parsed.json, result.to_dict())


def _add_doctor(commands) -> None:  # type: ignore[no-untyped-def]
    _command(
        commands,
        "doctor",
        _run_doctor,
        "Check versions, GPU, solver and whether vLLM sees the plugin.",
        "mcmoe doctor",
    )


def _run_doctor(parsed: argparse.Namespace) -> int:
    from mcmoe_vllm.doctor import has_errors, print_findings, run_doctor

    findings = run_doctor()
    print_findings(findings)
    return int(has_errors(findings))


def _switch(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,2,3") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1.5,2,3") from None


if __name__ == "__main__":
    sys.exit(main())
