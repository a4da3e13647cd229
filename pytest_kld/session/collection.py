"""Which tests are gated: marked ones, those that use `kld`, and the built-in one if there are no others."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.gate.limits import LIMITS, parse_marker
from pytest_kld.session.config import CONFIG
from pytest_kld.session.fixtures import is_gated

if TYPE_CHECKING:
    from types import ModuleType

    from pytest_kld.session.config import KLDConfig
    from pytest_kld.subjects.subject import Subject

MARKER = (
    f"kld({', '.join(LIMITS)}): gate the test on KL(reference || candidate); limits in nats are checked after its body"
)

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
        except ValueError as error:
            raise collector.CollectError(f"{name}: {error}") from None
    if own:
        pytest.mark.usefixtures("_kld_gate")(obj)
    elif inherited and not any("_kld_gate" in mark.args for mark in collector.iter_markers("usefixtures")):
        collector.add_marker(
            pytest.mark.usefixtures("_kld_gate")
        )  # not on the function, which other classes may inherit


def parametrize_candidates(metafunc: pytest.Metafunc) -> None:
    """Run a test that needs candidates once per candidate and MoE backend, unless it brings its own."""
    config = metafunc.config.stash[CONFIG]
    if not config.candidate and not config.moe_backend:
        return
    from pytest_kld.session.subjects import candidates_of

    for fixture, values in (("kld_candidate", candidates_of(config)), ("kld_moe_backend", config.moe_backend)):
        if not values or fixture not in metafunc.fixturenames:
            continue  # pytest would skip a test that is parametrized over nothing; the fixture raises an error instead
        # A test's own parametrization, or that of a fixture that overrides ours, exists by now: a second is rejected.
        with suppress(_DUPLICATE):
            metafunc.parametrize(fixture, values, indirect=True, scope="session", ids=_id)


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
        _refuse_unmeasured(session, config, gated)
        return
    if config.given_candidates or (config.candidate and not items):
        if config.ref is None:
            _refuse(session, "--kld-candidate needs a reference to be compared with: give --kld-ref=MODEL")
            return
        items.extend(session.genitems(_builtin_gate(session)))
    elif config.given_limits:
        _refuse(
            session,
            f"{config.given_limits[0]} is given, but there is nothing to gate: give --kld-ref=MODEL and "
            "--kld-candidate=MODEL, or collect a test that uses the kld marker or fixture",
        )


def _refuse_gate_without_models(session: pytest.Session, config: KLDConfig, gated: list[pytest.Item]) -> None:
    """Reject the built-in gate, requested by its address, if the models that it should compare are not given."""
    builtin = [item for item in gated if isinstance(item.parent, BuiltinGate)]
    if not builtin:
        return
    from pytest_kld.session.subjects import is_overridden

    missing = [
        option
        for option, given, fixture in (
            ("--kld-ref=MODEL", config.ref, "kld_reference"),
            ("--kld-candidate=MODEL", config.candidate, "kld_candidate"),
        )
        if not given and not is_overridden(builtin[0], fixture)
    ]
    if missing:
        _refuse(session, f"pytest_kld.gate_only has nothing to gate: give {' and '.join(missing)}")


def _refuse_unmeasured(session: pytest.Session, config: KLDConfig, gated: list[pytest.Item]) -> None:
    """Reject candidates on the command line that no test measures: the session would pass without them."""
    if not config.given_candidates:
        return
    from pytest_kld.session.subjects import candidate_of, candidates_of

    measured = [candidate_of(item).model for item in gated]
    if None in measured:  # one of the project's own fixtures decides, and it may use them
        return
    for subject in candidates_of(config):
        if subject.model not in measured:
            _refuse(
                session,
                f"--kld-candidate={subject.name} is given, but no collected test measures it: the gated tests name "
                "their own candidates. Omit the option, or collect a test that does not name its own.",
            )


def mark_gated(items: list[pytest.Item]) -> None:
    """Mark tests that are gated only by their fixture, so that `-m kld` selects every gate and `-m "not kld"` none."""
    for item in items:
        if is_gated(item) and item.get_closest_marker("kld") is None:
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
            except ValueError as error:
                _refuse(session, f"{item.nodeid}: {error}")
        if item.get_closest_marker("kld") and not is_gated(item):
            _refuse(
                session,
                f"{item.nodeid}: the kld marker cannot gate this test. It works on functions, on methods of plain "
                "classes (not of unittest.TestCase) and on modules. If it is added later (by a hook, or to a single "
                "parameter set), the test must use the kld fixture as well.",
            )


class BuiltinGate(pytest.Module):
    """The module with the built-in gate, collected whatever names the project gives its own test functions."""

    def _getobj(self) -> ModuleType:
        """Return the module; unlike a user's test, it need not be imported from a path."""
        from pytest_kld import gate_only

        return gate_only

    def istestfunction(self, obj: object, name: str) -> bool:  # noqa: ARG002
        """Accept only the gate's function."""
        return name == "test_kld"


def _builtin_gate(session: pytest.Session) -> BuiltinGate:
    from pytest_kld import gate_only

    # Its parent is the session and its id is `kld`, wherever the package is installed.
    gate: BuiltinGate = BuiltinGate.from_parent(session, path=Path(gate_only.__file__), nodeid="kld")
    return gate


def _refuse(session: pytest.Session, message: str) -> None:
    """End the session with a usage error; in xdist's workers, report a collection error, which reaches the user."""
    if not hasattr(session.config, "workerinput"):
        raise pytest.UsageError(message)
    report = pytest.CollectReport(nodeid="kld", outcome="failed", longrepr=message, result=[])
    session.config.hook.pytest_collectreport(report=report)


def _own_marks(obj: object) -> list[pytest.Mark]:
    marks: Any = getattr(obj, "pytestmark", [])
    return [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in marks]


def _id(value: Subject | str) -> str:
    return value if isinstance(value, str) else value.id
