"""Commands that start a server in a container or through Slurm. They do not pass on the environment by themselves.

`docker run` gives a container none of its client's variables, and the container outlives a client that is killed.
`srun` gives a job step the variables that `--export` names, on a node that Slurm picks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from pytest_kld.plain import secret_digest

_CONTAINERS = ("docker", "podman", "nerdctl")
_SRUN = "srun"
_VARIABLE = re.compile(r"(--env=|-e)?([A-Za-z_]\w*)=(.*)", flags=re.DOTALL)
"""A variable that a container is given with its value."""
_HOST_NETWORKS = ("--network=host", "--net=host")


def check_launcher(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Reject a command that could not work, or that would measure something other than what it says.

    Args:
        command: what starts the server.
        environment: of this process; it tells whether this is a node of a Slurm allocation.

    Raises:
        ValueError: says why, and what to do instead.

    """
    if (run := _container(command)) is not None:
        _check_container(command, run)
    elif (srun := _srun(command)) is not None:
        _check_srun(command[srun:], environment)


def with_environment(
    command: Sequence[str], names: Iterable[str], environment: Mapping[str, str], cidfile: Path | None = None
) -> list[str]:
    """Return a command that passes variables of its environment on to the server.

    Args:
        command: what starts the server; one that starts it directly is returned unchanged.
        names: the variables' names.
        environment: its complete environment.
        cidfile: the file for a container's id; it must not exist yet.

    """
    if (run := _container(command)) is not None:
        forwarded = [word for name in sorted(set(names)) if name in environment for word in ("--env", name)]
        marked = [] if cidfile is None else ["--cidfile", str(cidfile)]
        return [*command[: run + 1], *marked, *forwarded, *command[run + 1 :]]
    if (srun := _srun(command)) is not None:
        here = ["--export=ALL", f"--nodelist={environment['SLURMD_NODENAME']}", "--nodes=1", "--ntasks=1"]
        return [*command[: srun + 1], *here, *command[srun + 1 :]]
    return list(command)


def inherited(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process that reach the server by themselves, or because the command names them."""
    if _container(command) is None:
        return dict(environment)
    named = {word.partition("=")[2] for word in command if word.startswith("--env=")}
    named |= {word for before, word in pairwise(command) if before in ("-e", "--env")}
    return {name: environment[name] for name in named if name in environment}


def command_in_key(command: Sequence[str]) -> list[str]:
    """Return the words of a command that starts a server, for the cache key; of a secret among them a digest."""

    def digested(found: re.Match[str]) -> str:
        return f"{found[1] or ''}{found[2]}={secret_digest(found[2], found[3])}"

    return [_VARIABLE.sub(digested, word) for word in command]


def kill_command(command: Sequence[str]) -> list[str]:
    """Return the command that, followed by a container's id, ends the container; empty if `command` starts none."""
    run = _container(command)
    if run is None:
        return []
    program = next(index for index, word in enumerate(command) if Path(word).name in _CONTAINERS)
    return [*command[: program + 1], "kill"]


def _container(command: Sequence[str]) -> int | None:
    """Return where the word `run` of a container's command is, or None."""
    programs = [index for index, word in enumerate(command) if Path(word).name in _CONTAINERS]
    return command.index("run", programs[0]) if programs and "run" in command[programs[0] :] else None


def _srun(command: Sequence[str]) -> int | None:
    return next((index for index, word in enumerate(command) if Path(word).name == _SRUN), None)


def _check_container(command: Sequence[str], run: int) -> None:
    options, pairs = command[run + 1 :], set(pairwise(command))
    if "sudo" in command[:run]:
        raise ValueError("sudo drops the variables meant for the container; allow this user to run docker without it")
    if not any(word in _HOST_NETWORKS for word in options) and not pairs & {("--network", "host"), ("--net", "host")}:
        raise ValueError("a container needs --network host: the server listens on a port of 127.0.0.1 chosen at start")
    if detached := next((word for word in options if word in ("-d", "--detach")), None):
        raise ValueError(f"{detached} cannot be given: pytest-kld watches the container and ends it with the session")
    if any(word.startswith("--cidfile") for word in options):
        raise ValueError("--cidfile cannot be given: pytest-kld sets it for each server, to end its container")
    chosen = [after for before, after in pairs if before == "--gpus"]
    chosen += [word.partition("=")[2] for word in options if word.startswith("--gpus=")]
    if any(gpus != "all" for gpus in chosen):
        raise ValueError("--gpus must be all: pytest-kld leases GPUs and selects them with CUDA_VISIBLE_DEVICES")


def _check_srun(words: Sequence[str], environment: Mapping[str, str]) -> None:
    if not environment.get("SLURM_JOB_ID") or not environment.get("SLURMD_NODENAME"):
        raise ValueError(
            "srun would start the server on another node, whose 127.0.0.1 is not reachable from here. Run pytest "
            "inside the allocation (`srun … pytest …` or in a batch script), or start the servers and name them with "
            "--kld-ref-url and --kld-candidate-url"
        )
    for word in words:
        if word.partition("=")[0] in ("--export", "--nodelist", "-w", "--nodes", "-N", "--ntasks", "-n"):
            raise ValueError(f"{word} cannot be given to srun: the server runs on this node, with all variables")
