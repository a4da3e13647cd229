"""The recipes of docs/recipes: their formats' linters accept them, and what they run gates every Subject once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "docs" / "recipes"
BIN = Path(sys.executable).parent
LINTERS = {
    "slurm.sh": [BIN / "shellcheck"],
    "kubernetes.yaml": [BIN / "kubernetes-validate", "--strict"],
    "github-actions.yml": [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
    "gitlab-ci.yml": [
        *(BIN / "check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"),
    ],
}


@pytest.mark.parametrize("name", [path.name for path in sorted(RECIPES.iterdir())])
def test_linter_of_the_format_accepts_the_recipe(name: str) -> None:
    command = [*LINTERS[name], RECIPES / name]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def read(name: str) -> Any:
    # In YAML 1.1 the key `on` of a workflow is a boolean; nothing here uses it.
    return yaml.safe_load((RECIPES / name).read_text())


def slurm(number: int) -> tuple[list[str], Mapping[str, str]]:
    return ["bash", str(RECIPES / "slurm.sh")], {
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_COUNT": "4",
    }


def kubernetes(number: int) -> tuple[list[str], Mapping[str, str]]:
    (container,) = read("kubernetes.yaml")["spec"]["template"]["spec"]["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": str(number - 1)}
    return [*container["command"], container["args"][0].replace("/reports/", "")], variables


def github(number: int) -> tuple[list[str], Mapping[str, str]]:
    workflow = read("github-actions.yml")
    job = workflow["jobs"]["gate"]
    assert number in job["strategy"]["matrix"]["shard"]
    assert len(job["strategy"]["matrix"]["shard"]) == workflow["env"]["SHARDS"]
    (step,) = [step for step in job["steps"] if "run" in step]
    return ["bash", "-e", "-c", step["run"].replace("${{ matrix.shard }}", str(number))], {
        "SHARDS": str(workflow["env"]["SHARDS"])
    }


def gitlab(number: int) -> tuple[list[str], Mapping[str, str]]:
    job = read("gitlab-ci.yml")["gate"]
    variables = {"CI_NODE_INDEX": str(number), "CI_NODE_TOTAL": str(job["parallel"])}
    return ["bash", "-e", "-c", "\n".join(job["script"])], variables


@pytest.fixture
def suite(reference_dir: Path, candidate_dir: Path, broken_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    """A directory with a suite of three Subjects."""
    candidates = "".join(
        f'[[candidate]]\nname = "{path.name}"\nmodel = "{path}"\n'
        for path in (candidate_dir, broken_dir, reference_dir)
    )
    (tmp_path / "release.kld.toml").write_text(f"""
[reference]
model = "{reference_dir}"
[protocol]
engine = "transformers"
dataset = "{text_file}"
windows = 3
window_size = 64
stride = 32
[limits]
max_mean = 0.1
{candidates}""")
    return tmp_path


def run(command: list[str], directory: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with the interpreter's own `pytest` and `pytest-kld`, and with a shared cache on this disk."""
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "KLD_CACHE_URL": f"file://{directory / 'team'}",
        "XDG_CACHE_HOME": str(directory / f"cache-{len(list(directory.glob('cache-*')))}"),
        "PYTEST_ADDOPTS": "-p no:cacheprovider",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def comparable(path: Path) -> list[dict[str, Any]]:
    results = json.loads(path.read_text())["results"]
    return sorted(
        ({name: value for name, value in one.items() if name != "seconds"} for one in results),
        key=lambda one: str(one["nodeid"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [slurm, kubernetes, github, gitlab])
def test_shards_of_the_recipe_make_the_report_of_one_session(
    suite: Path, recipe: Callable[[int], tuple[list[str], Mapping[str, str]]]
) -> None:
    said = ""
    for number in (1, 2, 3, 4):  # each on a machine of its own: another local cache
        command, variables = recipe(number)
        done = run(command, suite, variables)
        assert done.returncode == (1 if number == 2 else 0), done.stdout + done.stderr  # the second is `broken`
        said += done.stdout
    assert "shard 4 of 4 gates none of the 3 Subjects" in said
    assert len(list((suite / "team" / "captures").iterdir())) == 3  # reference and its copy as candidate are the same
    merged = run(
        ["pytest-kld", "report", *sorted(map(str, suite.glob("shard-*.json"))), "--json=merged.json"], suite, {}
    )
    assert merged.returncode == 1, merged.stdout + merged.stderr
    whole = run(["pytest", "release.kld.toml", "--kld-json=whole.json"], suite, {})
    assert whole.returncode == 1, whole.stdout + whole.stderr
    assert comparable(suite / "merged.json") == comparable(suite / "whole.json")


def test_every_recipe_is_named_in_the_page() -> None:
    page = (ROOT / "docs" / "many-machines.md").read_text()
    assert all(f"(recipes/{path.name})" in page for path in RECIPES.iterdir())
