"""Make an environment with the real SGLang for a CPU.

SGLang pins other versions than pytest-kld's own tests do, so it has its own virtual environment, as it does on most
users' machines. It is made once per recipe and kept; pytest-kld is added to PYTHONPATH for each session.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RELEASE = "0.5.23"
TORCH = "torch==2.13.0"
FLAGS = (
    *("--device", "cpu", "--dtype", "bfloat16", "--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup", "--sleep-on-idle"),
    *("--max-total-tokens", "8192", "--max-running-requests", "8"),
)
"""Flags that SGLang needs on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SGLangEnvironment:
    """An SGLang installation that boots on this machine.

    Attributes:
        python: its interpreter.
        variables: environment variables that its servers need.
        flags: command-line flags that its servers need.

    """

    python: Path
    variables: dict[str, str]
    flags: tuple[str, ...] = FLAGS

    def with_dtype(self, dtype: str) -> SGLangEnvironment:
        """Return a copy that uses another dtype: processors without bfloat16 are ten times faster in float32."""
        return replace(self, flags=tuple(dtype if flag == "bfloat16" else flag for flag in self.flags))

    def options(self) -> list[str]:
        """Return the options that make pytest-kld use it for both sides."""
        flags = shlex.join(self.flags)
        return [
            "--kld-engine=sglang",
            f"--kld-sglang-command={self.python} -m sglang.launch_server",
            f"--kld-ref-args={flags}",
            f"--kld-candidate-args={flags}",
            *(f"--kld-ref-env={name}={value}" for name, value in self.variables.items()),
            *(f"--kld-candidate-env={name}={value}" for name, value in self.variables.items()),
        ]


def sglang_environment(hook: Path) -> SGLangEnvironment:
    """Return the environment, and make what is missing.

    Args:
        hook: an empty directory; pytest-kld is installed into it, as it is in this checkout.

    """
    python = _base()
    install_hook(python, hook)
    return SGLangEnvironment(python=python, variables=variables(hook, HERE / "stubs"))


def variables(*paths: Path) -> dict[str, str]:
    """Return the environment variables that SGLang needs on a CPU, with these directories on PYTHONPATH."""
    cores = os.cpu_count() or 1
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "SGLANG_CPU_OMP_THREADS_BIND": f"0-{cores - 1}" if cores > 1 else "0",
        "OMP_NUM_THREADS": str(cores),
        "HF_HUB_OFFLINE": "1",
    }


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


def _base() -> Path:
    requirements = HERE / f"requirements-{RELEASE}.txt"
    recipe = "\n".join([sys.version, TORCH, requirements.read_text(), inspect.getsource(_declare_torchvision_ops)])

    def make(directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        python = directory / "bin" / "python"
        _pip(python, TORCH)
        _pip(python, "--no-deps", "-r", str(requirements))
        _declare_torchvision_ops(python)

    return cached(f"sglang-{RELEASE}", recipe, make) / "bin" / "python"


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
