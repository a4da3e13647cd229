"""The capture hook: what runs inside SGLang's own processes.

It is inert unless the environment variable `PYTEST_KLD_CAPTURE_DIR` names a directory. Then it watches the forward
passes of the main model and writes, for requests whose id is ours, what goes into the language-model head.
Nothing of SGLang's is changed on disk where SGLang has plugins (0.5.11 and newer: the entry point
`sglang.srt.plugins`); older releases get one line by `pytest-kld patch`.

This package imports nothing but the standard library, torch and safetensors, and torch not before it is installed.
`protocol` is what both sides agree on, `sglang` where SGLang is hooked, `recorder` what is kept, `writer` how it is
written.
"""

from __future__ import annotations

import os
import traceback

from pytest_kld.hook.protocol import CAPTURE_DIR_VARIABLE, report_install_error


def install() -> None:
    """Put the hook in. SGLang calls this in each of its processes; it never raises."""
    directory = os.environ.get(CAPTURE_DIR_VARIABLE)
    if not directory:
        return
    try:
        from pytest_kld.hook import recorder, sglang

        sglang.install(recorder.Recorder(directory))
    except Exception:  # the server must live; pytest-kld finds the report and fails the capture
        report_install_error(directory, traceback.format_exc())
