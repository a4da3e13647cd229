"""The order of the package's rooms: a room imports only from itself and from rooms above it in the list.

This list is a good place to start reading.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest_kld

PACKAGE = Path(pytest_kld.__file__).parent
ROOMS = (
    "errors",  # what can go wrong
    "plain",  # text from outside, made safe to show
    "files",  # files that are written completely or not at all
    "progress",  # progress messages of long work
    "subjects",  # what is measured: models and their identity
    "text",  # text, token ids, windows
    "kernel",  # hidden states to logits, logits to figures per position
    "servers",  # child processes, GPU leases; knows nothing about KLD
    "hook",  # what runs inside a server
    "engines",  # what runs a model over windows
    "throughput",  # how fast a model is served
    "captures",  # a model's outputs, on disk
    "figures",  # two captures to figures
    "gate",  # limits, verdicts, results
    "diagnosis",  # figures to known faults
    "report",  # results to terminal, JUnit, JSON, HTML, Markdown
    "gate_only",  # the built-in gate, a module that pytest can be pointed at
    "settings",  # what the user asked for: options, engines, Subjects
    "suites",  # suite files to settings and Subjects
    "collecting",  # which tests are gated, of what, and those that a session adds
    "measuring",  # a session's captures, scores, floors, matrices, speed
    "session",  # fixtures, gated tests while they run, results, the plan
    "command",  # the console command
    "plugin",  # pytest's hooks
)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import from the package, including those for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pytest_kld":
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "pytest_kld")


def room_of(module: str) -> str | None:
    """Return the room of a module's dotted name; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def module_of(path: Path) -> str:
    return ".".join(("pytest_kld", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_every_module_is_in_a_room() -> None:
    outside = [path.name for path in PACKAGE.glob("*.py") if path.stem not in (*ROOMS, "__init__")]
    folders = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file() and path.name not in ROOMS]
    assert not outside + folders


def test_imports_point_down_the_list() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}: {room} may not know {other}"
        for path in PACKAGE.rglob("*.py")
        for line, name in imports_of(path)
        if (room := room_of(module_of(path))) and (other := room_of(name)) and ROOMS.index(other) > ROOMS.index(room)
    ]
    assert not wrong, "imports that go the wrong way:\n" + "\n".join(wrong)


def test_what_engines_share_knows_no_engine() -> None:
    """An engine is its own folder and its module of seams; servers and hooks in general import neither."""
    shared = [*(PACKAGE / "engines" / "served").glob("*.py"), *(PACKAGE / "hook").glob("*.py")]
    own = {*(PACKAGE / "hook").glob("vllm*.py"), *(PACKAGE / "hook" / f"{name}.py" for name in ("sglang", "patching"))}
    for path in set(shared) - own:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        named = [name for _, name in imports_of(path)]
        assert not [name for name in (*modules, *named) if "sglang" in name or "vllm" in name], path


def test_modules_import_each_other_in_no_circle() -> None:
    modules = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    known = {
        module: {name if name in modules else name.rpartition(".")[0] for _, name in imports_of(path)} - {module}
        for module, path in modules.items()
    }
    left = dict(known)
    while free := [module for module, names in left.items() if not names & left.keys() - {"pytest_kld"}]:
        for module in free:
            del left[module]
    assert not left, f"these modules import each other in a circle, or something that does: {sorted(left)}"
