"""The command `pytest-kld`. Standard library only: it runs in SGLang's environment."""

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
        print(f"{what} {'is patched now' if found.apply() else 'was already patched'}.")
    else:
        print(f"{what} {'is restored to its released state' if found.revert() else 'was not patched'}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pytest-kld", description="Tools for the environment in which SGLang runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    patch = commands.add_parser(
        "patch",
        help="add the capture hook to an SGLang release that has no plugins",
        description="Add the capture hook to SGLang 0.5.7 to 0.5.10.post1. Newer releases need no patch. The hook "
        "does nothing unless PYTEST_KLD_CAPTURE_DIR names a directory.",
        epilog="Exit codes of --check: 0 if SGLang is patched or needs no patch, 1 if it is not patched, 2 if the file "
        "to patch has other changes or there is no supported SGLang. Exit codes of --apply and --revert: 0 if they "
        "succeeded or had nothing to do, 2 if they failed, in which case nothing was changed.",
    )
    action = patch.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("check", "report whether SGLang is patched"),
        ("apply", "patch SGLang"),
        ("revert", "restore the file as it was released"),
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
