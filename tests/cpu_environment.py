"""Environments with a real server for a CPU, made on first use and kept in the user's cache directory.

Servers pin other versions than pytest-kld's own tests do, so each has its own virtual environment, as on most users'
machines. It is made once per recipe; pytest-kld is added to PYTHONPATH for each session.
"""

from __future__ import annotations

import hashlib
import inspect
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from filelock import FileLock
from platformdirs import user_cache_path

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True, kw_only=True)
class ServerEnvironment:
    """An installation of a server that boots on this machine.

    Attributes:
        engine: its name in `--kld-engine`.
        launch: what follows the interpreter in the command that starts a server.
        python: its interpreter.
        variables: environment variables that its servers need.
        flags: command-line flags that its servers need.

    """

    engine: str
    launch: tuple[str, ...]
    python: Path
    variables: dict[str, str]
    flags: tuple[str, ...]

    @property
    def command(self) -> tuple[str, ...]:
        """The command that starts a server, without flags."""
        return (str(self.python), *self.launch)

    def with_dtype(self, dtype: str) -> Self:
        """Return a copy that uses another dtype: processors without bfloat16 are ten times faster in float32."""
        flags = list(self.flags)
        flags[flags.index("--dtype") + 1] = dtype
        return replace(self, flags=tuple(flags))

    def options(self) -> list[str]:
        """Return the options that make pytest-kld use it for both sides."""
        flags = shlex.join(self.flags)
        return [
            f"--kld-engine={self.engine}",
            f"--kld-{self.engine}-command={shlex.join(self.command)}",
            f"--kld-ref-args={flags}",
            f"--kld-candidate-args={flags}",
            *(f"--kld-ref-env={name}={value}" for name, value in self.variables.items()),
            *(f"--kld-candidate-env={name}={value}" for name, value in self.variables.items()),
        ]


def virtual_environment(name: str, requirements: Path) -> Path:
    """Return the interpreter of an environment with torch and the packages of a complete list; make it if missing."""
    recipe = "\n".join([sys.version, TORCH, requirements.read_text(), inspect.getsource(_declare_torchvision_ops)])

    def make(directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        python = directory / "bin" / "python"
        _pip(python, TORCH)
        _pip(python, "--no-deps", "-r", str(requirements))
        _declare_torchvision_ops(python)

    return cached(name, recipe, make) / "bin" / "python"


def install_hook(python: Path, target: Path) -> None:
    """Install pytest-kld from this checkout beside an environment, not into it: the environment is shared and kept."""
    _pip(python, "--no-deps", "--target", str(target), str(ROOT))


def cached(name: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """Return the directory for a recipe in the user's cache, and make it if it is missing."""
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    directory = user_cache_path("pytest-kld") / "tests" / f"{name}-{digest}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        done = directory / ".complete"
        if not done.is_file():
            shutil.rmtree(directory, ignore_errors=True)
            make(directory)
            done.touch()
    return directory


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def _declare_torchvision_ops(python: Path) -> None:
    """Let torchvision be imported beside a CPU build of torch, whose operators its compiled part does not find.

    SGLang imports it for image processors and calls neither operator on text.
    """
    question = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([python, "-c", question], check=True, capture_output=True, text=True).stdout.strip()
    path = Path(packages) / "torchvision" / "_meta_registrations.py"
    first = '@torch.library.register_fake("torchvision::nms")'
    declared = (
        '_library = torch.library.Library("torchvision", "FRAGMENT")\n'
        'for _name in ("nms", "qnms"):\n'
        "    if not hasattr(torch.ops.torchvision, _name):\n"
        '        _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n\n\n'
    )
    source = path.read_text()
    assert first in source
    path.write_text(source.replace(first, declared + first, 1))
