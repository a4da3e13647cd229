"""Stands in for `sgl_kernel`, which has no CPU build on PyPI: every name can be imported, none can be called.

SGLang before 0.5.16 imports kernels by name even where it never calls them, as on this CPU.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

__version__ = "0.3.21"  # SGLang asks for a least version
__path__: list[str] = []


class _Kernel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Kernel:
        return _kernel(self._name, name)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} has no CPU build")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> _Kernel:
        return _kernel(self.__name__, name)


class _Finder(MetaPathFinder, Loader):
    """Makes submodules of any name."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


def __getattr__(name: str) -> _Kernel:
    return _kernel(__name__, name)


def _kernel(owner: str, name: str) -> _Kernel:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Kernel(f"{owner}.{name}")


sys.meta_path.insert(0, _Finder())
