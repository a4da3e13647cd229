"""Runs a command and answers for its whole process tree: `python -I supervisor.py GRACE CONTAINER COMMAND …`.

The command and everything that it starts are gone when this ends, and this ends when the command does, on SIGTERM
or SIGINT, or when the other end of standard input is closed: the parent holds that open, so its death, however
sudden, ends the tree. On Linux descendants that lost their parent come back here (subreaper), so none escapes;
nobody else's process is ever signalled. A container is no descendant of its client: CONTAINER is JSON, `null` or
`[FILE, COMMAND]`, the file into which the client writes the container's id and the command that, with the id after it,
ends the container. The exit code is the command's, or 128 + the signal that ended it.
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
    """Run the command until it ends or has to; return its exit code."""
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
    """Look at standard input for a moment; the parent writes nothing, so what can be read is its end."""
    try:
        readable, _, _ = select.select([0], [], [], _SECONDS_BETWEEN_LOOKS)
        return bool(readable) and os.read(0, 1) == b""
    except InterruptedError:
        return False


def _wait(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Give the command time to end by itself, and its descendants with it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (child.poll() is None or psutil.Process().children(recursive=True)):
        _reap(child)
        time.sleep(_SECONDS_BETWEEN_LOOKS / 4)


def _kill_descendants() -> None:
    """Kill what is left, again and again, until nothing is: a process may fork while it is being killed."""
    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)


def _kill_container(cidfile: str, kill: list[str]) -> None:
    """End a container if it was started; one that ended with its client is not there any more."""
    path = Path(cidfile)
    if path.is_file():
        subprocess.run([*kill, path.read_text().strip()], stdin=subprocess.DEVNULL, check=False)  # noqa: S603
        path.unlink()


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Take in adopted processes that ended, which would stay as zombies otherwise."""
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
