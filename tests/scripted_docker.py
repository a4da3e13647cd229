"""A minimal container engine: `docker run …`, `docker kill ID`, and the daemon that serves both.

As with the real one, the container is a child of the daemon and not of the client, gets only the variables that it is
given, and lives on if its client is ended.

    python scripted_docker.py SOCKET daemon
    python scripted_docker.py SOCKET run --network host --cidfile FILE --env NAME … IMAGE COMMAND …
    python scripted_docker.py SOCKET kill ID
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

IMAGE_VARIABLES = ("PATH", "PYTHONPATH")
"""Variables that the image itself sets; needed here so that Python is found."""
WITH_VALUE = ("--network", "--cidfile", "--env", "-e", "-v", "--gpus", "--ipc")


def ask(address: str, question: dict[str, Any]) -> Any:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(json.dumps(question).encode() + b"\n")
        return json.loads(client.makefile().readline())


def daemon(address: str) -> None:
    containers: dict[str, subprocess.Popen[bytes]] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection, suppress(ValueError, OSError):  # the client was ended meanwhile
                question = json.loads(connection.makefile().readline())
                connection.sendall(json.dumps(answer(question, containers)).encode() + b"\n")


def answer(question: dict[str, Any], containers: dict[str, subprocess.Popen[bytes]]) -> Any:
    if "run" in question:
        with Path(question["output"]).open("ab") as output:
            process = subprocess.Popen(
                question["run"], env=question["environment"], stdout=output, stderr=output, start_new_session=True
            )
        containers[f"c{process.pid}"] = process
        return f"c{process.pid}"
    container = containers[question["id"]]
    if question.get("kill") and container.poll() is None:
        os.killpg(container.pid, signal.SIGKILL)
        container.wait()
    return container.poll()


def run(address: str, words: list[str]) -> int:
    options: dict[str, list[str]] = {}
    while words[0].startswith("-"):
        name = words.pop(0)
        options.setdefault(name, []).append(words.pop(0) if name in WITH_VALUE else "")
    _image, *command = words
    image = {name: os.environ[name] for name in IMAGE_VARIABLES if name in os.environ}
    given = {
        name: os.environ[name] for name in (*options.get("--env", ()), *options.get("-e", ())) if name in os.environ
    }
    output = Path(f"{address}.{os.getpid()}.out")
    output.touch()
    container = ask(address, {"run": command, "environment": {**image, **given}, "output": str(output)})
    for cidfile in options.get("--cidfile", ()):
        with Path(cidfile).open("x") as file:
            file.write(container)
    while (code := ask(address, {"id": container})) is None:
        time.sleep(0.05)
    print(output.read_text())
    return int(code)


def main() -> int:
    address, action, *words = sys.argv[1:]
    if action == "daemon":
        daemon(address)
    if action == "kill":
        ask(address, {"id": words[0], "kill": True})
        return 0
    return run(address, words)


if __name__ == "__main__":
    sys.exit(main())
