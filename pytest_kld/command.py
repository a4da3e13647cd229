"""The command `pytest-kld`. Standard library only: it runs where SGLang runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_kld.errors import PatchError
from pytest_kld.hook.patching import Installation, State

_CHECK_EXIT_CODES = {State.NOTHING_TO_PATCH: 0, State.PATCHED: 0, State.NOT_PATCHED: 1, State.MODIFIED: 2}
_FAILED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        return _patch(given.action, Installation.find(given.sglang))
    except PatchError as error:
        print(f"pytest-kld: {error}", file=sys.stderr)
        return _FAILED


def _patch(action: str, found: Installation) -> int:
    what = f"SGLang {found.release} in {found.root}"
    if found.patch is None:
        print(f"{what} {State.NOTHING_TO_PATCH.value}.")
        return 0
    if action == "check":
        state = found.state()
        print(f"{what} {state.value}: {found.target}")
        return _CHECK_EXIT_CODES[state]
    if action == "apply":
        print(f"{what} {'is patched now' if found.apply() else 'was patched already'}.")
    else:
        print(f"{what} {'is as it was released again' if found.revert() else 'was not patched'}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pytest-kld", description="Helps pytest-kld where SGLang runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    patch = commands.add_parser(
        "patch",
        help="put the capture hook into a SGLang that has no plugins",
        description="Put the capture hook into SGLang 0.5.7 to 0.5.10.post1. Newer releases need no patch. The hook "
        "does nothing unless PYTEST_KLD_CAPTURE_DIR names a directory.",
        epilog="Exit codes of --check: 0 patched or no patch needed, 1 not patched, 2 modified otherwise or no "
        "supported SGLang. The others: 0 done, or nothing to do; 2 nothing was changed.",
    )
    action = patch.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("check", "tell whether it is patched"),
        ("apply", "patch it"),
        ("revert", "restore the file as it was"),
    ):
        action.add_argument(f"--{name}", dest="action", action="store_const", const=name, help=text)
    patch.add_argument(
        "--sglang",
        type=Path,
        metavar="PATH",
        help="the package's directory, or the site-packages that holds it (default: the SGLang of this interpreter)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
