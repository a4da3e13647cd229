"""The flags of real releases, read from the sources in their wheels."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from sglang_cpu.environment import SGLangEnvironment
from sglang_cpu.releases import unpack

from pytest_kld.engines.sglang.arguments import RULES
from pytest_kld.errors import ServerError
from pytest_kld.hook.options import read_options
from pytest_kld.hook.sglang import SOURCES

RELEASES = ("0.5.9", "0.5.15.post1", "0.5.23")
"""One for each way in which flags are declared: by calls; by fields of one class; by fields of several."""
PARSER = """
import argparse, json
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps({flag: [a.option_strings[0], a.dest] for a in parser._actions for flag in a.option_strings}))
"""


@pytest.fixture(scope="module", params=RELEASES)
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    root = unpack(request.param, tmp_path_factory.mktemp(request.param)) / "sglang"
    found = read_options(root, SOURCES, "--model-path")
    assert found is not None
    return found


def test_every_spelling_of_data_parallel_attention_is_refused(options: dict[str, tuple[str, str]]) -> None:
    spellings = [flag for flag, (_, field) in options.items() if field in ("enable_dp_attention", "attn_dp_size")]
    assert "--enable-dp-attention" in spellings
    for spelling in spellings:
        for known in (options, None):
            with pytest.raises(ServerError, match="data-parallel attention"):
                RULES.check([spelling, "2"], "--kld-ref-args", known)


def test_second_spellings_mean_the_same_in_every_release(options: dict[str, tuple[str, str]]) -> None:
    for spelling, meant in RULES.spellings.items():
        if spelling in options and meant in options:
            assert options[spelling] == options[meant], spelling


def test_no_other_flag_is_the_beginning_of_one_that_is_refused(options: dict[str, tuple[str, str]]) -> None:
    for flag in options:
        assert flag in RULES.refused or not any(refused.startswith(flag) for refused in RULES.refused), flag


@pytest.mark.slow
@pytest.mark.sglang
def test_the_flags_are_those_of_the_parser_itself(environment: SGLangEnvironment) -> None:
    command = [str(environment.python), "-c", PARSER]
    run = subprocess.run(command, env=environment.variables, capture_output=True, text=True, check=True)
    told = json.loads(run.stdout.splitlines()[-1])
    parsed = {flag: tuple(meant) for flag, meant in told.items() if not flag.startswith(("-h", "--help", "--no-"))}
    (root,) = Path(environment.python).parents[1].glob("lib/python*/site-packages/sglang")
    assert read_options(root, SOURCES, "--model-path") == parsed
