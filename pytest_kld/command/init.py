"""`pytest-kld init`: a suite file and a CI workflow to start from."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pytest_kld.command.output import Failed, print_lines

_SUITE = "release.kld.toml"
_WORKFLOWS = {"github": ".github/workflows/kld.yml", "gitlab": ".gitlab-ci.yml"}
_GATE = "pytest {suite} --kld-json=kld.json --kld-html=kld.html --kld-junit=kld.xml"
_GITHUB = """\
# Gates the candidates of {suite}. The machine needs GPUs, and keeps its cache between runs: the reference is captured
# only once.
name: KL divergence
on:
  workflow_dispatch:
  pull_request:
    paths: ["{suite}"]
jobs:
  gate:
    runs-on: [self-hosted, gpu]
    timeout-minutes: 720
    steps:
      - uses: actions/checkout@v4
      - run: pip install pytest-kld
      - run: pytest-kld doctor
      - run: {gate}
      - uses: actions/upload-artifact@v4
        if: always()
        with:
          name: kld
          path: kld.*
"""
_GITLAB = """\
# Gates the candidates of {suite}. The runner needs GPUs, and keeps its cache between runs: the reference is captured
# only once.
kld:
  tags: [gpu]
  timeout: 12h
  script:
    - pip install pytest-kld
    - pytest-kld doctor
    - {gate}
  artifacts:
    when: always
    paths: ["kld.*"]
    reports:
      junit: kld.xml
"""


@click.command(epilog="Exit codes: 0 if the files were written, 2 if not, in which case nothing was changed.")
@click.argument("target", metavar="[DIR]", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--ref", "reference", metavar="MODEL", default="ORG/REFERENCE", help="The reference.")
@click.option("--candidate", "candidates", metavar="MODEL", multiple=True, help="A candidate. Repeatable.")
@click.option("--max-mean", default="0.05", show_default=True, metavar="NATS", help="The limit on the mean KLD.")
@click.option("--ci", type=click.Choice([*_WORKFLOWS, "none"]), default="github", show_default=True, help="The CI.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
def init(target: Path, reference: str, candidates: tuple[str, ...], max_mean: str, ci: str, force: bool) -> None:
    """Write a suite file and a CI workflow into DIR, to start from.

    DIR is the current directory unless it is given.
    """
    from pytest_kld.files import write_report
    from pytest_kld.gate.limits import LIMITS

    try:
        bound = LIMITS["max_mean"].parse(max_mean)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-mean") from None
    files = {target / _SUITE: _suite(reference, candidates or ("ORG/CANDIDATE",), bound)}
    if ci != "none":
        text = {"github": _GITHUB, "gitlab": _GITLAB}[ci]
        files[target / _WORKFLOWS[ci]] = text.format(suite=_SUITE, gate=_GATE.format(suite=_SUITE))
    if not force and (there := [str(path) for path in files if path.exists()]):
        raise Failed(f"{', '.join(there)} is there already; --force replaces it")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_report(path, text.encode())
        print_lines([f"wrote {path}"])
    print_lines([f"Edit {_SUITE}, and run `pytest {_SUITE}`. `pytest-kld doctor MODEL` finds known issues of a model."])


def _suite(reference: str, candidates: tuple[str, ...], bound: float) -> str:
    tables = [
        f"# Run it with `pytest {_SUITE}`. Every key: docs/suites.md of pytest-kld.\n",
        "[reference]",
        f"model = {_quoted(reference)}",
        '# args = "--tp 8"    # flags of its server, if an engine with servers runs it\n',
        "[protocol]",
        'dataset = "wikitext-2"',
        "windows = 100",
        "window_size = 2048",
        "stride = 512\n",
        "[limits]",
        f"max_mean = {bound:g}",
    ]
    for candidate in candidates:
        tables += ["\n[[candidate]]", f"model = {_quoted(candidate)}"]
    return "\n".join(tables) + "\n"


def _quoted(text: str) -> str:
    """Return a basic string of TOML: those of JSON are."""
    return json.dumps(text, ensure_ascii=False)
