"""Having the plugin installed costs nothing where it is not used."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "transformers", "safetensors", "datasets", "pyarrow", "huggingface_hub", "junitparser")


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    code = f"import sys, pytest_kld.plugin; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_session_without_gates_imports_nothing_heavy(tmp_path: object) -> None:
    code = (
        f"import sys, pytest; pytest.main(['--collect-only', '-q', {str(tmp_path)!r}, '-p', 'no:hypothesispytest']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
