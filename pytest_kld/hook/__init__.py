"""The capture hook: the code that runs inside a server's own processes.

It is inert unless the environment variable `PYTEST_KLD_CAPTURE_DIR` names a directory. If it does, the hook
watches the forward passes of the main model and writes the input of the language-model head for requests with our ids.

This package imports nothing but the standard library, torch and safetensors, and torch only when a hook is installed.
`protocol` defines what both sides agree on, `recorder` what is captured, `writer` how it is written. One module per
engine holds its seams (`sglang`): where the engine is hooked, and how its objects are read. A module of seams has:

    install()           the engine calls it in each of its processes
    PACKAGES            the packages whose versions determine a capture's bits, the engine's own first
    why_not_hooked()    why the installed engine would not call `install`, or None
    options()           the flags of the installed release, or None; see `options`
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
    """Hook an engine if captures are requested. This never raises.

    Args:
        hook: wraps the engine's methods so that they report their passes to a recorder.

    """
    directory = os.environ.get(CAPTURE_DIR_VARIABLE)
    if not directory:
        return
    try:
        from pytest_kld.hook.recorder import Recorder

        hook(Recorder(directory))
    except Exception:  # the server must keep running; pytest-kld finds the report and fails the capture
        report_install_error(directory, traceback.format_exc())
