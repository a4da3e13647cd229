"""Runs a command and ends its whole process tree with it: `python -I supervisor.py GRACE CONTAINER COMMAND …`.

When the supervisor ends, the command and every process that it started are gone. The supervisor ends when the command
does, on SIGTERM, SIGINT or SIGHUP, or when the other end of standard input is closed. The parent holds that end open,
so its death, however sudden, ends the tree. On Linux, descendants that lose their parent become children of the
supervisor (a subreaper), so none escapes. No other process is ever signalled.

A container is not a descendant of its client, so CONTAINER says how to end it. It is JSON: `null`, or `[FILE, COMMAND]`
with the file to which the client writes the container's id, and the command that ends the container when the id is
appended. The exit code is the command's, or 128 + the signal that ended it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

_SECONDS_BETWEEN_LOOKS = 0.2
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(arguments: list[str]) -> int:
    """Run the command until it ends or must be ended; return its exit code."""
    grace, container, command = float(arguments[0]), json.loads(arguments[1]), arguments[2:]
    _become_subreaper()
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr, flush=True)
        return 127
    while child.poll() is None and not asked and not _parent_is_gone():
        pass
    if child.poll() is None:
        child.terminate()
        _wait(child, grace)
    _kill_descendants()
    if container is not None:
        _kill_container(*container)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _parent_is_gone() -> bool:
    """Poll standard input briefly; the parent writes nothing, so only the end of input can be read."""
    try:
        readable, _, _ = select.select([0], [], [], _SECONDS_BETWEEN_LOOKS)
        return bool(readable) and os.read(0, 1) == b""
    except InterruptedError:
        return False


def _wait(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Give the command and its descendants time to end by themselves."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (child.poll() is None or psutil.Process().children(recursive=True)):
        _reap(child)
        time.sleep(_SECONDS_BETWEEN_LOOKS / 4)


def _kill_descendants() -> None:
    """Kill the remaining descendants repeatedly until none is left: a process may fork while it is being killed."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)


def _kill_container(cidfile: str, kill: list[str]) -> None:
    """End a container if it was started; the command may fail, if the container ended with its client."""
    path = Path(cidfile)
    if path.is_file():
        subprocess.run([*kill, path.read_text().strip()], stdin=subprocess.DEVNULL, check=False)  # noqa: S603
        path.unlink()


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Reap adopted processes that ended, which would otherwise stay as zombies."""
    for process in psutil.Process().children():
        if process.pid != child.pid:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def _become_subreaper() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
