"""Having the plugin installed costs next to nothing if it is not used."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = ("torch", "numpy", "transformers", "safetensors", "datasets", "pyarrow", "huggingface_hub", "junitparser")
NEEDED_WITHOUT_A_GATE = {
    *("pytest_kld", "pytest_kld.plugin", "pytest_kld.errors", "pytest_kld.plain"),
    *("pytest_kld.gate", "pytest_kld.gate.limits", "pytest_kld.gate.number", "pytest_kld.gate.speed_limits"),
    *("pytest_kld.settings", "pytest_kld.settings.config", "pytest_kld.settings.header"),
    *("pytest_kld.settings.options", "pytest_kld.settings.parsers"),
    *("pytest_kld.collecting", "pytest_kld.collecting.collection", "pytest_kld.collecting.items"),
    *("pytest_kld.session", "pytest_kld.session.fixtures", "pytest_kld.session.gating", "pytest_kld.session.results"),
}
"""The modules of the package that a session without a gate loads: hooks, options, fixtures' definitions. Each further
module costs every pytest session of a user about half a millisecond; see benchmarks/README.md."""


def modules_after(code: str, directory: Path) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after some code, run in a directory."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code += "; import sys; print('MODULES', *sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return set(run.stdout.splitlines()[-1].split()[1:])


def collecting(*arguments: str) -> str:
    """Return code that collects a plain test."""
    return f"import pytest; pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{list(arguments)!r}])"


def test_loading_the_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    assert not modules_after("import pytest_kld.plugin", tmp_path) & set(HEAVY)


def test_a_session_without_a_gate_loads_hooks_options_and_fixtures_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("def test_plain(): pass\n")
    with_plugin = modules_after(collecting("-p", "pytest_kld.plugin"), tmp_path)
    added = with_plugin - modules_after(collecting(), tmp_path)
    assert "pytest_kld.plugin" in added
    assert added == NEEDED_WITHOUT_A_GATE


def test_running_plain_tests_loads_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("def test_plain(): pass\ndef test_wrong(): assert 1 == 2\n")
    run = "import pytest; pytest.main(['-q', '-p', 'no:cacheprovider', *{}])"
    added = modules_after(run.format(["-p", "pytest_kld.plugin"]), tmp_path) - modules_after(run.format([]), tmp_path)
    assert added == NEEDED_WITHOUT_A_GATE | {"pytest_kld.gate.figure"}  # explains comparisons that involve our figures
