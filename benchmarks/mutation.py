"""Draws a sample of mutants for mutmut, and counts what it found; docs/mutation.md has the commands and the results."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

ROOMS = ("kernel", "figures", "gate", "captures")
KILLED = {1, 3, 24, -24, 36, 152, 255}
"""mutmut's exit codes for a test that failed, and for a run that broke or did not end (`status_by_exit_code`)."""


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
    arguments = parser.parse_args()
    if arguments.command == "report":
        print(report())
    else:
        print(*sample(arguments.room, arguments.count, arguments.seed))


if __name__ == "__main__":
    main()
