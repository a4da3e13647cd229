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
KILLED = {1, 3, 24, -24, 36, 152}
"""mutmut's exit codes for a test that failed, and for a run that broke or did not end (`status_by_exit_code`)."""
OPEN = {0, 5, 33, 255}
"""The same for tests that all passed, for no test that reaches the mutant, and for ids of tests that pytest refuses."""
LONGEST = 900
"""How many seconds the tests of one mutant may take."""


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


def again(room: str) -> None:
    """Try what no test of a room has killed again, with the tests as they are now, and note what they kill.

    mutmut chooses a mutant after it has imported the modules. Here each has a process of its own, in which it is chosen
    before: code that runs when a module is imported is tried, too. The tests are the room's that name the module, and
    those that mutmut saw reach the function.
    """
    shutil.copytree("tests", "mutants/tests", dirs_exist_ok=True)
    reached = json.loads(Path("mutants/mutmut-stats.json").read_text("utf-8"))["tests_by_mangled_function_name"]
    files = {path: path.read_text("utf-8") for path in sorted(Path("tests", room).glob("test_*.py"))}
    for meta in sorted(Path("mutants/pytest_kld", room).glob("*.meta")):
        found = json.loads(meta.read_text("utf-8"))
        module = meta.name.removesuffix(".py.meta")
        imported = f"pytest_kld.{room}.{module} "
        own = {str(path) for path, text in files.items() if path.stem == f"test_{module}" or imported in text}
        for name, code in found["exit_code_by_key"].items():
            if code in OPEN:
                reaching = reached.get(name.rpartition("__mutmut_")[0], ())
                others = {test.partition("[")[0] for test in reaching if test.split("::")[0] not in own}
                killed = _is_killed(name, [*sorted(own), *sorted(others)])
                print(f"{name}: {'killed' if killed else 'survived'}", flush=True)
                found["exit_code_by_key"][name] = int(killed)
                meta.write_text(json.dumps(found, indent=4), "utf-8")


def _is_killed(name: str, tests: list[str]) -> bool:
    """Tell whether a test fails with a mutant, or does not end."""
    options = ["-x", "-q", "-m", "not slow", "-p", "no:kld", "--hypothesis-profile=unshrunk"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    chosen = {**os.environ, "MUTANT_UNDER_TEST": name}
    try:
        run = subprocess.run(command, cwd="mutants", env=chosen, check=False, capture_output=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return True
    if run.returncode not in {0, 1}:  # such as 4: a test is gone
        raise SystemExit(f"{name}: {run.stdout.decode()}")
    return run.returncode == 1


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
    drawing, trying = commands.add_parser("sample"), commands.add_parser("again")
    for one in (drawing, trying):
        one.add_argument("room", choices=ROOMS)
    drawing.add_argument("count", type=int)
    drawing.add_argument("--seed", type=int, default=0)
    commands.add_parser("report")
    arguments = parser.parse_args()
    if arguments.command == "report":
        print(report())
    elif arguments.command == "again":
        again(arguments.room)
    else:
        print(*sample(arguments.room, arguments.count, arguments.seed))


if __name__ == "__main__":
    main()
