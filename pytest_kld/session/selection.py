"""Which engine runs the models, and with what arguments. Imports no engine before one is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from pytest_kld.engines import Engine
    from pytest_kld.progress import Progress
    from pytest_kld.session.config import KLDConfig
    from pytest_kld.subjects.model import ModelSpec

Role = Literal["reference", "candidate"]
MOE_BACKEND_FLAG = "--moe-runner-backend"


def pick_engine(config: KLDConfig) -> str:
    """Return `sglang` or `transformers`: what was asked for, or SGLang where there is one."""
    if config.engine != "auto":
        return config.engine
    told = config.sglang_command or config.ref_url or config.candidate_url
    return "sglang" if told or find_spec("sglang") is not None else "transformers"


def describe_engine(config: KLDConfig) -> str:
    """Return the engine's name and version for the header; the version only where it runs in this environment."""
    engine = pick_engine(config)
    if config.sglang_command and engine == "sglang":
        return f"sglang ({config.sglang_command[0]})"
    try:
        return f"{engine} {version(engine)}"
    except PackageNotFoundError:
        return engine


def make_engine(config: KLDConfig, progress: Progress) -> Engine:
    """Make the engine; it boots and loads nothing yet."""
    if pick_engine(config) == "transformers":
        from pytest_kld.engines.transformers import TransformersEngine

        return TransformersEngine(dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
    from pytest_kld.engines.sglang.engine import SGLangEngine
    from pytest_kld.engines.sglang.pool import ServerPool, default_command

    capture_dir = config.capture_dir or config.cache_dir / "spool"
    servers = ServerPool(
        command=config.sglang_command or default_command(),
        capture_dir=capture_dir,
        log_dir=config.cache_dir / "logs",
        startup_timeout=config.startup_timeout,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    return SGLangEngine(
        servers=servers,
        capture_dir=capture_dir,
        api_key=os.environ.get(config.api_key_env) if config.api_key_env else None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """The engine's arguments for each model, from options and fixtures.

    Attributes:
        config: the options.
        loading: keyword arguments of `from_pretrained` by role (engine `transformers`).
        server_args: further flags of `launch_server`, by role or by a model's name (engine `sglang`).
        server_env: further environment variables, likewise (engine `sglang`).

    """

    config: KLDConfig
    loading: Mapping[Role, Mapping[str, Any]]
    server_args: Mapping[str, Sequence[str]]
    server_env: Mapping[str, Mapping[str, str]]

    def of(self, role: Role, model: ModelSpec, moe_backend: str | None = None) -> Mapping[str, Any]:
        """Return the arguments for a model.

        Raises:
            ModelError: something is given that the engine does not take.

        """
        config = self.config
        if pick_engine(config) == "transformers":
            if moe_backend is not None or self.server_args or self.server_env:
                raise ModelError(
                    "--kld-moe-backend, kld_server_args and kld_server_env are for SGLang's servers: give "
                    "--kld-engine=sglang"
                )
            return self.loading[role]
        if self.loading[role]:
            raise ModelError(
                f"kld_{role}_args is for the engine transformers; SGLang's flags are given with kld_server_args or "
                "--kld-ref-args and --kld-candidate-args"
            )
        if url := self._url(role, model):
            return {"url": url}
        given, variables = (
            (config.ref_args, config.ref_env) if role == "reference" else (config.candidate_args, config.candidate_env)
        )
        args = [*given, *self.server_args.get(role, ()), *self.server_args.get(model.name, ())]
        if moe_backend is not None:
            args += [MOE_BACKEND_FLAG, moe_backend]
        env = {**dict(variables), **self.server_env.get(role, {}), **self.server_env.get(model.name, {})}
        return {"args": args, "env": env}

    def _url(self, role: Role, model: ModelSpec) -> str | None:
        if role == "reference":
            return self.config.ref_url
        urls, candidates = self.config.candidate_url, self.config.candidate
        return urls[candidates.index(model)] if urls and model in candidates else None
