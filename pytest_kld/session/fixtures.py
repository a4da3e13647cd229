"""The plugin's fixtures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.errors import KLDError, ModelError
from pytest_kld.gate.limits import merge_bounds, needs_extended, parse_marker
from pytest_kld.report.terminal import TerminalProgress
from pytest_kld.session.config import CONFIG, KLDConfig
from pytest_kld.session.kld import KLD
from pytest_kld.session.selection import EngineArguments, Role
from pytest_kld.subjects.model import ModelSpec

if TYPE_CHECKING:
    from pytest_kld.captures.capture import Capture
    from pytest_kld.engines.sglang.pool import ServerHandle
    from pytest_kld.figures.scores import Scores
    from pytest_kld.session.measurement import Measurement
    from pytest_kld.text.windows import Windows


@contextmanager
def _measuring() -> Iterator[None]:
    """Report what makes a measurement impossible as an error of the set-up: the message, without a traceback.

    Warnings of the libraries that load models stay warnings, whatever the project's filters make of its own.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    except KLDError as error:
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None


@pytest.fixture(scope="session")
def kld_config(request: pytest.FixtureRequest) -> KLDConfig:
    """Everything the plugin was told, checked and frozen."""
    return request.config.stash[CONFIG]


@pytest.fixture(scope="session")
def kld_reference_args() -> Mapping[str, Any]:
    """Override: the engine's arguments for the reference, e.g. `{"attn_implementation": "eager"}`.

    The transformers engine passes them to `from_pretrained`. They are part of the cache key.
    """
    return {}


@pytest.fixture(scope="session")
def kld_candidate_args() -> Mapping[str, Any]:
    """Override: the engine's arguments for candidates, e.g. `{"quantization_config": …}`."""
    return {}


@pytest.fixture(scope="session")
def kld_server_args() -> Mapping[str, Sequence[str]]:
    """Override: further flags for SGLang's servers, by role or by a model's name.

    For example `{"reference": ["--tp", "8"], "nvidia/NVFP4": ["--quantization", "modelopt_fp4"]}`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_server_env() -> Mapping[str, Mapping[str, str]]:
    """Override: further environment variables for SGLang's servers, e.g. `{"candidate": {"NCCL_P2P_LEVEL": "SYS"}}`.

    Keys are roles or models' names, as in `kld_server_args`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_moe_backend(request: pytest.FixtureRequest) -> str | None:
    """The MoE runner backend that a candidate is served with; None leaves it to SGLang.

    Parametrized over `--kld-moe-backend`; a test's own
    `@pytest.mark.parametrize("kld_moe_backend", ["triton", …], indirect=True)` takes the place of that.
    """
    backend: str | None = getattr(request, "param", None)
    return backend


@pytest.fixture(scope="session")
def _kld_measurement(kld_config: KLDConfig, request: pytest.FixtureRequest) -> Iterator[Measurement]:
    with _measuring():
        from pytest_kld.session.measurement import Measurement

        measurement = Measurement(kld_config, TerminalProgress(request.config))
    yield measurement
    measurement.close()


@pytest.fixture(scope="session")
def _kld_arguments(
    kld_config: KLDConfig,
    kld_reference_args: Mapping[str, Any],
    kld_candidate_args: Mapping[str, Any],
    kld_server_args: Mapping[str, Sequence[str]],
    kld_server_env: Mapping[str, Mapping[str, str]],
) -> EngineArguments:
    return EngineArguments(
        config=kld_config,
        loading={"reference": kld_reference_args, "candidate": kld_candidate_args},
        server_args=kld_server_args,
        server_env=kld_server_env,
    )


@pytest.fixture(scope="session")
def kld_server(_kld_measurement: Measurement, _kld_arguments: EngineArguments) -> Callable[..., ServerHandle]:
    """A function that boots a SGLang server with the hook on first use and returns its handle.

    Call it with a model as on the command line, and optionally `role="reference"` (flags and environment of the
    reference; by default the candidates') and `moe_backend`. A server is shut down when another needs its GPUs,
    before a comparison, and at the end; call the function again for a running one.
    """

    def serve(model: str, *, role: Role = "candidate", moe_backend: str | None = None) -> ServerHandle:
        with _measuring():
            return _kld_measurement.serve(model, _kld_arguments, role, moe_backend)

    return serve


@pytest.fixture(scope="session")
def kld_windows(_kld_measurement: Measurement) -> Windows:
    """The token windows that both sides are run on; with --kld-windows=auto the most that there may be."""
    with _measuring():
        return _kld_measurement.windows()


@pytest.fixture(scope="session")
def kld_reference(
    _kld_measurement: Measurement,
    kld_config: KLDConfig,
    kld_windows: Windows,
    _kld_arguments: EngineArguments,
) -> Capture:
    """The reference's capture, from the cache or made now."""
    with _measuring():
        if kld_config.ref is None:
            raise ModelError("there is no reference: give --kld-ref=MODEL, or kld_ref in the ini file")
        arguments = _kld_arguments.of("reference", kld_config.ref)
        return _kld_measurement.capture(kld_config.ref, arguments, kld_windows)


@pytest.fixture(scope="session")
def kld_candidate(
    request: pytest.FixtureRequest,
    _kld_measurement: Measurement,
    kld_windows: Windows,
    kld_reference: Capture,
    kld_moe_backend: str | None,
    _kld_arguments: EngineArguments,
) -> Capture:
    """The capture of each candidate in turn, from the cache or made now.

    Parametrized over `--kld-candidate`; a test's own
    `@pytest.mark.parametrize("kld_candidate", ["MODEL", …], indirect=True)` takes the place of that.
    """
    with _measuring():
        model = getattr(request, "param", None)
        if model is None:
            raise ModelError("there is no candidate: give --kld-candidate=MODEL, or kld_candidate in the ini file")
        if isinstance(model, str):
            model = _kld_measurement.find(model)
        arguments = _kld_arguments.of("candidate", model, kld_moe_backend)
        return _kld_measurement.candidate_capture(model, arguments, kld_windows, kld_reference)


@pytest.fixture
def kld(
    request: pytest.FixtureRequest,
    _kld_measurement: Measurement,
    kld_config: KLDConfig,
    kld_windows: Windows,
    kld_reference: Capture,
    kld_candidate: Capture,
    _kld_arguments: EngineArguments,
) -> KLD:
    """The figures of the candidate. Limits of marker, command line and ini are checked after the test's body."""
    from pytest_kld.diagnosis import diagnose

    with _measuring():
        if isinstance(kld_candidate, str):
            raise ModelError(f"kld_candidate is {kld_candidate!r}, a name: parametrize it with indirect=True")
        _require_used(request, _kld_arguments)
        # Scores are no session fixture: a directory may override what they are made of, and pytest would go on with
        # the scores of the directory before.
        scores, spend = _scores(request, _kld_measurement, kld_windows, kld_reference, kld_candidate)
        figures = KLD(
            reference=reference_label(kld_config),
            candidate=candidate_label(request.node),
            bounds=bounds_of(request.node, kld_config),
            scores=scores,
            each_dataset=kld_config.each_dataset,
            confidence=kld_config.confidence,
            spend=spend,
        )
        figures.diagnosis = diagnose(figures.scores, _kld_measurement.tokens)
        return figures


def _scores(
    request: pytest.FixtureRequest,
    measurement: Measurement,
    windows: Windows,
    reference: Capture,
    candidate: Capture,
) -> tuple[Scores, float]:
    """Return the scores, and the share of the error that intervals of them may spend."""
    config = measurement.config
    gated = [item for item in request.session.items if "kld" in getattr(item, "fixturenames", ())]
    extended = config.metrics == "all" or any(needs_extended(bounds_of(item, config)) for item in gated)
    if config.adaptive:
        from pytest_kld.session.rounds import Rounds

        rounds = Rounds(
            measurement=measurement, reference=reference, candidate=candidate, windows=windows, extended=extended
        )
        return rounds.until_decided(bounds_of(request.node, config))
    scores = measurement.scores(reference, candidate, windows, extended=extended)
    return scores.without_first(config.skip_first), 1.0


def _require_used(request: pytest.FixtureRequest, used: EngineArguments) -> None:
    """Refuse a test that sees other arguments than the ones its captures were made with.

    pytest makes a session fixture once, whatever the directories below override.

    Raises:
        ModelError: names the fixture that is overridden for a part of the tests only.

    """
    for fixture, arguments in (
        ("kld_reference_args", used.loading["reference"]),
        ("kld_candidate_args", used.loading["candidate"]),
        ("kld_server_args", used.server_args),
        ("kld_server_env", used.server_env),
    ):
        if request.getfixturevalue(fixture) != arguments:
            raise ModelError(
                f"{fixture} is overridden for a part of the tests, and the models ran with other arguments. Override "
                "it for the whole session, or run the tests of each part apart."
            )


def bounds_of(item: pytest.Item, config: KLDConfig) -> dict[str, float]:
    """Return a test's limits: each from the closest marker that names it, else command line, ini, default."""
    markers = [parse_marker(mark.args, mark.kwargs) for mark in item.iter_markers("kld")]
    return merge_bounds(*markers, dict(config.bounds))


def reference_label(config: KLDConfig) -> str:
    """Return the reference's name for reports."""
    return config.ref.label if config.ref else "the kld_reference fixture"


def candidate_label(item: pytest.Item) -> str:
    """Return the name of the candidate that a test is about."""
    model = _params(item).get("kld_candidate", "the kld_candidate fixture")
    label = model.label if isinstance(model, ModelSpec) else str(model)
    backend = backend_of(item)
    return f"{label} ({backend})" if backend else label


def backend_of(item: pytest.Item) -> str | None:
    """Return the MoE backend that a test names for its candidate, if it does."""
    backend: str | None = _params(item).get("kld_moe_backend")
    return backend


def _params(item: pytest.Item) -> dict[str, Any]:
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return params
