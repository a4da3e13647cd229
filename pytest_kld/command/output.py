"""What sub-commands share: errors, exit codes, tables and JSON."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from click.termui import progressbar

from pytest_kld.errors import KLDError
from pytest_kld.plain import LINES, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Exit(IntEnum):
    """The exit codes of every sub-command."""

    IN_ORDER = 0
    NOT_IN_ORDER = 1
    FAILED = 2


class Failed(click.ClickException):
    """The command could not be carried out; the message says why."""

    exit_code = Exit.FAILED

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message, with control characters spelled out."""
        click.echo(f"pytest-kld: {plain(self.message, keep=LINES)}", file=file, err=file is None)


class Commands(click.Group):
    """A group of sub-commands whose errors become messages, without control characters."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a sub-command."""
        try:
            return super().invoke(ctx)
        except KLDError as error:
            raise Failed(str(error)) from error
        except click.UsageError as error:
            raise click.UsageError(plain(error.format_message(), keep=LINES), ctx=error.ctx) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # whoever read the output has ended
                raise
            raise Failed(str(error)) from error


as_json = click.option("--json", "in_json", is_flag=True, help="Print JSON instead of a table.")
existing = click.Path(exists=True, path_type=Path)
directory = click.Path(exists=True, file_okay=False, path_type=Path)


def cache_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option `--cache-dir`, with the default of `--kld-cache-dir`."""
    return click.option(
        "--cache-dir",
        "root",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
        callback=lambda context, parameter, value: value or default_cache_dir(),  # noqa: ARG005 (click's signature)
        help="The cache directory, as in --kld-cache-dir. Default: pytest-kld in the user's cache directory.",
    )(function)


def default_cache_dir() -> Path:
    """Return the cache directory of a session that names none."""
    from platformdirs import user_cache_path

    return user_cache_path("pytest-kld")


def print_json(value: Any) -> None:
    """Print plain data as JSON."""
    from pytest_kld.files import json_bytes

    click.echo(json_bytes(value), nl=False)


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, with control characters spelled out."""
    for line in lines:
        click.echo(plain(line))


class Stderr:
    """Progress on standard error: notes, and a line when a task begins and ends."""

    def note(self, text: str) -> None:
        """Print one line."""
        click.echo(plain(text), err=True)

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[_Bar]:
        """Show a bar while a task runs, if standard error is a terminal; else its name when it ends."""
        with progressbar(length=total, label=plain(name), file=sys.stderr) as shown:
            shown.update(done)
            yield _Bar(shown)


class _Bar:
    def __init__(self, shown: Any) -> None:
        self._shown = shown

    def advance(self) -> None:
        """Count one window."""
        self._shown.update(1)
