"""Choose and create the engine that runs the models. No engine is imported before it is created."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kld.engines import Engine
    from pytest_kld.progress import Progress
    from pytest_kld.session.config import KLDConfig


def pick_engine(config: KLDConfig) -> str:
    """Return `sglang` or `transformers`: the requested engine, or SGLang if it is installed or named."""
    if config.engine != "auto":
        return config.engine
    told = config.sglang_command or config.ref_url or config.candidate_url
    return "sglang" if told or find_spec("sglang") is not None else "transformers"


def describe_engine(config: KLDConfig) -> str:
    """Return the engine's name for the header, and its version if it runs in this environment."""
    from importlib.metadata import PackageNotFoundError, version

    engine = pick_engine(config)
    if config.sglang_command and engine == "sglang":
        return f"sglang ({config.sglang_command[0]})"
    try:
        return f"{engine} {version(engine)}"
    except PackageNotFoundError:
        return engine


def make_engine(name: str, config: KLDConfig, progress: Progress) -> Engine:
    """Create an engine by its name; it boots and loads nothing yet."""
    if name == "transformers":
        from pytest_kld.engines.transformers import TransformersEngine

        return TransformersEngine(dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
    from pytest_kld.engines.registry import served_kind
    from pytest_kld.engines.served.engine import ServedEngine
    from pytest_kld.engines.served.kind import Settings
    from pytest_kld.engines.served.pool import ServerPool, default_command

    kind = served_kind(name)
    capture_dir = config.capture_dir or config.cache_dir / "spool"
    servers = ServerPool(
        kind=kind,
        command=config.sglang_command or default_command(kind),
        capture_dir=capture_dir,
        log_dir=config.cache_dir / "logs",
        startup_timeout=config.startup_timeout,
        settings=Settings(dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code),
        progress=progress,
    )
    return ServedEngine(
        servers=servers,
        capture_dir=capture_dir,
        api_key=os.environ.get(config.api_key_env) if config.api_key_env else None,
    )
