"""The wheel holds everything, declares what it needs, and gates from an environment without the checkout.

The environment is a new virtual environment into which only the wheel is installed. Its dependencies are not downloaded
again, since torch alone would take minutes. Instead, links to the packages of the running environment are put beside
it, without this package and its editable install. That would hide a dependency that is used but not declared, so a
separate test looks for those.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import SMALL_RUN
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OPTIONAL = {"sglang", "vllm", "accelerate", "aiohttp"}
"""What is imported only where it is installed: inside servers, for weights that accelerate itself offloaded, and for a
shared cache over HTTP (the extra `http`)."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `pip install` of a checkout builds it: in an isolated build environment."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT)]
    environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel."""
    directory = tmp_path_factory.mktemp("installed")
    dependencies = directory / "dependencies"
    dependencies.mkdir()
    for name in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(name).iterdir():
            if "pytest_kld" not in entry.name and entry.suffix != ".pth":
                (dependencies / entry.name).symlink_to(entry)
    venv.create(directory / "venv", with_pip=False)
    python = directory / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    run = subprocess.run(install, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    site_packages = site_packages_of(directory / "venv")
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return directory / "venv"


def site_packages_of(environment: Path) -> Path:
    """Return a virtual environment's site-packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))


def run_in(environment: Path, cwd: Path, *command: str) -> str:
    """Run a command of an environment outside of the checkout and return what it printed to stdout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    variables |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    program, *arguments = command
    run = subprocess.run(
        [str(environment / "bin" / program), *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def imports_of(path: Path) -> Iterator[str]:
    """Yield the top-level name of each absolute import, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_wheel_holds_every_file_of_the_package_and_the_patches(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "pytest_kld").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f"pytest_kld/patches/{path.name}" for path in (ROOT / "patches").glob("*.patch")}
    assert {
        "pytest_kld/py.typed",
        "pytest_kld/gate_only.py",
        "pytest_kld/report/assets/report.html.jinja",
        "pytest_kld/report/assets/vendor/plot.min.js",
        "pytest_kld/patches/sglang-0.5.7-to-0.5.10.post1.patch",
    } <= expected
    assert {name for name in names if name.startswith("pytest_kld/")} == expected
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_every_import_is_of_a_declared_dependency(installed: Path) -> None:
    site_packages = site_packages_of(installed)
    (metadata,) = site_packages.glob("pytest_kld-*.dist-info")
    requirements = [Requirement(text) for text in PathDistribution(metadata).requires or []]
    declared = {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    used = {name for path in (site_packages / "pytest_kld").rglob("*.py") for name in imports_of(path)}
    foreign = used - sys.stdlib_module_names - {"pytest_kld"} - OPTIONAL
    assert {"torch", "numpy", "pytest"} <= foreign
    providers = packages_distributions()
    undeclared = {
        name: providers.get(name)
        for name in foreign
        if not {canonicalize_name(provider) for provider in providers.get(name, [])} & declared
    }
    assert not undeclared


@pytest.mark.parametrize("address", [(), ("--pyargs", "pytest_kld.gate_only")], ids=["zero-file", "gate_only"])
def test_gate_runs_from_the_installed_wheel_in_an_empty_directory(
    installed: Path, tmp_path: Path, reference_dir: Path, candidate_dir: Path, address: tuple[str, ...]
) -> None:
    origin = "import pytest_kld.plugin; print(pytest_kld.plugin.__file__)"
    assert run_in(installed, tmp_path, "python", "-c", origin).startswith(str(site_packages_of(installed)))
    output = run_in(
        installed,
        tmp_path,
        *("python", "-m", "pytest", *address, "-p", "no:cacheprovider"),
        *(f"--kld-ref={reference_dir}", f"--kld-candidate={candidate_dir}", "--kld-max-mean=0.1"),
        *("--kld-engine=transformers", *SMALL_RUN, "--kld-cache-dir=cache", "--kld-html=report.html"),
        "--kld-json=report.json",
    )
    assert "= 1 passed" in output
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["nodeid"] == f"kld::test_kld[{candidate_dir}]"
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_commands_run_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    assert "Usage: pytest-kld" in run_in(installed, tmp_path, "pytest-kld", "--help")
    told = json.loads(run_in(installed, tmp_path, "python", "-m", "pytest_kld.hook", "pytest_kld.hook.sglang"))
    assert told["pytest_kld"] == "0.1.0"
    listed = "from pytest_kld.hook.patching import load_patches; print(len(load_patches()))"
    assert run_in(installed, tmp_path, "python", "-c", listed).strip() == "1"
