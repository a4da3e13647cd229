"""pytest hooks. Each calls something that can be tested without pytest; importing this must not import torch."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pytest_kld.collecting.collection import (
    MARKER,
    SUITE_SUFFIX,
    add_builtin_gate,
    builtin_gate_at,
    keep_suites_together,
    mark_gated,
    parametrize_candidates,
    parametrize_paths,
    refuse_idle_markers,
    refuse_unfit_engines,
    refuse_unmeasured,
    request_fixture_of_marked,
    require_runnable,
)
from pytest_kld.collecting.items import has_result, is_matrix, uses_kld
from pytest_kld.session.fixtures import (  # noqa: F401 (pytest finds fixtures by their names in this module)
    _kld_gate,
    _kld_matrix,
    _kld_measurement,
    _kld_needed_paths,
    _kld_overrides,
    _kld_speeds,
    kld,
    kld_candidate,
    kld_candidate_args,
    kld_config,
    kld_moe_backend,
    kld_path,
    kld_reference,
    kld_reference_args,
    kld_server,
    kld_server_args,
    kld_server_env,
    kld_windows,
)
from pytest_kld.session.gating import attach_result, check_limits, require_baseline
from pytest_kld.session.results import make_results
from pytest_kld.settings.config import CONFIG, add_options, build_config
from pytest_kld.settings.header import header


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register options and ini keys."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Check and freeze the options, before anything is collected or loaded."""
    config.addinivalue_line("markers", MARKER)
    config.stash[CONFIG] = build_config(config)
    config.pluginmanager.register(make_results(config), "kld-results")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Show the engine, the reference and the cache."""
    return header(config.stash[CONFIG])


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect suite files."""
    if not file_path.name.endswith(SUITE_SUFFIX):
        return None
    from pytest_kld.collecting.suite_items import suite_module

    return suite_module(file_path, parent)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect the built-in gate at its address."""
    return builtin_gate_at(module_path, parent)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Give marked tests the fixture; check the markers' arguments."""
    request_fixture_of_marked(collector, name, obj)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each gated test once per candidate and path."""
    parametrize_candidates(metafunc)
    parametrize_paths(metafunc)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> Generator[None]:
    """Add the built-in gate if no collected test is gated; reject markers that would gate nothing."""
    add_builtin_gate(session, items)
    refuse_unfit_engines(session, items)
    refuse_unmeasured(session, items)
    if session.config.stash[CONFIG].matrix is not None:
        from pytest_kld.collecting.matrices import add_matrices

        add_matrices(session, items)
    mark_gated(items)
    yield
    keep_suites_together(items)
    if any(map(is_matrix, items)):
        from pytest_kld.collecting.matrices import place_matrices

        place_matrices(items)
    if session.config.stash[CONFIG].shard is not None:
        from pytest_kld.collecting.shards import keep_share

        keep_share(session, items)
    refuse_idle_markers(session, items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Show the plan in place of running the tests, if that is requested."""
    if not session.config.stash[CONFIG].plan or session.testsfailed:
        return None
    from pytest_kld.session.planning import show_plan

    show_plan(session)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail the test of a Subject that cannot be run, or whose baseline is missing."""
    require_runnable(item)
    require_baseline(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Check the limits after the body."""
    result = yield
    if is_matrix(item):
        from pytest_kld.session.matrix_gating import check_matrix

        check_matrix(item)
    else:
        check_limits(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the result. Escape names and messages in a failure, so that they cannot control the terminal."""
    report = yield
    if uses_kld(item):
        from pytest_kld.session.failure_text import escape_failure

        escape_failure(report)
    if is_matrix(item):
        from pytest_kld.session.matrix_gating import attach_matrix

        attach_matrix(item, report)
    elif has_result(item):
        attach_result(item, report)
    return report


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Explain a failed comparison of a figure with a number."""
    from pytest_kld.gate.figure import explain_comparison

    return explain_comparison(op, left, right)
