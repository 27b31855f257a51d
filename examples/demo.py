"""The whole product on a small model: compress, evaluate, serve, ask. Run it with `make demo`.

Input: examples/mixtral-6m and the running Python's standard library, as text.
Output: demo-output/ (replaced on every run): the two text files, the compressed model, server.log.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MODEL = Path("examples/mixtral-6m")
OUTPUT = Path("demo-output")
COMPRESSED = OUTPUT / "mixtral-6m-2.5bit"
CALIBRATION = OUTPUT / "calibration.jsonl"
EVALUATION = OUTPUT / "evaluation.jsonl"

CALIBRATION_BYTES = 1_500_000
EVALUATION_BYTES = 1_000_000
LEAST_BYTES = 700_000  # 256 windows of 512 tokens, at up to 4 bytes a token, and some to spare
NO_TEXT = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data",
           "site-packages", "test", "tests", "turtledemo"}  # fmt: skip

PROMPT = "If you want to install the package,"
START_SECONDS = 420


def main() -> None:
    started = time.monotonic()
    os.chdir(ROOT)
    # A terminated demo unwinds like an interrupted one, so that its server is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    step("Text: calibrate and evaluate on disjoint files of Python's standard library")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    files = standard_library()
    write_documents(CALIBRATION, files[0::4], CALIBRATION_BYTES)
    write_documents(EVALUATION, files[2::4], EVALUATION_BYTES)

    step("Compress to 2.5 bits per weight")
    mcmoe("quantize", MODEL, "-o", COMPRESSED, "--bits", "2.5", "--calibration", CALIBRATION)

    step("Evaluate: perplexity before and after")
    mcmoe("eval", COMPRESSED, "--against", MODEL, "--text", EVALUATION)

    step("Serve with vLLM and ask")
    with server(COMPRESSED) as url:
        complete(url, COMPRESSED)

    print(f"\nDone in {time.monotonic() - started:.0f} s. The compressed model is in {COMPRESSED}.")


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def mcmoe(*arguments: str | Path) -> None:
    """Run the command line tool, as a user would; the demo ends where it fails."""
    command = ["mcmoe", *map(str, arguments)]
    print("$", *command, flush=True)
    status = subprocess.run([BIN / command[0], *command[1:]], check=False).returncode
    if status != 0:
        sys.exit(f"demo: `mcmoe {arguments[0]}` failed with exit code {status}")


def standard_library() -> list[Path]:
    """The standard library's modules in a fixed order, without tests and tables."""
    folder = Path(sysconfig.get_path("stdlib"))
    relative = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return [folder / path for path in sorted(relative) if NO_TEXT.isdisjoint(path.parts)]


def write_documents(target: Path, files: list[Path], limit: int) -> None:
    """One JSON line a file, as many whole files as fit into `limit` bytes of text."""
    size = count = 0
    with target.open("w", encoding="utf-8") as out:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            if not text.strip() or size + len(text.encode()) > limit:
                continue
            out.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            count += 1
    if size < LEAST_BYTES:
        sys.exit(f"demo: only {size} bytes of text for {target}, {LEAST_BYTES} are needed")
    print(f"{target}: {count} files, {size / 1e6:.1f} MB")


@contextmanager
def server(model: Path) -> Iterator[str]:
    """`vllm serve` on a free port of this machine: yields its address, always stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["vllm", "serve", str(model), "--quantization", "mcmoe", "--host", "127.0.0.1",
               "--port", str(port), "--max-model-len", "512"]  # fmt: skip
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        command.append("--enforce-eager")  # compiled mode needs a C++ compiler
    print("$", *command, flush=True)

    cache = ROOT / ".cache"
    environment = {
        "HF_HOME": str(cache / "huggingface"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    } | os.environ  # whoever set one of these meant it
    environment |= {"HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    log = OUTPUT / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [BIN / command[0], *command[1:]],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url, log)
        yield url
    finally:
        stop(process)


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    """Return once the server answers; end the demo with its log's tail if it never does."""
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            reason = f"ended with exit code {process.returncode}"
            break
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            print(f"ready after {time.monotonic() - started:.0f} s, log in {log}", flush=True)
            return
        time.sleep(0.5)
    else:
        reason = f"did not answer within {START_SECONDS} s"
    tail = log.read_text(errors="replace").splitlines()[-30:]
    sys.exit("\n".join([*tail, f"demo: the server {reason}; its whole log is {log}"]))


def stop(process: subprocess.Popen) -> None:
    """Ask the server to end, then end whatever is left of its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def complete(url: str, model: Path) -> None:
    """Ask through the OpenAI API and print the answer and its speed."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    request = {"model": str(model), "prompt": PROMPT, "temperature": 0.6, "seed": 0}
    client.completions.create(**request, max_tokens=8)  # the first request warms up
    started = time.monotonic()
    answer = client.completions.create(**request, max_tokens=96)
    seconds = time.monotonic() - started
    print(f"\n{PROMPT}{answer.choices[0].text}\n")
    tokens = answer.usage.completion_tokens
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
