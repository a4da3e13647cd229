"""Makes every Subject: from options and ini keys, from a test's parameters, and from fixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.engines.registry import SERVED, served_kind
from pytest_kld.errors import KLDError, ModelError
from pytest_kld.settings.config import config_of
from pytest_kld.settings.engines import IN_PROCESS, candidate_engines, pick_engine
from pytest_kld.subjects.model import ModelSpec, is_capture
from pytest_kld.subjects.subject import ENGINE, MOE_BACKEND, Subject

if TYPE_CHECKING:
    import pytest

    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.subjects.subject import EnginePath

Role = Literal["reference", "candidate"]


def reference_of(config: KLDConfig) -> Subject:
    """Return the reference that options and ini keys name, or a placeholder if a project's fixture makes it.

    Raises:
        ServerError: it is unknown which engine is meant. See `pick_engine`.

    """
    if config.ref is None:
        return Subject(name="the kld_reference fixture", path=default_path(config))
    return _from_options(config, "reference", config.ref, None if is_capture(config.ref.path) else pick_engine(config))


def reference_as_named(config: KLDConfig) -> Subject:
    """Return the reference for a report, as far as options and ini keys tell. Never fails."""
    try:
        return reference_of(config)
    except KLDError:
        return Subject(name=config.ref.label, model=config.ref) if config.ref else Subject(name="unknown")


def candidates_of(config: KLDConfig) -> list[Subject]:
    """Return the candidates that options and ini keys name, in their order, each in each of its engines."""
    return [
        _from_options(config, "candidate", model, engine)
        for model in config.candidate
        for engine in ((None,) if is_capture(model.path) else candidate_engines(config))
    ]


def candidate_of(item: pytest.Item) -> Subject:
    """Return the candidate that a test measures, as far as its parameters tell. Never fails."""
    return with_axes(*named_candidate_of(item))


def named_candidate_of(item: pytest.Item) -> tuple[Subject, dict[str, str]]:
    """Return the candidate that a test names, and the axes that its other parameters add. Never fails."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    config = config_of(item)
    named = parameters.get("kld_candidate")
    if named is None and len(config.candidate) == 1 and "kld_candidate" not in getattr(item, "fixturenames", ()):
        with suppress(KLDError):
            named = candidates_of(config)[0]  # what `request.getfixturevalue("kld")` measures
    if isinstance(named, str) and not is_overridden(item):
        try:
            named = find_subject(config, named)
        except KLDError:
            named = Subject(name=str(named), path=default_path(config))
    if not isinstance(named, Subject):
        named = Subject(name="the kld_candidate fixture" if named is None else str(named), path=default_path(config))
    if path := parameters.get("kld_path"):
        named = replace(named, path=path)
    backend = parameters.get("kld_moe_backend")
    return named, {} if backend is None else {MOE_BACKEND: str(backend)}


def is_overridden(item: pytest.Item, fixture: str = "kld_candidate") -> bool:
    """Tell whether the project overrides one of our fixtures, so that its parameters need not name models."""
    definitions = item._fixtureinfo.name2fixturedefs.get(fixture, ())  # type: ignore[attr-defined]
    return bool(definitions) and definitions[-1].func.__module__.partition(".")[0] != "pytest_kld"


def find_subject(config: KLDConfig, model: str, role: Role = "candidate", engine: str | None = None) -> Subject:
    """Return a Subject for a model that a test names, in the same way as on the command line.

    Raises:
        ModelError: the name is neither a directory nor a hub id, or the engine is not one of this session's.
        ServerError: it is unknown which engine is meant. See `pick_engine`.

    """
    try:
        spec = ModelSpec.parse(model, config.base)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if is_capture(spec.path):
        return _from_options(config, role, spec, None)
    engines = candidate_engines(config) if role == "candidate" else (pick_engine(config),)
    if engine is None and len(engines) > 1:
        raise ModelError(f"{model}: name its engine, since candidates run in {' and '.join(engines)}")
    if engine is not None and engine not in engines:
        raise ModelError(f"{model}: this session has no {role} in {engine!r}; see --kld-engine, --kld-candidate-engine")
    return _from_options(config, role, spec, engine or engines[0])


def on_path(subject: Subject, path: EnginePath | None) -> Subject:
    """Return a Subject that is measured on a path; None leaves its own."""
    return subject if path is None else replace(subject, path=path)


def with_axes(subject: Subject, axes: Mapping[str, str]) -> Subject:
    """Return a Subject with further axes and the flags that set them."""
    if not axes:
        return subject
    added = replace(subject, axes={**subject.axes, **axes})
    if subject.engine in ("", IN_PROCESS):
        return added
    flags = [*subject.arguments.get("args", ()), *served_kind(subject.engine).axis_flags(axes)]
    return replace(added, arguments={**subject.arguments, "args": flags})


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What fixtures add to the Subjects that come from options and parameters.

    Attributes:
        loading: keyword arguments of `from_pretrained` by role (engine `transformers`).
        server_args: further flags of a server, by role, by engine or by a model's name (served engines).
        server_env: further environment variables, likewise.

    """

    loading: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    server_args: Mapping[str, Sequence[str]] = field(default_factory=dict)
    server_env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def apply(self, subject: Subject, role: Role, axes: Mapping[str, str] | None = None) -> Subject:
        """Return a Subject as it will be run.

        Args:
            subject: from options or parameters.
            role: its role in this session.
            axes: further axes, from a fixture.

        Raises:
            ModelError: an option or fixture is given that the engine does not accept.

        """
        if subject.engine == "":
            return with_axes(subject, axes or {})
        loading, names = self.loading.get(role, {}), (role, subject.engine, subject.spec.name)
        if subject.engine == IN_PROCESS:
            if {*(axes or ()), *subject.axes, *self.server_args, *self.server_env} & {MOE_BACKEND, *names}:
                raise ModelError(
                    "--kld-moe-backend, kld_server_args and kld_server_env are for servers: give "
                    f"{' or '.join(f'--kld-engine={name}' for name in SERVED)}"
                )
            return replace(subject, arguments={**subject.arguments, **loading})
        if loading:
            raise ModelError(
                f"kld_{role}_args is for the engine transformers; flags of servers are given with kld_server_args or "
                "--kld-ref-args and --kld-candidate-args"
            )
        if "url" in subject.arguments:
            return subject
        more = [flag for name in names for flag in self.server_args.get(name, ())]
        variables = {name: value for key in names for name, value in self.server_env.get(key, {}).items()}
        extended = replace(
            subject,
            arguments={**subject.arguments, "args": [*subject.arguments["args"], *more]},
            environment={**subject.environment, **variables},
        )
        return with_axes(extended, axes or {})


def _from_options(config: KLDConfig, role: Role, model: ModelSpec, engine: str | None) -> Subject:
    if is_capture(model.path) or engine is None:
        return Subject(name=model.label, model=model, path=default_path(config))
    axes = {ENGINE: engine} if role == "candidate" and config.candidate_engine else {}
    subject = Subject(name=model.label, model=model, engine=engine, path=default_path(config), axes=axes)
    if engine == IN_PROCESS:
        return subject
    if url := _url(config, role, model):
        return replace(subject, arguments={"url": url})
    flags, variables = (
        (config.ref_args, config.ref_env) if role == "reference" else (config.candidate_args, config.candidate_env)
    )
    return replace(subject, arguments={"args": list(flags)}, environment=dict(variables))


def default_path(config: KLDConfig) -> EnginePath:
    """Return the path of Subjects that no test's parameter puts on another."""
    return "prefill" if config.path == "both" else config.path


def _url(config: KLDConfig, role: Role, model: ModelSpec) -> str | None:
    if role == "reference":
        return config.ref_url
    urls, candidates = config.candidate_url, config.candidate
    return urls[candidates.index(model)] if urls and model in candidates else None
