"""Which tests are gated: marked ones, those that use `kld`, and the built-in one if there are no others."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.collecting.items import PROBLEM, asked_path, is_gated, is_matrix
from pytest_kld.errors import ServerError
from pytest_kld.gate.limits import LIMITS, MATRIX_LIMITS, parse_marker
from pytest_kld.gate.speed_limits import SPEED_LIMITS, THROUGHPUT, parse_speed_marker
from pytest_kld.plain import LINES, plain
from pytest_kld.settings.config import CONFIG, config_of

if TYPE_CHECKING:
    from types import ModuleType

    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.subjects.subject import Subject

_ARGUMENTS = (*LIMITS, *MATRIX_LIMITS, "path", THROUGHPUT, *SPEED_LIMITS)
MARKER = (
    f"kld({', '.join(_ARGUMENTS)}): gate the test on KL(reference || candidate), and on speed where it is measured; "
    "limits are checked after its body"
)

SUITE_SUFFIX = ".kld.toml"
"""The end of the names of suite files."""

_DUPLICATE: type[Exception] = pytest.Collector.CollectError if pytest.version_tuple >= (8, 4) else ValueError
"""What `Metafunc.parametrize` raises if the fixture is parametrized already."""


def request_fixture_of_marked(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Give a marked test function the gate's fixture, whatever else it uses.

    Raises:
        pytest.Collector.CollectError: a marker has an unknown or badly typed argument.

    """
    if not collector.istestfunction(obj, name):
        return
    own = [mark for mark in _own_marks(obj) if mark.name == "kld"]
    inherited = list(collector.iter_markers("kld"))
    for mark in (*own, *inherited):
        try:
            parse_marker(mark.args, mark.kwargs)
            parse_speed_marker(mark.kwargs)
        except ValueError as error:
            raise collector.CollectError(plain(f"{name}: {error}", keep=LINES)) from None
    if own:
        pytest.mark.usefixtures("_kld_gate")(obj)
    elif inherited and not any("_kld_gate" in mark.args for mark in collector.iter_markers("usefixtures")):
        collector.add_marker(
            pytest.mark.usefixtures("_kld_gate")
        )  # not on the function, which other classes may inherit


def parametrize_candidates(metafunc: pytest.Metafunc) -> None:
    """Run a test that needs candidates once per candidate and MoE backend, unless it brings its own."""
    if isinstance(gate := metafunc.definition.parent, GateModule) and gate.parametrize(metafunc):
        return
    config = metafunc.config.stash[CONFIG]
    if not config.candidate and not config.moe_backend:
        return
    from pytest_kld.settings.subjects import candidates_of

    try:
        candidates = candidates_of(config)
    except ServerError:  # no engine can be told from the options: `refuse_unfit_engines` says so if a test is gated
        return
    for fixture, values in (("kld_candidate", candidates), ("kld_moe_backend", config.moe_backend)):
        if not values or fixture not in metafunc.fixturenames:
            continue  # pytest would skip a test that is parametrized over nothing; the fixture raises an error instead
        # A test's own parametrization, or that of a fixture that overrides ours, exists by now: a second is rejected.
        with suppress(_DUPLICATE):
            metafunc.parametrize(fixture, values, indirect=True, scope="session", ids=_id)


def require_runnable(item: pytest.Item) -> None:
    """Fail a test whose Subject cannot be run, before anything is booted for it."""
    if (problem := item.stash.get(PROBLEM, None)) is not None:
        pytest.fail(f"SuiteError: {problem}", pytrace=False)


def keep_suites_together(items: list[pytest.Item]) -> None:
    """Move the tests of each suite to the place of its first one: each suite has its own servers and reference."""
    first: dict[object, int] = {}
    for index, item in enumerate(items):
        if isinstance(item.parent, GateModule):
            first.setdefault(item.parent, index)
    if first:
        places = [first.get(item.parent, index) for index, item in enumerate(items)]
        items[:] = [item for _, item in sorted(zip(places, items, strict=True), key=lambda pair: pair[0])]


def parametrize_paths(metafunc: pytest.Metafunc) -> None:
    """Run a gated test once for each path through the engine if several are asked for, or if its marker names one."""
    gate = metafunc.definition.parent
    config = (gate.own_config if isinstance(gate, GateModule) else None) or metafunc.config.stash[CONFIG]
    path = asked_path(metafunc.definition, config)
    if "kld_path" not in metafunc.fixturenames or (path == config.path and path != "both"):
        return
    with suppress(_DUPLICATE):
        metafunc.parametrize("kld_path", _PATHS.get(path, (path,)), indirect=True, scope="session")


_PATHS = {"both": ("prefill", "decode")}


def builtin_gate_at(path: Path, parent: pytest.Collector) -> BuiltinGate | None:
    """Return the built-in gate if pytest was pointed at its module: `pytest --pyargs pytest_kld.gate_only`."""
    if path.name != "gate_only.py":
        return None
    from pytest_kld import gate_only

    return _builtin_gate(parent.session) if path.samefile(gate_only.__file__) else None


def add_builtin_gate(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the built-in gate if no collected test is gated.

    It gates candidates on the command line, or those in the ini file of a directory without any test.

    Raises:
        pytest.UsageError: candidates without a reference, or limits on the command line with nothing to gate.

    """
    config = session.config.stash[CONFIG]
    if gated := [item for item in items if is_gated(item)]:
        _refuse_gate_without_models(session, config, gated)
        _refuse_idle_decoding(session, config, gated)
        return
    if config.given_candidates or (config.candidate and not items):
        if config.ref is None:
            refuse(session, "--kld-candidate needs a reference to be compared with: give --kld-ref=MODEL")
            return
        items.extend(session.genitems(_builtin_gate(session)))
        _refuse_idle_decoding(session, config, items)
    elif config.given_limits:
        refuse(
            session,
            f"{config.given_limits[0]} is given, but there is nothing to gate: give --kld-ref=MODEL and "
            "--kld-candidate=MODEL, or collect a test that uses the kld marker or fixture",
        )


def refuse_unfit_engines(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Reject options that do not tell the engine, or that it does not take, if a test is gated on models.

    Raises:
        pytest.UsageError: names the option, and what to do instead.

    """
    config = session.config.stash[CONFIG]
    models = [model for model in (config.ref, *config.candidate) if model is not None]
    if not models or not any(map(is_gated, items)):
        return
    from pytest_kld.settings.engines import check_engines
    from pytest_kld.subjects.model import is_capture

    if all(is_capture(model.path) for model in models):
        return
    try:
        check_engines(config)
    except ServerError as error:
        refuse(session, plain(str(error), keep=LINES))


def _refuse_gate_without_models(session: pytest.Session, config: KLDConfig, gated: list[pytest.Item]) -> None:
    """Reject the built-in gate, requested by its address, if the models that it should compare are not given."""
    builtin = [item for item in gated if isinstance(item.parent, BuiltinGate)]
    if not builtin:
        return
    from pytest_kld.settings.subjects import is_overridden

    missing = [
        option
        for option, given, fixture in (
            ("--kld-ref=MODEL", config.ref, "kld_reference"),
            ("--kld-candidate=MODEL", config.candidate, "kld_candidate"),
        )
        if not given and not is_overridden(builtin[0], fixture)
    ]
    if missing:
        refuse(session, f"pytest_kld.gate_only has nothing to gate: give {' and '.join(missing)}")


def refuse_unmeasured(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Reject candidates on the command line that no test measures: the session would pass without them.

    Raises:
        pytest.UsageError: names the candidate.

    """
    config, gated = session.config.stash[CONFIG], [item for item in items if is_gated(item)]
    if not config.given_candidates or not gated:
        return
    from pytest_kld.settings.subjects import candidate_of, candidates_of

    measured = [candidate_of(item).model for item in gated if config_of(item) is config]
    if None in measured:  # one of the project's own fixtures decides, and it may use them
        return
    for subject in candidates_of(config):
        if subject.model not in measured:
            refuse(
                session,
                f"--kld-candidate={subject.name} is given, but no collected test measures it: the gated tests and "
                "suite files name their own candidates. Omit the option, or collect a test that does not name its own, "
                "such as `--pyargs pytest_kld.gate_only`.",
            )


def _refuse_idle_decoding(session: pytest.Session, config: KLDConfig, gated: list[pytest.Item]) -> None:
    """Reject options about decoding on the command line if no test decodes, or if none compares it with prefill."""
    from pytest_kld.settings.config import config_of

    gap = "--kld-max-decode-gap"
    if gap in config.given_limits and all(asked_path(item, config_of(item)) != "both" for item in gated):
        refuse(session, f"{gap} is given, but no test measures both paths: give --kld-path=both")
    if not config.given_decoding:
        return
    from pytest_kld.settings.subjects import candidate_of

    if all(candidate_of(item).path == "prefill" for item in gated):
        refuse(session, f"{config.given_decoding[0]} is given, but nothing is decoded: give --kld-path=decode or both")


def mark_gated(items: list[pytest.Item]) -> None:
    """Mark tests that are gated only by their fixture, so that `-m kld` selects every gate and `-m "not kld"` none.

    The tests of matrices are marked, too.
    """
    for item in items:
        if (is_gated(item) or is_matrix(item)) and item.get_closest_marker("kld") is None:
            item.add_marker(pytest.mark.kld)


def refuse_idle_markers(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Reject markers that gate nothing: the test would pass without being measured.

    Raises:
        pytest.UsageError: names the test, and the marker's valid arguments if one is wrong.

    """
    for item in items:
        for mark in item.iter_markers("kld"):
            try:
                parse_marker(mark.args, mark.kwargs)
                parse_speed_marker(mark.kwargs)
            except ValueError as error:
                refuse(session, f"{item.nodeid}: {error}")
        if is_gated(item):
            from pytest_kld.settings.subjects import candidate_of

            path, config = candidate_of(item).path, session.config.stash[CONFIG]
            marked = asked_path(item, config)
            if any("path" in mark.kwargs for mark in item.iter_markers("kld")) and marked not in (path, "both"):
                refuse(
                    session,
                    f"{item.nodeid}: its kld marker names the path {marked}, but was added when the test's path had "
                    "been chosen. Mark the test itself, or give --kld-path.",
                )
        if is_gated(item) and config_of(item).matrix is None and _is_bounded(item):
            refuse(
                session,
                f"{item.nodeid}: max_between bounds the pairs of a matrix, and there is none: give --kld-matrix, or "
                "`matrix` under [protocol] of a suite file",
            )
        if item.get_closest_marker("kld") and not is_gated(item) and not is_matrix(item):
            refuse(
                session,
                f"{item.nodeid}: the kld marker cannot gate this test. It works on functions, on methods of plain "
                "classes (not of unittest.TestCase) and on modules. If it is added later (by a hook, or to a single "
                "parameter set), the test must use the kld fixture as well.",
            )


def _is_bounded(item: pytest.Item) -> bool:
    """Tell whether a test has a limit on the pairs of a matrix."""
    from pytest_kld.collecting.matrix import between_of

    return between_of(item, config_of(item)) is not None


class GateModule(pytest.Module):
    """The module with the built-in gate, collected whatever names the project gives its own test functions."""

    def _getobj(self) -> ModuleType:
        """Return the module; unlike a user's test, it need not be imported from a path."""
        from pytest_kld import gate_only

        return gate_only

    def istestfunction(self, obj: object, name: str) -> bool:  # noqa: ARG002
        """Accept only the gate's function."""
        return name == "test_kld"

    @property
    def own_config(self) -> KLDConfig | None:
        """Return the settings of this gate, if they are not those of the session."""
        return None

    def parametrize(self, metafunc: pytest.Metafunc) -> bool:  # noqa: ARG002
        """Parametrize the gate's function; return whether it names its own candidates."""
        return False


class BuiltinGate(GateModule):
    """The built-in gate of the candidates that options and ini keys name."""


def _builtin_gate(session: pytest.Session) -> BuiltinGate:
    from pytest_kld import gate_only

    # Its parent is the session and its id is `kld`, wherever the package is installed.
    gate: BuiltinGate = BuiltinGate.from_parent(session, path=Path(gate_only.__file__), nodeid="kld")
    return gate


def refuse(session: pytest.Session, message: str) -> None:
    """End the session with a usage error; in xdist's workers, report a collection error, which reaches the user."""
    if not hasattr(session.config, "workerinput"):
        raise pytest.UsageError(message)
    report = pytest.CollectReport(nodeid="kld", outcome="failed", longrepr=message, result=[])
    session.config.hook.pytest_collectreport(report=report)


def _own_marks(obj: object) -> list[pytest.Mark]:
    marks: Any = getattr(obj, "pytestmark", [])
    return [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in marks]


def _id(value: Subject | str) -> str:
    return plain(value if isinstance(value, str) else value.id)
