"""Who may import whom: floor by floor, always downwards, over the syntax trees; files stay short; no torch for --help."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import distill_cli
from distill_cli.methods.registry import METHODS

PACKAGE = Path(distill_cli.__file__).parent
FLOORS = [
    {"errors"},
    {"files", "messages", "processes"},
    {"config", "locks", "registry"},
    {"methods.config"},
    {"commands"},
    {"recipes", "tensors"},
    {"diffusion", "shards", "verified"},
    {"data", "launch", "runs"},
    {"models"},
    {"pairs", "publish", "sample", "edit", "watch"},
    {"training", "evaluate"},
    {"methods", "trace"},
    {"bench"},
    {"cli"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
NO_TORCH = {"errors", "files", "messages", "processes", "locks", "config", "registry", "methods.config", "commands", "recipes"}
NO_TORCH |= {"runs", "publish", "verified", "watch", "cli"}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py")


def room_of(parts):
    """The room of a module's names inside the package; of methods the registry and each config.py stand on low floors of their own."""
    if parts[0] == "methods" and "registry" in parts[1:2]:
        return "registry"
    return "methods.config" if parts[0] == "methods" and "config" in parts[2:3] else parts[0]


COMMAND_OF = {method.config.split(".")[0]: method.command for method in METHODS}
"""The command of each method's room."""


def room(path):
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path, top_only=False):
    """Modules that a file imports; `top_only` leaves out function bodies and TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    mine = room(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "distill_cli" or len(parts) == 1 or parts[1] not in FLOOR:
            continue
        other = room_of(parts[1:])
        assert other == mine or FLOOR[other] < FLOOR[mine], f"{mine} imports {other}"
        if mine == "methods.config" and parts[1] == "methods":
            assert COMMAND_OF.get(parts[2]) == COMMAND_OF[path.parent.name], "a method's options know those of its own command alone"
        if mine == "methods" and other == "pairs":
            assert len(parts) < 3 or parts[2] == "store", "methods know the store alone"
        assert not (mine in ("methods", "training") and other in ("sample", "edit"))


def test_no_circle_of_files():
    """Deferred imports are counted, those for type checkers alone are not; a package stands for its __init__.py."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = {name: set() for name in names}
    for name, path in names.items():
        todo = [ast.parse(path.read_text())]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.ImportFrom):
                found = (f"{node.module}.{alias.name}" for alias in node.names)
                graph[name] |= {whole if whole in names else node.module for whole in found} & names.keys()
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
                todo += ast.iter_child_nodes(node)
    assert graph["distill_cli.cli.app"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in NO_TORCH], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_low_floors_and_cli_import_no_torch_at_the_top(path):
    heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy"}
    assert not {module.split(".")[0] for module in imports(path, top_only=True)} & heavy


def test_diffusion_knows_only_torch():
    for path in FILES:
        if room(path) == "diffusion":
            outside = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - {"distill_cli", "torch"}
            assert outside <= ({"numpy"} if path.stem == "noise" else set())


@pytest.mark.parametrize("command", [["--help"], ["dmd", "--help"], ["recipes", "ls"], ["recipes", "check", "demo-dmd"], ["models", "ls"]])
def test_help_needs_no_torch(command):
    code = (
        "import sys; from distill_cli.cli.app import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)


@pytest.mark.parametrize(("command", "most"), [([], 0.35), (["dmd"], 0.7), (["cm"], 0.7), (["sample"], 0.7)])
def test_help_takes_little_cpu(command, most):
    """Seconds of CPU time; a torch import alone takes more, so the bound is no timing test."""
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'distill_cli', *sys.argv[1:], '--help'], check=True, stdout=subprocess.DEVNULL);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    )
    run = [sys.executable, "-c", code, *command]
    assert min(float(subprocess.run(run, check=True, capture_output=True, text=True).stdout) for _ in range(3)) < most


def test_help_of_all_commands_imports_no_options():
    code = (
        "import sys; from distill_cli.cli.app import run; run(['--help']);"
        "assert 'pydantic' not in sys.modules and not [name for name in sys.modules if name.endswith('.config')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
