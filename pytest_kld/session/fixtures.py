"""The plugin's fixtures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.collecting.items import (
    FLOOR,
    GATE,
    PROBLEM,
    SETUP_SECONDS,
    Gate,
    any_decodes,
    asked_path,
    bounds_of,
    is_gated,
    needed_paths,
)
from pytest_kld.errors import KLDError, ModelError
from pytest_kld.gate.limits import needs_extended
from pytest_kld.settings.config import CONFIG, KLDConfig, config_of

if TYPE_CHECKING:  # imported by the fixtures that need them: a session without a gate does not pay for them
    from pytest_kld.captures.capture import Capture
    from pytest_kld.collecting.kld import KLD
    from pytest_kld.collecting.paths import NeededPaths
    from pytest_kld.engines.served.pool import ServerHandle
    from pytest_kld.figures.scores import Scores
    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.gate.speed import SpeedVerdict
    from pytest_kld.measuring.measurement import Measurement
    from pytest_kld.measuring.speed import Speeds
    from pytest_kld.settings.subjects import Overrides, Role
    from pytest_kld.subjects.subject import EnginePath, Subject
    from pytest_kld.text.windows import Windows


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
    """Every option and ini key, checked and frozen; in a suite file's tests, with the settings of that file."""
    config: KLDConfig = getattr(request, "param", None) or request.config.stash[CONFIG]
    return config


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
    """Override this to give servers further flags, by role, by engine or by a model's name.

    For example `{"reference": ["--tp", "8"], "nvidia/NVFP4": ["--quantization", "modelopt_fp4"]}`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_server_env() -> Mapping[str, Mapping[str, str]]:
    """Override this to set further environment variables for servers.

    For example `{"candidate": {"NCCL_P2P_LEVEL": "SYS"}}`. Keys are as in `kld_server_args`.
    """
    return {}


@pytest.fixture(scope="session")
def kld_moe_backend(request: pytest.FixtureRequest) -> str | None:
    """The MoE backend that a candidate is served with; None leaves the choice to the engine.

    Parametrized over `--kld-moe-backend`; a test's own
    `@pytest.mark.parametrize("kld_moe_backend", ["triton", …], indirect=True)` replaces that.
    """
    backend: str | None = getattr(request, "param", None)
    return backend


@pytest.fixture(scope="session")
def kld_path(request: pytest.FixtureRequest) -> EnginePath | None:
    """The path through the engine that a test measures; None leaves it to `--kld-path`.

    Parametrized for `--kld-path=both` and for markers with a `path`; a test's own
    `@pytest.mark.parametrize("kld_path", ["decode"], indirect=True)` replaces that.
    """
    path: EnginePath | None = getattr(request, "param", None)
    if path not in (None, "prefill", "decode"):
        raise pytest.UsageError(f"kld_path: expected prefill or decode, got {path!r}")
    return path


@pytest.fixture(scope="session")
def _kld_measurement(kld_config: KLDConfig, request: pytest.FixtureRequest) -> Iterator[Measurement]:
    with _measuring():
        from pytest_kld.measuring.measurement import Measurement
        from pytest_kld.report.terminal import TerminalProgress

        progress, decodes = TerminalProgress(request.config), any_decodes(request.session.items, kld_config)
        measurement = Measurement(kld_config, progress, decodes=decodes)
    yield measurement
    measurement.close()


@pytest.fixture(scope="session")
def _kld_overrides(
    kld_reference_args: Mapping[str, Any],
    kld_candidate_args: Mapping[str, Any],
    kld_server_args: Mapping[str, Sequence[str]],
    kld_server_env: Mapping[str, Mapping[str, str]],
) -> Overrides:
    from pytest_kld.settings.subjects import Overrides

    return Overrides(
        loading={"reference": kld_reference_args, "candidate": kld_candidate_args},
        server_args=kld_server_args,
        server_env=kld_server_env,
    )


@pytest.fixture(scope="session")
def kld_server(
    kld_config: KLDConfig, _kld_measurement: Measurement, _kld_overrides: Overrides
) -> Callable[..., ServerHandle]:
    """A function that boots a server with the hook on first use and returns its handle.

    Call it with a model, named as on the command line. `role="reference"` uses the flags and environment of the
    reference; the default is those of the candidates. `moe_backend` is optional, and `engine` too unless candidates
    run in several. A server is shut down when another needs its GPUs, before a comparison, and at the end; call the
    function again to get a running one.
    """
    from pytest_kld.settings.subjects import find_subject
    from pytest_kld.subjects.subject import MOE_BACKEND

    def serve(
        model: str, *, role: Role = "candidate", moe_backend: str | None = None, engine: str | None = None
    ) -> ServerHandle:
        with _measuring():
            subject = find_subject(kld_config, model, role, engine)
            axes = {} if moe_backend is None else {MOE_BACKEND: moe_backend}
            return _kld_measurement.serve(_kld_overrides.apply(subject, role, axes))

    return serve


@pytest.fixture(scope="session")
def kld_windows(_kld_measurement: Measurement) -> Windows:
    """The token windows that both sides run on. With --kld-windows=auto these are all windows that may be used."""
    with _measuring():
        return _kld_measurement.windows()


@pytest.fixture(scope="session")
def _kld_speeds(
    request: pytest.FixtureRequest,
    kld_config: KLDConfig,
    _kld_measurement: Measurement,
    _kld_overrides: Overrides,
) -> Speeds | None:
    """The speeds of the session's models; None if no test wants any."""
    from pytest_kld.measuring.speed import Speeds, all_concurrencies
    from pytest_kld.settings.subjects import candidate_of

    gated = [item for item in request.session.items if is_gated(item) and config_of(item) is kld_config]
    concurrencies = all_concurrencies(gated)
    if not concurrencies:
        return None
    return Speeds(_kld_measurement, _kld_overrides, concurrencies, tuple(candidate_of(item) for item in gated))


@pytest.fixture(scope="session")
def _kld_needed_paths(request: pytest.FixtureRequest, kld_config: KLDConfig) -> NeededPaths:
    """The paths on which the session's tests need each Subject."""
    return needed_paths(request.session.items, kld_config)


@pytest.fixture(scope="session")
def kld_reference(
    request: pytest.FixtureRequest,
    _kld_measurement: Measurement,
    kld_config: KLDConfig,
    kld_windows: Windows,
    kld_path: EnginePath | None,
    _kld_overrides: Overrides,
    _kld_needed_paths: NeededPaths,
    _kld_speeds: Speeds | None,
) -> Capture:
    """The reference's capture, from the cache or made now. With --kld-windows=auto it is that of the first round."""
    from pytest_kld.settings.subjects import on_path, reference_of

    with _measuring():
        if kld_config.ref is None:
            raise ModelError("there is no reference: give --kld-ref=MODEL, or kld_ref in the ini file")
        reference = _kld_overrides.apply(on_path(reference_of(kld_config), kld_path), "reference")
        if kld_config.suite is not None:
            fit = _kld_measurement.find_unfit(
                _subjects_of_suite(request, kld_config),
                kld_windows,
                lambda subject: _kld_overrides.apply(subject, "candidate"),
            )
            workers = hasattr(request.config, "workerinput")  # these run side by side already
            if not workers and _kld_speeds is None:  # other servers would slow down the one whose speed is measured
                from pytest_kld.measuring.ahead import capture_side_by_side

                extended = _needs_extended(request, kld_config)
                paths = _kld_needed_paths.beside(reference, is_reference=True)
                references = [reference, *(replace(reference, path=path) for path in paths)]
                capture_side_by_side(_kld_measurement, references, fit, kld_windows, extended=extended)
        also = _kld_needed_paths.beside(reference, is_reference=True)
        captured = _kld_measurement.capture(reference, kld_windows, also)
        if _kld_speeds is not None and kld_config.speedup_over is None:
            _kld_speeds.base(None)  # now, while its server is up
        return captured


def _subjects_of_suite(request: pytest.FixtureRequest, config: KLDConfig) -> list[Subject]:
    """Return the Subjects of a suite that this session runs."""
    from pytest_kld.settings.subjects import candidate_of

    return [
        candidate_of(item)
        for item in request.session.items
        if is_gated(item)
        and config_of(item) is config
        and PROBLEM not in item.stash
        and not item.get_closest_marker("skip")
    ]


@pytest.fixture(scope="session")
def kld_candidate(
    request: pytest.FixtureRequest,
    kld_config: KLDConfig,
    _kld_measurement: Measurement,
    kld_windows: Windows,
    kld_reference: Capture,
    kld_moe_backend: str | None,
    kld_path: EnginePath | None,
    _kld_overrides: Overrides,
    _kld_needed_paths: NeededPaths,
) -> Capture:
    """The capture of each candidate in turn, from the cache or made now. With --kld-windows=auto: the first round's.

    Parametrized over `--kld-candidate`; a test's own
    `@pytest.mark.parametrize("kld_candidate", ["MODEL", …], indirect=True)` replaces that.
    """
    from pytest_kld.settings.subjects import find_subject, on_path
    from pytest_kld.subjects.subject import MOE_BACKEND

    with _measuring():
        if kld_path is None and kld_config.path == "both":
            raise ModelError(
                "--kld-path=both runs a test twice, but this one runs only once, because it gets its fixtures with "
                "`request.getfixturevalue`. Mark it with `pytest.mark.kld`, or name `kld` as an argument."
            )
        named = getattr(request, "param", None)
        if named is None:
            named = _only_candidate(kld_config)
        subject = find_subject(kld_config, named) if isinstance(named, str) else named
        axes = {} if kld_moe_backend is None else {MOE_BACKEND: kld_moe_backend}
        subject = _kld_overrides.apply(on_path(subject, kld_path), "candidate", axes)
        _kld_measurement.require_fit(subject)
        also = _kld_needed_paths.beside(subject)
        return _kld_measurement.candidate_capture(subject, kld_windows, kld_reference, also)


def _only_candidate(config: KLDConfig) -> Subject:
    """Return the only candidate, for a test that requested the fixture while it ran, too late to be parametrized."""
    from pytest_kld.settings.subjects import candidates_of

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
    _kld_needed_paths: NeededPaths,
    _kld_speeds: Speeds | None,
) -> KLD:
    """The gate: its figures are checked against the limits after the test's body, whoever requested it.

    It is separate from `kld`, so that a project's own fixture of that name does not switch the gate off.
    """
    from pytest_kld.collecting.kld import KLD
    from pytest_kld.diagnosis import diagnose
    from pytest_kld.figures.saw import what_was_seen
    from pytest_kld.measuring.floors import Floors
    from pytest_kld.settings.subjects import candidate_of, on_path, reference_of

    with _measuring():
        if isinstance(kld_candidate, str):
            raise ModelError(f"kld_candidate is {kld_candidate!r}, a name: parametrize it with indirect=True")
        _require_used(request, _kld_overrides)
        library = _kld_measurement.library
        candidate = library.subject_of(kld_candidate) or candidate_of(request.node)
        speed = _speed(request, _kld_speeds, candidate)  # before the comparison, which shuts the servers down
        # Scores are not a session fixture: a directory may override what they are computed from, and pytest would
        # reuse the scores of the previous directory.
        windows = _kld_measurement.on_path(kld_windows, candidate.path)
        reference = _kld_measurement.reference_on(candidate.path, kld_reference, kld_windows)
        for capture in (reference, kld_candidate):
            capture.require_path(windows)
        gaps = candidate.path == "decode" and asked_path(request.node, kld_config) == "both"
        scores, spend = _scores(request, _kld_measurement, windows, reference, kld_candidate, gaps=gaps)
        bounds = bounds_of(request.node, kld_config)
        floor = None
        if kld_config.floor:
            floors = Floors(
                measurement=_kld_measurement,
                windows=kld_windows,
                count=len(scores.columns["flags"]),
                extended=_needs_extended(request, kld_config),
                needed=_kld_needed_paths,
            )
            floor = floors.of_pair(reference, kld_candidate, gaps=gaps)
        figures = KLD(
            reference=library.subject_of(reference) or on_path(reference_of(kld_config), candidate.path),
            candidate=candidate,
            bounds=bounds,
            scores=scores,
            each_dataset=kld_config.each_dataset,
            confidence=kld_config.confidence,
            spend=spend,
            floor=floor,
        )
        if kld_config.baseline is not None:
            from pytest_kld.measuring.holding import hold

            figures.baseline = hold(figures, kld_config)
        request.node.stash[FLOOR] = figures.floor_to_json()
        figures.verdict().require_finer(figures.candidate, figures.reference)
        figures.diagnosis = diagnose(figures.scores, _kld_measurement.tokens)
        paths = [candidate.path] if figures.summary.decode_gap is None else ["prefill", "decode"]
        figures.saw = what_was_seen(figures.scores, paths, _kld_measurement.tokens)
        request.node.stash[GATE] = Gate(figures, bounds, speed)
        return figures


@pytest.fixture(scope="session")
def _kld_matrix(
    request: pytest.FixtureRequest,
    kld_config: KLDConfig,
    kld_windows: Windows,
    _kld_measurement: Measurement,
    _kld_overrides: Overrides,
) -> MatrixResult:
    """The figures of a matrix, which `_kld_matrix`'s parameter describes; see `matrices.Matrix`."""
    from pytest_kld.measuring.comparing import Comparing

    with _measuring():
        comparing = Comparing(
            matrix=request.param,
            config=kld_config,
            measurement=_kld_measurement,
            overrides=_kld_overrides,
            windows=kld_windows,
            selected=request.session.items,
            why_unmeasured=_why_unmeasured,
            is_elsewhere=lambda items: any(SETUP_SECONDS not in item.stash for item in items),
        )
        return comparing.result()


def _why_unmeasured(items: Sequence[pytest.Item]) -> str | None:
    """Say why no test of a candidate measured it; None if one did, or if another process may have run one."""
    if items and all(item.get_closest_marker("skip") for item in items):
        return "its test is skipped"
    if problem := next((item.stash[PROBLEM] for item in items if PROBLEM in item.stash), None):
        return f"it cannot be run: {problem}"
    if items and all(SETUP_SECONDS in item.stash and GATE not in item.stash for item in items):
        return "its own test did not measure it"
    return None


@pytest.fixture
def kld(_kld_gate: KLD) -> KLD:
    """The figures of one candidate, e.g. `kld.mean` and `kld.p99`, in nats.

    After the test's body they are checked against the limits of marker, command line, ini file and defaults.
    """
    return _kld_gate


def _speed(request: pytest.FixtureRequest, speeds: Speeds | None, candidate: Subject) -> SpeedVerdict | None:
    """Return the verdict on a candidate's speed; None if the test wants none."""
    from pytest_kld.measuring.speed import speed_bounds_of, speed_verdict

    if speeds is not None:
        return speed_verdict(request.node, speeds, candidate)
    if bounds := speed_bounds_of(request.node):
        raise ModelError(
            f"{', '.join(bounds)}: no speed is measured; give --kld-throughput, or throughput in the marker"
        )
    return None


def _scores(
    request: pytest.FixtureRequest,
    measurement: Measurement,
    windows: Windows,
    reference: Capture,
    candidate: Capture,
    *,
    gaps: bool,
) -> tuple[Scores, float]:
    """Return the scores, and the share of the error that their intervals may spend."""
    config = measurement.config
    extended = _needs_extended(request, config)
    if config.adaptive:
        from pytest_kld.measuring.rounds import Rounds

        rounds = Rounds(
            measurement=measurement,
            reference=reference,
            candidate=candidate,
            windows=windows,
            extended=extended,
            gaps=gaps,
        )
        return rounds.until_decided(bounds_of(request.node, config))
    scores = measurement.scoring.scores(reference, candidate, windows, extended=extended)
    if gaps:
        scores = measurement.scoring.with_gaps(scores, reference, candidate, windows)
    return scores.without_first(config.skip_first), 1.0


def _needs_extended(request: pytest.FixtureRequest, config: KLDConfig) -> bool:
    """Tell whether any test that shares these settings needs the second pass."""
    gated = [item for item in request.session.items if is_gated(item) and config_of(item) is config]
    return config.needs_all_metrics or any(needs_extended(bounds_of(item, config)) for item in gated)


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
