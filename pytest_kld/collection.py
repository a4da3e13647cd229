"""Which tests are gated: marked ones, those that use `kld`, and the built-in one where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld import builtin_gate
from pytest_kld.config import CONFIG
from pytest_kld.gate import LIMITS, parse_marker

if TYPE_CHECKING:
    from pytest_kld.models import ModelSpec

MARKER = (
    f"kld({', '.join(LIMITS)}): gate the test on KL(reference || candidate); limits in nats are checked after its body"
)


def is_gated(item: pytest.Item) -> bool:
    """Tell whether limits are checked after this test."""
    return "kld" in getattr(item, "fixturenames", ())


def request_fixture_of_marked(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Give a marked test function the `kld` fixture, whether it names it or not.

    Raises:
        pytest.Collector.CollectError: a marker has an unknown or badly typed argument.

    """
    if not collector.istestfunction(obj, name):
        return
    own = [mark for mark in _own_marks(obj) if mark.name == "kld"]
    marks = [*own, *collector.iter_markers("kld")]
    for mark in marks:
        try:
            parse_marker(mark.args, mark.kwargs)
        except ValueError as error:
            raise collector.CollectError(f"{name}: {error}") from None
    if marks:
        pytest.mark.usefixtures("kld")(obj)


def parametrize_candidates(metafunc: pytest.Metafunc) -> None:
    """Run a test that needs candidates once for each, and for each MoE backend, unless it brings its own."""
    config = metafunc.config.stash[CONFIG]
    for fixture, values in (("kld_candidate", config.candidate), ("kld_moe_backend", config.moe_backend)):
        if values and fixture in metafunc.fixturenames and not _is_parametrized(metafunc, fixture):
            metafunc.parametrize(fixture, values, indirect=True, scope="session", ids=_id)


def _is_parametrized(metafunc: pytest.Metafunc, fixture: str) -> bool:
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if fixture in (names.replace(" ", "").split(",") if isinstance(names, str) else names):
            return True
    return False


def add_builtin_gate(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the built-in gate where nobody wrote a test for the candidates.

    It is for candidates on the command line, or in the ini file of a directory without any test.

    Raises:
        pytest.UsageError: candidates without a reference, or limits on the command line with nothing to gate.

    """
    config = session.config.stash[CONFIG]
    if any(is_gated(item) for item in items):
        return
    if config.given_candidates or (config.candidate and not items):
        if config.ref is None:
            raise pytest.UsageError("--kld-candidate needs a reference to be compared with: give --kld-ref=MODEL")
        module = BuiltinGate.from_parent(session, path=Path(builtin_gate.__file__), nodeid="kld")
        items.extend(session.genitems(module))
    elif config.given_limits:
        raise pytest.UsageError(
            f"{config.given_limits[0]} is given and there is nothing to gate: give --kld-ref=MODEL and "
            "--kld-candidate=MODEL, or collect a test that uses the kld marker or fixture"
        )


class BuiltinGate(pytest.Module):
    """The module with the built-in gate, whatever the project calls its own test functions."""

    def istestfunction(self, obj: object, name: str) -> bool:  # noqa: ARG002
        """Accept the one function that is meant."""
        return name == "test_kld"


def _own_marks(obj: object) -> list[pytest.Mark]:
    marks: Any = getattr(obj, "pytestmark", [])
    return [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in marks]


def _id(value: ModelSpec | str) -> str:
    return value if isinstance(value, str) else value.label
