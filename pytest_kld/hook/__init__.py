"""The capture hook: what runs inside a server's own processes.

It is inert unless the environment variable `PYTEST_KLD_CAPTURE_DIR` names a directory. Then it watches the forward
passes of the main model and writes, for requests whose id is ours, what goes into the language-model head.

This package imports nothing but the standard library, torch and safetensors, and torch only when a hook is put in.
`protocol` is what both sides agree on, `recorder` what is kept, `writer` how it is written. One module for each engine
holds its seams (`sglang`): where the engine is hooked, and how its objects are read. A module of seams has:

    install()           the engine calls it in each of its processes
    PACKAGES            the packages whose versions determine a capture's bits, the engine's own first
    why_not_hooked()    why `install` would not be called in the engine that is installed, or None
    options()           the flags of the release that is installed, or None; see `options`
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_kld.hook.protocol import CAPTURE_DIR_VARIABLE, report_install_error

if TYPE_CHECKING:
    from pytest_kld.hook.recorder import Recorder


def put_in(hook: Callable[[Recorder], None]) -> None:
    """Hook an engine if captures are wanted. It never raises.

    Args:
        hook: wraps the engine's methods so that they tell a recorder of their passes.

    """
    directory = os.environ.get(CAPTURE_DIR_VARIABLE)
    if not directory:
        return
    try:
        from pytest_kld.hook.recorder import Recorder

        hook(Recorder(directory))
    except Exception:  # the server must live; pytest-kld finds the report and fails the capture
        report_install_error(directory, traceback.format_exc())
