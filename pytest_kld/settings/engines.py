"""Choose and create the engines that run the models. No engine is imported before it is created."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_kld.engines.registry import SERVED, served_kind
from pytest_kld.errors import ServerError

if TYPE_CHECKING:
    from pytest_kld.engines import Engine
    from pytest_kld.progress import Progress
    from pytest_kld.settings.config import KLDConfig

IN_PROCESS = "transformers"


def pick_engine(config: KLDConfig) -> str:
    """Return the reference's engine: the requested one, or the one that is installed or whose command is given.

    Raises:
        ServerError: there are several, or a running server does not tell which it is.

    """
    if config.engine != "auto":
        return config.engine
    commanded = [name for name in SERVED if command_of(name, config)]
    found = commanded or [name for name in SERVED if find_spec(name) is not None]
    if len(found) > 1:
        how = "commands are given for both" if commanded else "both are installed"
        choices = " or ".join(f"--kld-engine={name}" for name in found)
        raise ServerError(f"--kld-engine: {' and '.join(found)} can run the models, since {how}; give {choices}")
    if not found and (config.ref_url or config.candidate_url):
        choices = " or ".join(f"--kld-engine={name}" for name in SERVED)
        raise ServerError(f"--kld-engine: name the engine of the servers that are given by URL: {choices}")
    return found[0] if found else IN_PROCESS


def candidate_engines(config: KLDConfig) -> tuple[str, ...]:
    """Return the engines that each candidate is run with.

    Raises:
        ServerError: see `pick_engine`.

    """
    return config.candidate_engine or (pick_engine(config),)


def command_of(name: str, config: KLDConfig) -> tuple[str, ...] | None:
    """Return the command that the user gave for a served engine, if any."""
    command: tuple[str, ...] | None = getattr(config, f"{name}_command")
    return command


def describe_engine(config: KLDConfig) -> str:
    """Return the reference's engine for the header, its version if it runs in this environment, and the candidates'."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        engine = pick_engine(config)
    except ServerError:  # only captures are compared, else this was refused at start-up
        return "none"
    more = "".join(f", candidates in {name}" for name in config.candidate_engine)
    if engine in SERVED and (command := command_of(engine, config)):
        return f"{engine} ({command[0]}){more}"
    try:
        return f"{engine} {version(engine)}{more}"
    except PackageNotFoundError:
        return f"{engine}{more}"


def check_engines(config: KLDConfig) -> None:
    """Reject options that do not tell the engines of this session, or that these do not take.

    Raises:
        ServerError: names the option, and what to do instead.

    """
    candidates = candidate_engines(config)
    if config.moe_backend and (config.candidate_url or IN_PROCESS in candidates):
        raise ServerError("--kld-moe-backend needs servers that pytest-kld boots, one for each backend")
    if len(candidates) > 1 and config.candidate_url:
        raise ServerError("--kld-candidate-url: a running server has one engine; give one --kld-candidate-engine")
    sides = (
        ("ref", config.ref_args, config.ref_env, (pick_engine(config),)),
        ("candidate", config.candidate_args, config.candidate_env, candidates),
    )
    for side, flags, variables, engines in sides:
        option = f"--kld-{side}-args" if flags else f"--kld-{side}-env"
        served = [name for name in engines if name in SERVED]
        if (flags or variables) and not served:
            choices = " or ".join(f"--kld-engine={name}" for name in SERVED)
            raise ServerError(f"{option}: {engines[0]} runs no server; give {choices}")
        if flags and len(served) > 1:
            raise ServerError(
                f"{option}: the candidates run in {' and '.join(served)}, which take different flags; give them by "
                "engine in the fixture kld_server_args"
            )
        for name in served:
            served_kind(name).check_arguments(flags, option)


def make_engine(name: str, config: KLDConfig, progress: Progress, *, decodes: bool) -> Engine:
    """Create an engine by its name; it boots and loads nothing yet.

    Args:
        name: its name.
        config: the settings.
        progress: receives notes about boots and waits.
        decodes: whether any test decodes; then each server is booted so that it can, also for a prefill.

    """
    if name == IN_PROCESS:
        from pytest_kld.engines.transformers import TransformersEngine

        return TransformersEngine(dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
    from pytest_kld.engines.served.engine import ServedEngine
    from pytest_kld.engines.served.kind import Settings
    from pytest_kld.engines.served.pool import ServerPool, default_command

    kind = served_kind(name)
    capture_dir = config.capture_dir or config.cache_dir / "spool"
    servers = ServerPool(
        kind=kind,
        command=command_of(name, config) or default_command(kind),
        capture_dir=capture_dir,
        log_dir=config.cache_dir / "logs",
        startup_timeout=config.startup_timeout,
        settings=Settings(
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            decoded_together=config.concurrency if decodes else 1,
        ),
        progress=progress,
    )
    return ServedEngine(
        servers=servers,
        capture_dir=capture_dir,
        api_key=api_key(config.api_key_env),
    )


def api_key(variable: str | None) -> str | None:
    """Return the key in a variable; None if there is none.

    Raises:
        ServerError: no HTTP header can hold it. The message does not quote it; that of an HTTP library would.

    """
    key = None if variable is None else os.environ.get(variable)
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ServerError(
            f"--kld-api-key-env={variable}: the key in it has a character that no HTTP header can hold, such as a "
            "space or a line feed at its end"
        )
    return key
