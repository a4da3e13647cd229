"""Makes every Subject: from options and ini keys, from a test's parameters, and from fixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.engines.registry import served_kind
from pytest_kld.errors import ModelError
from pytest_kld.session.config import CONFIG
from pytest_kld.session.engines import pick_engine
from pytest_kld.subjects.model import ModelSpec, is_capture
from pytest_kld.subjects.subject import MOE_BACKEND, Subject

if TYPE_CHECKING:
    import pytest

    from pytest_kld.session.config import KLDConfig

Role = Literal["reference", "candidate"]


def reference_of(config: KLDConfig) -> Subject:
    """Return the reference that options and ini keys name, or a placeholder if a project's fixture makes it."""
    if config.ref is None:
        return Subject(name="the kld_reference fixture")
    return _from_options(config, "reference", config.ref)


def candidates_of(config: KLDConfig) -> list[Subject]:
    """Return the candidates that options and ini keys name, in their order."""
    return [_from_options(config, "candidate", model) for model in config.candidate]


def candidate_of(item: pytest.Item) -> Subject:
    """Return the candidate that a test measures, as far as its parameters tell. Never fails."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    config = item.config.stash[CONFIG]
    named = parameters.get("kld_candidate")
    if named is None and len(config.candidate) == 1 and "kld_candidate" not in getattr(item, "fixturenames", ()):
        named = candidates_of(config)[0]  # what `request.getfixturevalue("kld")` measures
    if isinstance(named, str) and not is_overridden(item):
        try:
            named = find_subject(config, named)
        except ModelError:
            named = Subject(name=str(named))
    if not isinstance(named, Subject):
        named = Subject(name="the kld_candidate fixture" if named is None else str(named))
    backend = parameters.get("kld_moe_backend")
    return with_axes(named, {} if backend is None else {MOE_BACKEND: str(backend)})


def is_overridden(item: pytest.Item, fixture: str = "kld_candidate") -> bool:
    """Tell whether the project overrides one of our fixtures, so that its parameters need not name models."""
    definitions = item._fixtureinfo.name2fixturedefs.get(fixture, ())  # type: ignore[attr-defined]
    return bool(definitions) and definitions[-1].func.__module__.partition(".")[0] != "pytest_kld"


def find_subject(config: KLDConfig, model: str, role: Role = "candidate") -> Subject:
    """Return a Subject for a model that a test names, in the same way as on the command line.

    Raises:
        ModelError: the name is neither a directory nor a hub id.

    """
    try:
        return _from_options(config, role, ModelSpec.parse(model, config.base))
    except ValueError as error:
        raise ModelError(str(error)) from None


def with_axes(subject: Subject, axes: Mapping[str, str]) -> Subject:
    """Return a Subject with further axes and the flags that set them."""
    if not axes:
        return subject
    added = replace(subject, axes={**subject.axes, **axes})
    if subject.engine in ("", "transformers"):
        return added
    flags = [*subject.arguments.get("args", ()), *served_kind(subject.engine).axis_flags(axes)]
    return replace(added, arguments={**subject.arguments, "args": flags})


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What fixtures add to the Subjects that come from options and parameters.

    Attributes:
        loading: keyword arguments of `from_pretrained` by role (engine `transformers`).
        server_args: further flags of a server, by role or by a model's name (served engines).
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
        loading = self.loading.get(role, {})
        if subject.engine == "transformers":
            if axes or subject.axes or self.server_args or self.server_env:
                raise ModelError(
                    "--kld-moe-backend, kld_server_args and kld_server_env are for SGLang's servers: give "
                    "--kld-engine=sglang"
                )
            return replace(subject, arguments={**subject.arguments, **loading})
        if loading:
            raise ModelError(
                f"kld_{role}_args is for the engine transformers; SGLang's flags are given with kld_server_args or "
                "--kld-ref-args and --kld-candidate-args"
            )
        if "url" in subject.arguments:
            return subject
        names = (role, subject.spec.name)
        more = [flag for name in names for flag in self.server_args.get(name, ())]
        variables = {name: value for key in names for name, value in self.server_env.get(key, {}).items()}
        extended = replace(
            subject,
            arguments={**subject.arguments, "args": [*subject.arguments["args"], *more]},
            environment={**subject.environment, **variables},
        )
        return with_axes(extended, axes or {})


def _from_options(config: KLDConfig, role: Role, model: ModelSpec) -> Subject:
    if is_capture(model.path):
        return Subject(name=model.label, model=model)
    engine = pick_engine(config)
    subject = Subject(name=model.label, model=model, engine=engine)
    if engine == "transformers":
        return subject
    if url := _url(config, role, model):
        return replace(subject, arguments={"url": url})
    flags, variables = (
        (config.ref_args, config.ref_env) if role == "reference" else (config.candidate_args, config.candidate_env)
    )
    return replace(subject, arguments={"args": list(flags)}, environment=dict(variables))


def _url(config: KLDConfig, role: Role, model: ModelSpec) -> str | None:
    if role == "reference":
        return config.ref_url
    urls, candidates = config.candidate_url, config.candidate
    return urls[candidates.index(model)] if urls and model in candidates else None
