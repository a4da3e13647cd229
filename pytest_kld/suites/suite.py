"""Makes the settings and the Subjects of a suite file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.engines.registry import served_kind
from pytest_kld.errors import ServerError, SuiteError
from pytest_kld.settings.config import CANDIDATE_SETTINGS, SuiteSettings, build_config
from pytest_kld.settings.engines import IN_PROCESS, check_engines, pick_engine
from pytest_kld.settings.options import OPTIONS
from pytest_kld.settings.parsers import model, url
from pytest_kld.settings.subjects import default_path
from pytest_kld.subjects.axes import combinations
from pytest_kld.subjects.model import is_capture
from pytest_kld.subjects.subject import MOE_BACKEND, PREFILL_CHUNK, Subject
from pytest_kld.suites.file import SuiteFile, read_suite_file
from pytest_kld.suites.keys import AxisValue, option_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_kld.settings.config import KLDConfig

_REFERENCE_OPTIONS = {"model": "ref", "args": "ref_args", "env": "ref_env", "url": "ref_url", "engine": "engine"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One Subject of a suite.

    Attributes:
        subject: what is run.
        problem: why it cannot be run, or None.
        skip: why it is not measured, or None.
        xfail: why it is expected to exceed its limits, or None.

    """

    subject: Subject
    problem: str | None = None
    skip: str | None = None
    xfail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite file, ready to be collected.

    Attributes:
        config: the settings of its measurements.
        entries: its Subjects, in the order of the file.

    """

    config: KLDConfig
    entries: tuple[Entry, ...]


def load_suite(path: Path, name: str, pytest_config: pytest.Config) -> Suite:
    """Read a suite file and make its Subjects. Nothing is loaded or booted.

    Args:
        path: the file.
        name: its node id, for reports.
        pytest_config: options and ini keys.

    Raises:
        SuiteError: the file has a mistake that concerns all of its Subjects, or the name of a Subject is taken.

    """
    file = read_suite_file(path)
    engine = pytest_config.getoption("kld_engine") or file.protocol.get("engine")
    config = _settings(file, name, pytest_config)
    entries: list[Entry] = []
    places: dict[str, str] = {}
    for index, candidate in enumerate(file.candidates):
        for entry in _entries(_Making(file, index, candidate, config, engine)):
            place = file.at("candidate", index)
            if taken := places.setdefault(entry.subject.id, place) != place:
                raise SuiteError(
                    f"{place}: there are two Subjects {entry.subject.id!r}, the other at {places[entry.subject.id]}: "
                    "give one of the candidates another `name`"
                )
            if not taken:
                entries.append(entry)
    _refuse_missing_matrix(file, config, [entry.subject for entry in entries])
    return Suite(config=config, entries=tuple(entries))


def _refuse_missing_matrix(file: SuiteFile, config: KLDConfig, subjects: Sequence[Subject]) -> None:
    """Reject a file that asks for a matrix, or bounds its pairs, but has no two Subjects to compare."""
    if config.matrix is None:
        return

    def group(subject: Subject) -> tuple[str, str]:
        return subject.name if config.matrix == "axes" else "", subject.path

    groups = [group(subject) for subject in subjects]
    asked = "matrix" in file.protocol or config.max_between is not None
    if asked and len(set(groups)) == len(groups):
        place = file.at("protocol", "matrix") if "matrix" in file.protocol else file.at("limits", "max_between")
        raise SuiteError(f"{place}: no candidate has two Subjects to compare with each other: give one of them `axes`")
    for index, candidate in enumerate(file.candidates):
        own = candidate.get("name", candidate["model"])
        alone = any(subject.name == own and groups.count(group(subject)) < 2 for subject in subjects)
        if "max_between" in candidate.get("limits", {}) and alone:
            raise SuiteError(
                f"{file.at('candidate', index, 'limits', 'max_between')}: {own} is in no matrix, because there is no "
                "other Subject to compare it with"
            )


def _settings(file: SuiteFile, name: str, pytest_config: pytest.Config) -> KLDConfig:
    for option in OPTIONS:
        if option.name in CANDIDATE_SETTINGS and option.name != "candidate" and pytest_config.getoption(option.ini):
            raise SuiteError(
                f"{file.path.name}: {option.option} does not reach the candidates of a suite: put it into the file, "
                "or leave the file out"
            )
    given: dict[str, tuple[Any, str]] = {}
    for option in OPTIONS:
        if option.name in file.protocol:
            value = option_texts(option, file.protocol[option.name])
            given[option.name] = value, file.at("protocol", option.name)
        elif option.name in file.limits:
            given[option.name] = repr(file.limits[option.name]), file.at("limits", option.name)
    if not file.reference and pytest_config.getoption("kld_ref") is None:
        raise SuiteError(f"{file.path.name}: the table [reference] is missing, and --kld-ref is not given")
    for key, option_name in _REFERENCE_OPTIONS.items():
        if key in file.reference:
            given[option_name] = _reference_text(key, file), file.at("reference", key)
    settings = SuiteSettings(name=name, base=file.path.parent, given=given)
    try:
        config = build_config(pytest_config, settings)
        if config.ref is not None and not is_capture(config.ref.path):
            check_engines(config)
        return config
    except (pytest.UsageError, ServerError) as error:
        said = str(error)
        raise SuiteError(said if said.startswith(file.path.name) else f"{file.path.name}: {said}") from None


def _reference_text(key: str, file: SuiteFile) -> str | list[str]:
    value = file.reference[key]
    if key == "env":
        return [f"{name}={text}" for name, text in value.items()]
    if key == "args":
        if isinstance(value, dict):
            raise SuiteError(
                f"{file.at('reference', key)}: expected flags of a server; give keyword arguments of from_pretrained "
                "for the reference in the fixture kld_reference_args"
            )
        return shlex.join(value)
    return str(value)


def _entries(making: _Making) -> Iterator[Entry]:
    """Yield the Subjects of one candidate: one for each combination of its axes."""
    file, index, candidate = making.file, making.index, making.candidate
    axes: Mapping[str, Mapping[str, AxisValue]] = candidate.get("axes", {})
    excluded = candidate.get("exclude", [])
    for number, combination in enumerate(excluded):
        for axis, value in combination.items():
            _require_value(axes, axis, value, file.at("candidate", index, "exclude", number, axis))
    try:
        chosen = combinations({axis: list(values) for axis, values in axes.items()}, excluded)
    except ValueError as error:
        raise SuiteError(f"{file.at('candidate', index, 'axes')}: {error}") from None
    for values in chosen:
        marks = {name: candidate.get(name) for name in ("skip", "xfail")}
        named = Subject(
            name=candidate.get("name", candidate["model"]),
            axes=values,
            limits=candidate.get("limits", {}),
            speed=candidate.get("speed", {}),
            tags=candidate.get("tags", ()),
            path=candidate.get("path", default_path(making.config)),
        )
        try:
            yield Entry(subject=making.subject(named), **marks)
        except SuiteError as error:
            yield Entry(subject=named, problem=str(error), **marks)


def _require_value(axes: Mapping[str, Mapping[str, AxisValue]], axis: str, value: str, place: str) -> None:
    if axis not in axes:
        raise SuiteError(f"{place}: there is no axis {axis!r}; the axes are {', '.join(axes) or 'none'}")
    if value not in axes[axis]:
        raise SuiteError(f"{place}: the axis has no value {value!r}; its values are {', '.join(axes[axis])}")


@dataclass(frozen=True, slots=True)
class _Making:
    """Completes the Subjects of one candidate. What cannot be run is a `SuiteError` that names the key."""

    file: SuiteFile
    index: int
    candidate: Mapping[str, Any]
    config: KLDConfig
    default_engine: str | None

    def subject(self, named: Subject) -> Subject:
        """Return a Subject with its model, engine, arguments and environment."""
        spec = self._parsed("model", model)
        if is_capture(spec.path):
            for key in ("engine", "args", "env", "url", "axes"):
                if key in self.candidate:
                    raise SuiteError(f"{self._at(key)}: {spec.label} is a capture, which is not run again")
            if self.config.floor:
                raise SuiteError(
                    f"{self._at('model')}: {spec.label} is a capture, and a floor needs a second run of it"
                )
            return replace(named, model=spec)
        subject = replace(named, model=spec, engine=self._engine())
        if subject.engine == IN_PROCESS:
            return self._in_process(subject)
        return self._served(subject)

    def _engine(self) -> str:
        """Return its engine: its own, else that of the command line or the protocol, else the reference's."""
        engine = self.candidate.get("engine") or self.default_engine
        try:
            return pick_engine(self.config) if engine in (None, "auto") else str(engine)
        except ServerError as error:
            raise SuiteError(f"{self._at('engine')}: {error}") from None

    def _in_process(self, subject: Subject) -> Subject:
        for key in ("env", "url"):
            if key in self.candidate:
                raise SuiteError(f"{self._at(key)}: the engine transformers has no server; give another `engine`")
        keywords: dict[str, Any] = {}
        for place, args in self._arguments(subject):
            if isinstance(args, dict):
                keywords |= args
            elif args:
                raise SuiteError(
                    f"{place}: the engine transformers takes a table of keyword arguments of from_pretrained; flags "
                    "need `engine` to be a server"
                )
        return replace(subject, arguments=keywords)

    def _served(self, subject: Subject) -> Subject:
        kind = served_kind(subject.engine)
        if "url" in self.candidate:
            if self.config.capture_dir is None:
                raise SuiteError(f"{self._at('url')}: a running server needs `capture_dir` under [protocol]")
            for key in ("args", "env", "axes"):
                if key in self.candidate:
                    raise SuiteError(f"{self._at(key)}: the server at `url` runs already; its own flags count")
            if self.config.floor:
                raise SuiteError(f"{self._at('url')}: the server runs already, and a floor needs a second, fresh one")
            return replace(subject, arguments={"url": self._parsed("url", url)})
        flags: list[str] = []
        for place, args in self._arguments(subject):
            if isinstance(args, dict):
                raise SuiteError(f"{place}: {kind.title} takes flags, as one text or as a list of words")
            try:
                kind.check_arguments(args, place)
            except ServerError as error:
                raise SuiteError(str(error)) from None
            flags += args
        environment = dict(self.candidate.get("env", {}))
        for axis, value in subject.axes.items():
            environment |= self.candidate["axes"][axis][value].env
        return replace(subject, arguments={"args": flags}, environment=environment)

    def _arguments(self, subject: Subject) -> Iterator[tuple[str, tuple[str, ...] | dict[str, Any]]]:
        """Yield the candidate's arguments and those of each axis, with their places in the file."""
        yield self._at("args"), self.candidate.get("args", ())
        for axis, label in subject.axes.items():
            chosen, place = self.candidate["axes"][axis][label], self._at("axes", axis)
            yield place, chosen.args if chosen.value is None else self._of_axis(subject, axis, chosen.value, place)

    def _of_axis(self, subject: Subject, axis: str, value: Any, place: str) -> tuple[str, ...] | dict[str, Any]:
        """Return what a value of an axis stands for, by the name of the axis."""
        if subject.engine == IN_PROCESS:
            if not axis.isidentifier():
                raise SuiteError(f"{place}: {axis!r} is not a keyword argument of from_pretrained")
            return {axis: value}
        if axis in (MOE_BACKEND, PREFILL_CHUNK):
            return tuple(served_kind(subject.engine).axis_flags({axis: str(value)}))
        if not axis.startswith("--"):
            raise SuiteError(
                f"{place}: name the axis after the flag that it sets (--{axis.replace(' ', '-')}), or give a table "
                f'of labels with flags: {{ "{value}" = "--flag {value}" }}'
            )
        if isinstance(value, bool):
            return (axis,) if value else ()
        return (axis, str(value))

    def _parsed(self, key: str, parse: Any) -> Any:
        try:
            return parse(self.candidate[key], self.file.path.parent)
        except ValueError as error:
            raise SuiteError(f"{self._at(key)}: {error}") from None

    def _at(self, *key: str | int) -> str:
        return self.file.at("candidate", self.index, *key)
