"""`pytest-kld doctor`: what a gate needs, and known issues."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pytest_kld.command.output import Exit, as_json, cache_option, print_json, print_lines

if TYPE_CHECKING:
    from pytest_kld.subjects.model import ModelSpec

_PACKAGES = ("pytest-kld", "pytest", "torch", "transformers", "safetensors", "numpy", "huggingface_hub", "datasets")
_LITTLE_BYTES = 10_000_000_000
_HUB_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what was looked at.
        state: `ok`; `note`: worth knowing; `problem`: a gate would fail or be wrong.
        what: what was found.
        fix: what to do about it.

    """

    about: str
    state: Literal["ok", "note", "problem"]
    what: str
    fix: str = ""


@click.command(
    epilog="Exit codes: 0 if nothing stands in the way of a gate, 1 if something does, 2 if an argument is wrong."
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--sglang-command", metavar="COMMAND", help="As --kld-sglang-command.")
@click.option("--vllm-command", metavar="COMMAND", help="As --kld-vllm-command.")
@click.option("--offline", is_flag=True, help="Do not ask the hub.")
@cache_option
@as_json
@click.pass_context
def doctor(
    context: click.Context,
    models: tuple[str, ...],
    sglang_command: str | None,
    vllm_command: str | None,
    offline: bool,
    root: Path,
    in_json: bool,
) -> None:
    """Look at versions, engines and their hook, GPUs, disk and hub, and at known issues of the MODELs.

    MODELs are directories or hub ids. Of each, the known issues that apply to it on this machine are listed, each with
    what to do.
    """
    from pytest_kld.subjects.model import ModelSpec

    try:
        named = [ModelSpec.parse(text, Path.cwd()) for text in models]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="MODEL") from None
    found = [
        *_versions(),
        *_engine("sglang", sglang_command),
        *_engine("vllm", vllm_command),
        *_gpus(),
        *_disk(root),
        *([] if offline else _hub()),
        *_issues("this machine", {}),
        *(finding for model in named for finding in _model(model, offline)),
    ]
    if in_json:
        print_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            word = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}[finding.state]
            print_lines([f"{word} {finding.about}: {finding.what}"])
            if finding.fix:
                print_lines([f"          {finding.fix}"])
    problems = any(finding.state == "problem" for finding in found)
    context.exit(Exit.NOT_IN_ORDER if problems else Exit.IN_ORDER)


def _versions() -> Iterator[Finding]:
    known = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            yield Finding(about=package, state="problem", what="is not installed", fix="pip install pytest-kld")
    yield Finding(about="versions", state="ok", what=", ".join(f"{name} {number}" for name, number in known.items()))


def _engine(name: str, command: str | None) -> Iterator[Finding]:
    """Ask where an engine runs whether the hook is there, in the same version."""
    from importlib.util import find_spec

    from pytest_kld.engines.registry import served_kind
    from pytest_kld.engines.served.kind import Settings
    from pytest_kld.engines.served.pool import ServerPool, default_command
    from pytest_kld.errors import ServerError
    from pytest_kld.progress import Silent

    kind = served_kind(name)
    if command is None and find_spec(name) is None:
        fix = f"To use it, install it here, or name the command that starts it with {kind.command_option}."
        yield Finding(about=kind.title, state="note", what="is not installed in this environment", fix=fix)
        return
    nowhere = Path(os.devnull)
    pool = ServerPool(
        kind=kind,
        command=default_command(kind) if command is None else shlex.split(command),
        capture_dir=nowhere,
        log_dir=nowhere,
        startup_timeout=0,
        settings=Settings(dtype="auto", device="auto", trust_remote_code=False),
        progress=Silent(),
    )
    try:
        installed = pool.installed({})
    except ServerError as error:
        yield Finding(about=kind.title, state="problem", what=str(error))
        return
    versions = ", ".join(f"{package} {number}" for package, number in installed.versions.items())
    yield Finding(about=kind.title, state="ok", what=f"the hook is in place; {versions}")


def _gpus() -> Iterator[Finding]:
    from pytest_kld.servers.gpus import query_gpus

    names, memory = query_gpus("name"), query_gpus("memory.total")
    if not names:
        what = "nvidia-smi finds none: models run on the CPU"
        yield Finding(about="GPUs", state="note", what=what, fix="Pass --gpus to docker if there should be some.")
        return
    yield Finding(about="GPUs", state="ok", what=", ".join(map(" ".join, zip(names, memory, strict=False))))
    import torch

    if not torch.cuda.is_available():
        fix = "Install a torch with CUDA; servers in other environments are not affected."
        yield Finding(about="GPUs", state="note", what="torch finds none of them: comparisons run on the CPU", fix=fix)


def _disk(root: Path) -> Iterator[Finding]:
    from pytest_kld.captures.cache import format_bytes, use_and_bytes

    above = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(above, os.W_OK):
        fix = "Choose another with --kld-cache-dir."
        yield Finding(about="cache", state="problem", what=f"{root} cannot be written", fix=fix)
        return
    free = shutil.disk_usage(above).free
    taken = use_and_bytes(root)[1] if root.is_dir() else 0
    what = f"{root} takes {format_bytes(taken)}, and {format_bytes(free)} are free"
    if free < _LITTLE_BYTES:
        fix = "`pytest-kld cache prune` makes room; --kld-cache-dir names another disk."
        yield Finding(about="cache", state="note", what=what, fix=fix)
    else:
        yield Finding(about="cache", state="ok", what=what)


def _hub() -> Iterator[Finding]:
    import requests
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding(about="hub", state="note", what="HF_HUB_OFFLINE is set: only what is in its cache can be used")
        return
    try:
        answer = requests.head(constants.ENDPOINT, timeout=_HUB_SECONDS, allow_redirects=True)
        answer.raise_for_status()
    except requests.RequestException as error:
        what = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        fix = "Models and texts in its cache work with HF_HUB_OFFLINE=1; HF_ENDPOINT names a mirror."
        yield Finding(about="hub", state="note", what=what, fix=fix)
        return
    token = "with a token" if get_token() else "without a token: gated models cannot be loaded"
    yield Finding(about="hub", state="ok", what=f"{constants.ENDPOINT} answers, {token}")


def _model(model: ModelSpec, offline: bool) -> Iterator[Finding]:
    from pytest_kld.subjects.model import is_capture

    if is_capture(model.path):
        yield Finding(about=model.label, state="ok", what="is a capture: nothing needs to run it")
        return
    try:
        config = _config(model, offline)
    except Exception as error:  # the hub's client can raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        fix = "Is the name right? A gated model needs a token: `hf auth login`."
        yield Finding(about=model.label, state="problem", what=f"its config.json cannot be read: {reason}", fix=fix)
        return
    issues = list(_issues(model.label, config))
    yield from issues
    if not issues:
        yield Finding(about=model.label, state="ok", what="no known issue applies")


def _config(model: ModelSpec, offline: bool) -> dict[str, Any]:
    if model.path is not None:
        path = model.path / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        found = hf_hub_download(model.name, "config.json", revision=model.revision, local_files_only=offline)
        path = Path(found)
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not an object")
    return config


def _issues(about: str, config: dict[str, Any]) -> Iterator[Finding]:
    from pytest_kld.command.known_issues import Machine, issues_of
    from pytest_kld.servers.gpus import query_gpus

    of_machine = Machine(capabilities=query_gpus("compute_cap"), environment=os.environ)
    general = issues_of({}, of_machine)
    for issue in issues_of(config, of_machine):
        if config and issue in general:
            continue  # said of the machine
        state: Literal["note", "problem"] = "note" if issue.harmless else "problem"
        yield Finding(about=about, state=state, what=f"{issue.name}: {issue.what}", fix=issue.fix)
