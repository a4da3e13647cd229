"""A server's command line: flags that pytest-kld sets, that would spoil a measurement, or that may change its numbers.

An engine states its rules as `FlagRules`; what they mean is the same for all engines.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kld.errors import ServerError
from pytest_kld.servers.launchers import check_launcher

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import Options

_DIGESTED_BYTES = 64 << 20
"""A file that a flag names is in the key by its contents, up to this size."""
_FLAG = re.compile(r"--?[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagRules:
    """The rules for one engine's flags. Each flag is spelled in full.

    Attributes:
        title: the engine's name in messages.
        example: a flag with its value, for messages.
        refused: flags that pytest-kld sets itself or that would spoil a measurement, each with the reason.
        owned: those of them that pytest-kld sets on every server, also on one that does not capture.
        refused_beginnings: beginnings of such flags.
        refused_values: the same for values, in lower case, that only spoil it in this flag.
        harmless_values: values of refused flags that change nothing.
        spellings: alternative spellings in all supported releases, and the spelling that represents each in the key.
        left_out: flags that move no logit, each with the reason; every other flag is part of the cache key.
        sizes: flags whose values, multiplied, are the number of GPUs.
        others: further flags that the engine looks for.
        axes: the flag that each axis of a Subject stands for.
        underscores: whether `--a_b` means `--a-b`.

    """

    title: str
    example: str
    refused: Mapping[str, str]
    owned: frozenset[str]
    refused_beginnings: Mapping[str, str] = field(default_factory=dict)
    refused_values: Mapping[tuple[str, str], str] = field(default_factory=dict)
    harmless_values: frozenset[tuple[str, str]] = frozenset()
    spellings: Mapping[str, str]
    left_out: Mapping[str, str]
    sizes: tuple[str, ...]
    others: tuple[str, ...]
    axes: Mapping[str, str]
    underscores: bool = False

    def split(self, arguments: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Split a command line into flags with their values: `--a 1`, `--a=1`, `--a`, `-a 1`.

        Raises:
            ServerError: it does not begin with a flag.

        """
        name: str | None = None
        values: list[str] = []
        for word in arguments:
            if _FLAG.match(word):
                if name is not None:
                    yield name, tuple(values)
                name, equals, value = word.partition("=")
                if self.underscores and name.startswith("--"):
                    flag, dot, keys = name.partition(".")
                    name = f"{flag.replace('_', '-')}{dot}{keys}"
                values = [value] if equals else []
            elif name is None:
                raise ServerError(
                    f"{self.title}'s arguments begin with {word!r}; expected a flag such as {self.example}"
                )
            else:
                values.append(word)
        if name is not None:
            yield name, tuple(values)

    def check(
        self, arguments: Sequence[str], source: str, options: Options | None = None, *, capturing: bool = True
    ) -> None:
        """Refuse flags. See `ServerKind.check_arguments`; with `options`, every spelling is refused.

        Raises:
            ServerError: names the flag, why, and what to do instead.

        """
        for name, values in self.split(arguments):
            for meant in self._meant(name, options):
                flag = self.spellings.get(meant, meant)
                reason = self._reason(flag, values, options)
                if reason is not None and (capturing or flag in self.owned):
                    short = "" if meant == name else f", short for {meant},"
                    raise ServerError(f"{source}: {name}{short} cannot be given: {reason}.")

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        """Return the flags that axes stand for.

        Raises:
            ServerError: the engine has no flag for one of them.

        """
        for name in axes:
            if name not in self.axes:
                raise ServerError(
                    f"{self.title} has no flag for the axis {name!r}; it has one for {', '.join(self.axes)}."
                )
        return [word for name, value in axes.items() for word in (self.axes[name], value)]

    def in_full(self, arguments: Sequence[str], options: Options | None) -> list[tuple[str, tuple[str, ...]]]:
        """Return the flags with their values, each flag in one spelling."""
        found = []
        for name, values in self.split(arguments):
            meant = {self.spellings.get(flag, flag) for flag in self._meant(name, options)}
            found.append((meant.pop() if len(meant) == 1 else name, values))
        return found

    def has(self, arguments: Sequence[str], name: str, options: Options | None = None) -> bool:
        """Tell whether a flag is given, in any spelling."""
        return any(given == name for given, _ in self.in_full(arguments, options))

    def product_of_sizes(self, arguments: Sequence[str], options: Options | None = None) -> int:
        """Return how many GPUs the sizes stand for.

        Raises:
            ServerError: a size is not a whole number.

        """
        given, needed = dict(self.in_full(arguments, options)), 1
        for name in self.sizes:
            if name in given:
                try:
                    needed *= int(given[name][0])
                except (IndexError, ValueError):
                    raise ServerError(f"{name} wants a whole number, got {' '.join(given[name])!r}") from None
        return needed

    def numeric(self, arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
        """Return the flags that may change logits, sorted by name, for the cache key.

        A flag that is given twice appears twice, in the given order, since the last one counts. The name of a file is
        followed by the digest of its contents.
        """
        found = [[name, *map(_with_contents, values)] for name, values in self.in_full(arguments, options)]
        return sorted((flag for flag in found if flag[0] not in self.left_out), key=lambda flag: flag[0])

    def _reason(self, name: str, values: Sequence[str], options: Options | None) -> str | None:
        """Return why a flag, spelled in full, is refused, or None."""
        if any((name, value) in self.harmless_values for value in values):
            return None
        name = name.partition(".")[0]  # `--a.b 1` sets a part of `--a`
        lowered = [value.lower() for value in values]
        spoiling = (why for (flag, value), why in self.refused_values.items() if flag == name and value in lowered)
        sets = (options or {}).get(name, ("", ""))[1]
        same = (why for flag, why in self.refused.items() if sets and flag.removeprefix("--").replace("-", "_") == sets)
        begins = (why for beginning, why in self.refused_beginnings.items() if name.startswith(beginning))
        return next(spoiling, None) or self.refused.get(name) or next(same, None) or next(begins, None)

    def _meant(self, name: str, options: Options | None) -> list[str]:
        """Return the flags that a word may stand for: the engines' parsers accept any unambiguous prefix of a flag."""
        own = self._known()
        known = own if options is None else options
        if name in known or name in own:
            return [name]
        return [flag for flag in known if flag.startswith(name)] or [name]

    def _known(self) -> set[str]:
        """Return the flags that these rules look for, used while the release's own flags are unknown."""
        values = (name for name, _ in self.refused_values)
        return {*self.refused, *self.spellings, *self.spellings.values(), *self.sizes, *values, *self.others}


def parse_command(text: str, launch: tuple[str, ...], example: str) -> tuple[str, ...]:
    """Split the command that starts a server.

    Args:
        text: the user's.
        launch: how it must end.
        example: the engine's name in an example.

    Raises:
        ValueError: it does not end so, or cannot work as a container or a job step.

    """
    words, end = tuple(shlex.split(text)), shlex.join(launch)
    if words[-len(launch) :] != launch:
        raise ValueError(
            f"expected a command that ends with `{end}`, such as `/opt/{example}/bin/python {end}` or "
            f"`docker run … python {end}`, got {text!r}"
        )
    check_launcher(words, os.environ)
    return words


def _with_contents(value: str) -> str:
    path = Path(value)
    try:
        if "/" not in value or not path.is_file() or path.stat().st_size > _DIGESTED_BYTES:
            return value
        from pytest_kld.files import sha256_of_file

        return f"{value} sha256:{sha256_of_file(path)}"
    except (OSError, ValueError):  # not a file's name, or the file cannot be read here
        return value
