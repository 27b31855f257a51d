"""The house: short files, small folders, imports that run one way, and no object of all trades."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"mcmoe_vllm": ROOT / "mcmoe_vllm", "mcmoe_kernels": ROOT / "kernels" / "mcmoe_kernels"}

MAX_LINES = 500
LONGER: dict[str, int] = {}  # a module and its own limit, beside the reason for it
MAX_FILES = 16
MAX_FUNCTIONS = 10
# Plain data that more functions are about: frozen, and without a verb of its own but reading.
VALUES = {"Folder", "Layout", "QuantizeOptions", "Recipe", "TiledLayer"}


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(p for p in parts if p != "__init__")))] = file
    return found


def imported(tree: ast.AST) -> set[str]:
    """What a file imports of the two packages and of the tests, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            of = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {whole if whole in MODULES else node.module for whole in of.values()}
    return names


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
IMPORTS = {name: (imported(tree) & MODULES.keys()) - {name} for name, tree in TREES.items()}


def rings(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            new = graph[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reach = {module: reached(module) for module in graph}
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted(ring) for ring in found)


def rooms() -> tuple[list[str], set[str]]:
    """The rooms of the compressor in the order of CONTRIBUTING's table, and those that the plugin
    may import by its row."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("The compressor's rooms")[2].partition("The kernels' rooms")[0]
    order: list[str] = []
    plugin: set[str] = set()
    for first, sentence in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        names = [name.rstrip("/") for name in re.findall(r"`(.*?)`", first)]
        if names == ["plugin"]:
            plugin = set(re.findall(r"`(.*?)`", sentence))
        else:
            order += names
    assert order and plugin and plugin <= set(order)
    return order, plugin


def names_in(annotation: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= names_in(ast.parse(node.value, mode="eval"))
    return found


def receivers() -> dict[tuple[str, str], list[str]]:
    """(room, class of the packages) -> functions there that are given one, by their annotations."""
    every = [(module, node) for module, tree in TREES.items() for node in ast.walk(tree)]
    classes = {node.name for _, node in every if isinstance(node, ast.ClassDef)}
    found = defaultdict(list)
    for module, node in every:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            of = [names_in(a.annotation) for a in given if a.annotation is not None]
            for name in set().union(*of) & classes:
                found[".".join(module.split(".")[:2]), name].append(f"{module}.{node.name}")
    return found


def test_files_are_short() -> None:
    lines = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert not {n: count for n, count in lines.items() if count > LONGER.get(n, MAX_LINES)}
    assert not {n for n in LONGER if lines.get(n, 0) <= MAX_LINES}, "no exceptions any more"


def test_folders_are_small() -> None:
    files = defaultdict(list)
    for file in MODULES.values():
        files[file.parent].append(file.name)
    assert not {folder: names for folder, names in files.items() if len(names) > MAX_FILES}


def test_no_import_ring() -> None:
    found = rings(IMPORTS)
    assert not found, "\n".join(map(str, found))


def test_a_ring_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}
    assert rings(graph) == [["a", "b", "c"]]


def test_imports_run_one_way() -> None:
    """In the order of CONTRIBUTING's table. The package itself holds its version alone."""
    assert not IMPORTS["mcmoe_vllm"]
    order, of_plugin = rooms()
    wrong = []
    for module, others in IMPORTS.items():
        for other in others:
            (top, *here), (other_top, *there) = module.split("."), other.split(".")
            if not top == other_top == "mcmoe_vllm" or not there or here[0] == there[0]:
                continue
            before = of_plugin if here[0] == "plugin" else order[: order.index(here[0])]
            if there[0] not in before:
                wrong.append(f"{module} -> {other}")
    assert not wrong, "\n".join(wrong)


def test_no_object_goes_everywhere_in_a_room() -> None:
    found = receivers()
    many = {key: names for key, names in found.items() if len(names) > MAX_FUNCTIONS}
    assert {name for _, name in many} >= VALUES, "no values any more"
    wrong = [f"{key}: {names}" for key, names in many.items() if key[1] not in VALUES]
    assert not wrong, "\n".join(wrong)
