"""`pytest-kld patch`: the capture hook for SGLang releases that have no plugins."""

from __future__ import annotations

from pathlib import Path

import click

from pytest_kld.command.output import Exit, print_lines
from pytest_kld.hook.patching import Installation, State

_CHECK_EXIT_CODES = {
    State.NOTHING_TO_PATCH: Exit.IN_ORDER,
    State.PATCHED: Exit.IN_ORDER,
    State.NOT_PATCHED: Exit.NOT_IN_ORDER,
    State.MODIFIED: Exit.FAILED,
}


@click.command(
    epilog="Exit codes of --check: 0 if SGLang is patched or needs no patch, 1 if it is not patched, 2 if the file to "
    "patch has other changes or there is no supported SGLang. Exit codes of --apply and --revert: 0 if they succeeded "
    "or had nothing to do, 2 if they failed, in which case nothing was changed."
)
@click.option("--check", "action", flag_value="check", help="Report whether SGLang is patched.")
@click.option("--apply", "action", flag_value="apply", help="Patch SGLang.")
@click.option("--revert", "action", flag_value="revert", help="Restore the file as it was released.")
@click.option(
    "--sglang",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="The package's directory, or the site-packages that holds it. Default: the SGLang of this interpreter.",
)
@click.pass_context
def patch(context: click.Context, action: str | None, sglang: Path | None) -> None:
    """Add the capture hook to an SGLang release that has no plugins.

    These are SGLang 0.5.7 to 0.5.10.post1. Newer releases need no patch. The hook does nothing unless
    PYTEST_KLD_CAPTURE_DIR names a directory.
    """
    if action is None:
        raise click.UsageError("give --check, --apply or --revert")
    found = Installation.find(sglang)
    what = f"SGLang {found.release} in {found.root}"
    if found.patch is None:
        print_lines([f"{what} {State.NOTHING_TO_PATCH.value}."])
    elif action == "check":
        state = found.state()
        print_lines([f"{what} {state.value}: {found.target}"])
        context.exit(_CHECK_EXIT_CODES[state])
    elif action == "apply":
        print_lines([f"{what} {'is patched now' if found.apply() else 'was already patched'}."])
    else:
        print_lines([f"{what} {'is restored to its released state' if found.revert() else 'was not patched'}."])
