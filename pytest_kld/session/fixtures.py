"""The plugin's fixtures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.errors import KLDError, ModelError
from pytest_kld.gate.limits import merge_bounds, needs_extended, parse_marker
from pytest_kld.session.config import CONFIG, KLDConfig

if TYPE_CHECKING:  # imported by the fixtures that need them: a session without a gate does not pay for them
    from pytest_kld.captures.capture import Capture
    from pytest_kld.engines.served.pool import ServerHandle
    from pytest_kld.figures.scores import Scores
    from pytest_kld.session.kld import KLD
    from pytest_kld.session.measurement import Measurement
    from pytest_kld.session.subjects import Overrides, Role
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows


@dataclass(frozen=True, slots=True)
class Gate:
    """A test's figures, and the limits that the test had when they were measured."""

    kld: KLD
    bounds: Mapping[str, float]


GATE = pytest.StashKey[Gate]()
"""What was measured for a test; absent if nothing was."""


def has_result(item: pytest.Item) -> bool:
    """Tell whether a test has a result to report: it is gated, or it gained a gate or a marker while it ran."""
    return is_gated(item) or GATE in item.stash or item.get_closest_marker("kld") is not None


def uses_kld(item: pytest.Item) -> bool:
    """Tell whether a test uses any of our fixtures, so that its failure may name models and texts."""
    return any(name.lstrip("_").startswith("kld") for name in getattr(item, "fixturenames", ()))


def is_gated(item: pytest.Item) -> bool:
    """Tell whether limits are checked after this test."""
    return "_kld_gate" in getattr(item, "fixturenames", ())


@contextmanager
def _measuring() -> Iterator[None]:
    """Report an error that prevents a measurement as a set-up error: its message, without a traceback.

    Warnings from the libraries that load models stay warnings, whatever the project's warning filters are.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    except KLDError as error:
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None


@pytest.fixture(scope="session")
def kld_config(request: pytest.FixtureRequest) -> KLDConfig:
    """Every option and ini key, checked and frozen."""
    return request.config.stash[CONFIG]


@pytest.fixture(scope="session")
def kld_reference_args() -> Mapping[str, Any]:
    """Override this to give the engine arguments for the reference, e.g. `{"attn_implementation": "eager"}`.

    The transformers engine passes them to `from_pretrained`. They are part of the cache key.
    """
    return {}


@pytest.fixture(scope="session")
def kld_candidate_args() -> Mapping[str, Any]:
    """Override this to give the engine arguments for candidates, e.g. `{"quantization_config": …}`.

    See `kld_reference_args`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_server_args() -> Mapping[str, Sequence[str]]:
    """Override this to give SGLang's servers further flags, by role or by a model's name.

    For example `{"reference": ["--tp", "8"], "nvidia/NVFP4": ["--quantization", "modelopt_fp4"]}`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_server_env() -> Mapping[str, Mapping[str, str]]:
    """Override this to set further environment variables for SGLang's servers.

    For example `{"candidate": {"NCCL_P2P_LEVEL": "SYS"}}`. Keys are roles or models' names, as in `kld_server_args`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_moe_backend(request: pytest.FixtureRequest) -> str | None:
    """The MoE runner backend that a candidate is served with; None leaves the choice to SGLang.

    Parametrized over `--kld-moe-backend`; a test's own
    `@pytest.mark.parametrize("kld_moe_backend", ["triton", …], indirect=True)` replaces that.
    """
    backend: str | None = getattr(request, "param", None)
    return backend


@pytest.fixture(scope="session")
def _kld_measurement(kld_config: KLDConfig, request: pytest.FixtureRequest) -> Iterator[Measurement]:
    with _measuring():
        from pytest_kld.report.terminal import TerminalProgress
        from pytest_kld.session.measurement import Measurement

        measurement = Measurement(kld_config, TerminalProgress(request.config))
    yield measurement
    measurement.close()


@pytest.fixture(scope="session")
def _kld_overrides(
    kld_reference_args: Mapping[str, Any],
    kld_candidate_args: Mapping[str, Any],
    kld_server_args: Mapping[str, Sequence[str]],
    kld_server_env: Mapping[str, Mapping[str, str]],
) -> Overrides:
    from pytest_kld.session.subjects import Overrides

    return Overrides(
        loading={"reference": kld_reference_args, "candidate": kld_candidate_args},
        server_args=kld_server_args,
        server_env=kld_server_env,
    )


@pytest.fixture(scope="session")
def kld_server(
    kld_config: KLDConfig, _kld_measurement: Measurement, _kld_overrides: Overrides
) -> Callable[..., ServerHandle]:
    """A function that boots an SGLang server with the hook on first use and returns its handle.

    Call it with a model, named as on the command line. `role="reference"` uses the flags and environment of the
    reference; the default is those of the candidates. `moe_backend` is optional. A server is shut down when another
    needs its GPUs, before a comparison, and at the end; call the function again to get a running one.
    """
    from pytest_kld.session.subjects import find_subject
    from pytest_kld.subjects.subject import MOE_BACKEND

    def serve(model: str, *, role: Role = "candidate", moe_backend: str | None = None) -> ServerHandle:
        with _measuring():
            subject = find_subject(kld_config, model, role)
            axes = {} if moe_backend is None else {MOE_BACKEND: moe_backend}
            return _kld_measurement.serve(_kld_overrides.apply(subject, role, axes))

    return serve


@pytest.fixture(scope="session")
def kld_windows(_kld_measurement: Measurement) -> Windows:
    """The token windows that both sides run on. With --kld-windows=auto these are all windows that may be used."""
    with _measuring():
        return _kld_measurement.windows()


@pytest.fixture(scope="session")
def kld_reference(
    _kld_measurement: Measurement,
    kld_config: KLDConfig,
    kld_windows: Windows,
    _kld_overrides: Overrides,
) -> Capture:
    """The reference's capture, from the cache or made now. With --kld-windows=auto it is that of the first round."""
    from pytest_kld.session.subjects import reference_of

    with _measuring():
        if kld_config.ref is None:
            raise ModelError("there is no reference: give --kld-ref=MODEL, or kld_ref in the ini file")
        reference = _kld_overrides.apply(reference_of(kld_config), "reference")
        return _kld_measurement.capture(reference, kld_windows)


@pytest.fixture(scope="session")
def kld_candidate(
    request: pytest.FixtureRequest,
    kld_config: KLDConfig,
    _kld_measurement: Measurement,
    kld_windows: Windows,
    kld_reference: Capture,
    kld_moe_backend: str | None,
    _kld_overrides: Overrides,
) -> Capture:
    """The capture of each candidate in turn, from the cache or made now. With --kld-windows=auto: the first round's.

    Parametrized over `--kld-candidate`; a test's own
    `@pytest.mark.parametrize("kld_candidate", ["MODEL", …], indirect=True)` replaces that.
    """
    from pytest_kld.session.subjects import find_subject
    from pytest_kld.subjects.subject import MOE_BACKEND

    with _measuring():
        named = getattr(request, "param", None)
        if named is None:
            named = _only_candidate(kld_config)
        subject = find_subject(kld_config, named) if isinstance(named, str) else named
        axes = {} if kld_moe_backend is None else {MOE_BACKEND: kld_moe_backend}
        subject = _kld_overrides.apply(subject, "candidate", axes)
        return _kld_measurement.candidate_capture(subject, kld_windows, kld_reference)


def _only_candidate(config: KLDConfig) -> Subject:
    """Return the only candidate, for a test that requested the fixture while it ran, too late to be parametrized."""
    from pytest_kld.session.subjects import candidates_of

    candidates = candidates_of(config)
    if not candidates:
        raise ModelError("there is no candidate: give --kld-candidate=MODEL, or kld_candidate in the ini file")
    if len(candidates) > 1:
        raise ModelError(
            f"there are {len(candidates)} candidates, but this test runs only once, because it gets its fixtures with "
            "`request.getfixturevalue`. Mark it with `pytest.mark.kld`, or name `kld` as an argument."
        )
    return candidates[0]


@pytest.fixture
def _kld_gate(
    request: pytest.FixtureRequest,
    _kld_measurement: Measurement,
    kld_config: KLDConfig,
    kld_windows: Windows,
    kld_reference: Capture,
    kld_candidate: Capture,
    _kld_overrides: Overrides,
) -> KLD:
    """The gate: its figures are checked against the limits after the test's body, whoever requested it.

    It is separate from `kld`, so that a project's own fixture of that name does not switch the gate off.
    """
    from pytest_kld.diagnosis import diagnose
    from pytest_kld.session.kld import KLD
    from pytest_kld.session.subjects import candidate_of, reference_of

    with _measuring():
        if isinstance(kld_candidate, str):
            raise ModelError(f"kld_candidate is {kld_candidate!r}, a name: parametrize it with indirect=True")
        _require_used(request, _kld_overrides)
        # Scores are not a session fixture: a directory may override what they are computed from, and pytest would
        # reuse the scores of the previous directory.
        scores, spend = _scores(request, _kld_measurement, kld_windows, kld_reference, kld_candidate)
        bounds = bounds_of(request.node, kld_config)
        library = _kld_measurement.library
        figures = KLD(
            reference=library.subject_of(kld_reference) or reference_of(kld_config),
            candidate=library.subject_of(kld_candidate) or candidate_of(request.node),
            bounds=bounds,
            scores=scores,
            each_dataset=kld_config.each_dataset,
            confidence=kld_config.confidence,
            spend=spend,
        )
        figures.diagnosis = diagnose(figures.scores, _kld_measurement.tokens)
        request.node.stash[GATE] = Gate(figures, bounds)
        return figures


@pytest.fixture
def kld(_kld_gate: KLD) -> KLD:
    """The figures of one candidate, e.g. `kld.mean` and `kld.p99`, in nats.

    After the test's body they are checked against the limits of marker, command line, ini file and defaults.
    """
    return _kld_gate


def _scores(
    request: pytest.FixtureRequest,
    measurement: Measurement,
    windows: Windows,
    reference: Capture,
    candidate: Capture,
) -> tuple[Scores, float]:
    """Return the scores, and the share of the error that their intervals may spend."""
    config = measurement.config
    gated = [item for item in request.session.items if is_gated(item)]
    extended = config.metrics == "all" or any(needs_extended(bounds_of(item, config)) for item in gated)
    if config.adaptive:
        from pytest_kld.session.rounds import Rounds

        rounds = Rounds(
            measurement=measurement, reference=reference, candidate=candidate, windows=windows, extended=extended
        )
        return rounds.until_decided(bounds_of(request.node, config))
    scores = measurement.scores(reference, candidate, windows, extended=extended)
    return scores.without_first(config.skip_first), 1.0


def _require_used(request: pytest.FixtureRequest, used: Overrides) -> None:
    """Reject a test that sees other arguments than the ones its captures were made with.

    pytest creates a session fixture once, even if subdirectories override what it uses.

    Raises:
        ModelError: names the fixture that is overridden for some of the tests only.

    """
    for fixture, arguments in (
        ("kld_reference_args", used.loading["reference"]),
        ("kld_candidate_args", used.loading["candidate"]),
        ("kld_server_args", used.server_args),
        ("kld_server_env", used.server_env),
    ):
        if request.getfixturevalue(fixture) != arguments:
            raise ModelError(
                f"{fixture} is overridden for some of the tests only, but the models ran with other arguments. "
                "Override it for the whole session, or run each of these groups of tests in its own session."
            )


def bounds_of(item: pytest.Item, config: KLDConfig) -> dict[str, float]:
    """Return a test's limits: each from the closest marker that names it, else from Subject, option, ini or default."""
    from pytest_kld.session.subjects import candidate_of

    markers = [parse_marker(mark.args, mark.kwargs) for mark in item.iter_markers("kld")]
    return merge_bounds(*markers, dict(candidate_of(item).limits), dict(config.bounds))
