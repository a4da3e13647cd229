"""The command `pytest-kld`.

`pytest-kld patch` runs in SGLang's environment, so what is imported here needs no more than click, which servers
install too. Each sub-command imports the rest when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.shell_completion import get_completion_class

from pytest_kld import __version__
from pytest_kld.command.baseline import baseline
from pytest_kld.command.cache import cache
from pytest_kld.command.compare import compare
from pytest_kld.command.doctor import doctor
from pytest_kld.command.import_logprobs import import_logprobs
from pytest_kld.command.init import init
from pytest_kld.command.output import Commands
from pytest_kld.command.patch import patch
from pytest_kld.command.report import report

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMPLETE = "_PYTEST_KLD_COMPLETE"
"""The environment variable through which a shell asks for completions; click derives it from the command's name."""


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 if everything is in order, 1 if something is not (a gate failed, an entry is damaged, a "
    "patch is missing), 2 if the command could not be carried out.",
)
@click.version_option(__version__, package_name="pytest-kld")
def cli() -> None:
    """Work with captures, scores and reports of pytest-kld, outside a test session."""


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """Print a script that completes this command in a shell.

    For bash, put this line into ~/.bashrc: eval "$(pytest-kld completion bash)"
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "pytest-kld", _COMPLETE).source())


for command in (baseline, cache, compare, doctor, import_logprobs, init, patch, report):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        cli.main(args=arguments, prog_name="pytest-kld", complete_var=_COMPLETE)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    raise AssertionError("click exits in the end")
