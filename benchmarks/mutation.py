"""Draws mutants for mutmut, tries survivors again, and counts; docs/mutation.md has the commands and the results."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOMS = ("kernel", "figures", "gate", "captures")
KILLED = {1, 3, 24, -24, 36, 152, 255}
"""mutmut's exit codes for a test that failed, and for a run that broke or did not end (`status_by_exit_code`)."""
SURVIVED = {0, 5, 33}
"""The same for tests that all passed, and for no test that reaches the mutant."""


def sample(room: str, count: int, seed: int) -> list[str]:
    """Return the names of some mutants of a room, or of all if it has no more than `count`."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    names = [
        get_mutant_name(path, name)
        for path in sorted(Path("pytest_kld", room).glob("*.py"))
        for name in mutate_file_contents(str(path), path.read_text("utf-8")).mutant_names
    ]
    return random.Random(seed).sample(names, min(count, len(names)))


def again() -> None:
    """Try what no test has killed again, with the tests as they are now, and note what they kill.

    mutmut chooses a mutant after it has imported the modules. Here each has a process of its own, in which it is chosen
    before: code that runs when a module is imported is tried, too. The tests are those that name the module, and those
    that mutmut saw reach the function.
    """
    shutil.copytree("tests", "mutants/tests", dirs_exist_ok=True)
    reached = json.loads(Path("mutants/mutmut-stats.json").read_text("utf-8"))["tests_by_mangled_function_name"]
    for meta in sorted(Path("mutants/pytest_kld").glob("*/*.meta")):
        found = json.loads(meta.read_text("utf-8"))
        module = meta.name.removesuffix(".py.meta")
        files = sorted(Path("tests").glob("*/test_*.py"))
        imported = f"pytest_kld.{meta.parent.name}.{module} "
        own = [str(path) for path in files if path.stem == f"test_{module}" or imported in path.read_text("utf-8")]
        for name, code in found["exit_code_by_key"].items():
            if code not in SURVIVED:
                continue
            tests = [test for test in sorted(reached.get(name.rpartition("__mutmut_")[0], ())) if not _is_in(test, own)]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:kld", *own, *tests]
            run = subprocess.run(
                command, cwd="mutants", env={**os.environ, "MUTANT_UNDER_TEST": name}, check=False, capture_output=True
            )
            if run.returncode not in {0, 1}:  # such as 4: a test that mutmut knows is gone
                raise SystemExit(f"{name}: {run.stdout.decode()}")
            print(f"{name}: {'killed' if run.returncode else 'survived'}", flush=True)
            found["exit_code_by_key"][name] = run.returncode
            meta.write_text(json.dumps(found, indent=4), "utf-8")


def _is_in(test: str, files: list[str]) -> bool:
    return test.partition("::")[0] in files


def report() -> str:
    """Return a table of each room's mutants: how many there are, were tried, were killed by a test, and survived."""
    lines = [f"{'room':<10}{'mutants':>9}{'tried':>8}{'killed':>8}{'survived':>10}{'score':>8}"]
    for room in ROOMS:
        codes: Counter[int | None] = Counter()
        for path in Path("mutants/pytest_kld", room).glob("*.meta"):
            codes.update(json.loads(path.read_text("utf-8"))["exit_code_by_key"].values())
        killed, survived = sum(codes[code] for code in KILLED), codes[0]
        tried = killed + survived
        score = f"{killed / tried:.1%}" if tried else "-"
        lines.append(f"{room:<10}{codes.total():>9,}{tried:>8,}{killed:>8,}{survived:>10,}{score:>8}")
    return "\n".join(lines)


def main() -> None:
    """Run a sub-command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("sample")
    drawing.add_argument("room", choices=ROOMS)
    drawing.add_argument("count", type=int)
    drawing.add_argument("--seed", type=int, default=0)
    commands.add_parser("report")
    commands.add_parser("again")
    arguments = parser.parse_args()
    if arguments.command == "report":
        print(report())
    elif arguments.command == "again":
        again()
    else:
        print(*sample(arguments.room, arguments.count, arguments.seed))


if __name__ == "__main__":
    main()
