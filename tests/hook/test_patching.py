"""Patches, on files of the real wheels."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_environment import ROOT
from sglang_cpu.releases import unpack

from pytest_kld.command import main
from pytest_kld.errors import PatchError
from pytest_kld.hook.patching import Installation, Patch, State, load_patches

PATCHED_RELEASES = ("0.5.7", "0.5.8", "0.5.8.post1", "0.5.9", "0.5.10", "0.5.10.post1")
RUNNER = Path("sglang/srt/model_executor/model_runner.py")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture
def packages(request: pytest.FixtureRequest, wheels: Path, tmp_path: Path) -> Path:
    """A site-packages with a release of SGLang, 0.5.9 unless the test says otherwise."""
    release = getattr(request, "param", "0.5.9")
    if not (wheels / release).is_dir():
        unpack(release, wheels / release)
    return Path(shutil.copytree(wheels / release, tmp_path / "site-packages"))


def patch(action: str, path: Path) -> int:
    return main(["patch", f"--{action}", "--sglang", str(path)])


def test_every_release_without_plugins_has_a_patch() -> None:
    assert {release for found in load_patches() for release in found.releases} == set(PATCHED_RELEASES)


@pytest.mark.parametrize("packages", PATCHED_RELEASES, indirect=True)
def test_applying_and_reverting_restores_every_byte(
    packages: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (packages / RUNNER).read_bytes()
    assert patch("check", packages) == 1
    assert "is not patched" in capsys.readouterr().out
    assert patch("apply", packages) == 0
    after = (packages / RUNNER).read_bytes()
    assert after.startswith(before)
    assert after != before
    assert patch("check", packages) == 0
    assert "is patched: " in capsys.readouterr().out
    assert patch("revert", packages) == 0
    assert (packages / RUNNER).read_bytes() == before
    assert patch("check", packages) == 1
    assert Installation.find(packages).release == request.node.callspec.params["packages"]


@pytest.mark.parametrize("packages", PATCHED_RELEASES, indirect=True)
def test_the_diff_means_the_same_to_git(packages: Path) -> None:
    copy = shutil.copytree(packages, packages.parent / "by-git")
    (diff,) = (ROOT / "patches").glob("*.patch")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(packages.parent)}
    subprocess.run(["git", "apply", diff], cwd=copy, check=True, env=environment)
    assert patch("apply", packages) == 0
    assert (copy / RUNNER).read_bytes() == (packages / RUNNER).read_bytes()


def test_applying_or_reverting_again_changes_nothing(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action, words in (("revert", "was not patched"), ("apply", "patched now"), ("apply", "was already patched")):
        assert patch(action, packages) == 0
        assert words in capsys.readouterr().out
    assert (packages / RUNNER).read_bytes().count(b"PYTEST_KLD_CAPTURE_DIR") == 1


def test_the_package_may_be_named_itself(packages: Path) -> None:
    assert patch("apply", packages / "sglang") == 0
    assert patch("check", packages) == 0


def test_changes_elsewhere_in_the_file_are_kept(packages: Path) -> None:
    runner = packages / RUNNER
    own = runner.read_bytes().replace(b"\nimport os\n", b"\nimport os  # ours\n", 1)
    runner.write_bytes(own)
    assert patch("apply", packages) == 0
    assert b"import os  # ours" in runner.read_bytes()
    assert patch("revert", packages) == 0
    assert runner.read_bytes() == own


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"    pytest_kld.hook.sglang.install()\n", b"    pytest_kld.hook.install()  # mine\n"),
        (b"    def get(self, rank: int):", b"    def get(self, rank):"),
        (b"\n", b"\r\n"),
    ],
)
def test_a_file_that_was_modified_otherwise_is_told_and_left_alone(
    packages: Path, capsys: pytest.CaptureFixture[str], old: bytes, new: bytes
) -> None:
    patch("apply", packages)
    runner = packages / RUNNER
    runner.write_bytes(runner.read_bytes().replace(old, new))
    modified = runner.read_bytes()
    capsys.readouterr()
    assert patch("check", packages) == 2
    assert "is modified otherwise" in capsys.readouterr().out
    for action in ("apply", "revert"):
        assert patch(action, packages) == 2
        assert "neither as it was released nor as the patch leaves it" in capsys.readouterr().err
    assert runner.read_bytes() == modified


def test_an_unknown_release_is_refused_with_the_supported_ones(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = packages / "sglang" / "_version.py"
    version.write_text(version.read_text().replace("'0.5.9'", "'0.5.6.post2'"))
    for action in ("check", "apply", "revert"):
        assert patch(action, packages) == 2
        error = capsys.readouterr().err
        assert "SGLang 0.5.6.post2 in" in error
        assert f"patches for {', '.join(PATCHED_RELEASES)}; 0.5.11 and newer need none" in error


@pytest.mark.parametrize("packages", ["0.5.15.post1"], indirect=True)
def test_a_release_with_plugins_needs_no_patch(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (packages / RUNNER).read_bytes()
    for action in ("check", "apply", "revert"):
        assert patch(action, packages) == 0
        assert re.search(r"SGLang 0\.5\.15\.post1 in .* needs no patch", capsys.readouterr().out)
    assert (packages / RUNNER).read_bytes() == before


def test_no_sglang_at_all_is_an_error_that_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert patch("check", tmp_path) == 2
    assert f"no SGLang in {tmp_path}: expected the directory of the package" in capsys.readouterr().err


def test_a_package_that_names_no_version_is_asked_by_its_metadata(packages: Path) -> None:
    (packages / "sglang" / "_version.py").unlink()
    with pytest.raises(PatchError, match="cannot tell which release"):
        Installation.find(packages)
    metadata = packages / "sglang-0.5.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.9\n")
    assert Installation.find(packages).state() is State.NOT_PATCHED


def test_a_result_that_would_not_compile_is_not_written(packages: Path) -> None:
    runner = packages / RUNNER
    broken = runner.read_bytes().replace(b"class ModelRunner(", b"class (", 1)
    runner.write_bytes(broken)
    there = sorted(runner.parent.iterdir())
    with pytest.raises(PatchError, match="would no longer compile"):
        Installation.find(packages).apply()
    assert runner.read_bytes() == broken
    assert sorted(runner.parent.iterdir()) == there


def test_a_shared_file_is_replaced_and_not_written_through(packages: Path) -> None:
    """Installers link files from their cache, which must stay as it is."""
    runner, shared = packages / RUNNER, packages.parent / "cached.py"
    before = runner.read_bytes()
    runner.chmod(0o640)
    shared.hardlink_to(runner)
    assert patch("apply", packages) == 0
    assert shared.read_bytes() == before
    assert stat.S_IMODE(runner.stat().st_mode) == 0o640


def test_a_patch_of_another_shape_is_refused() -> None:
    (path,) = (ROOT / "patches").glob("*.patch")
    diff = path.read_bytes()
    for bad in (
        diff + b"@@ -1,1 +1,1 @@\n-a\n+b\n",
        diff.replace(b"Releases: ", b""),
        diff.replace(b"+++ b/", b"+++ b/x"),
    ):
        with pytest.raises(ValueError, match="one hunk of one file"):
            Patch.parse(bad)


def test_the_hook_says_before_a_boot_how_to_patch(packages: Path) -> None:
    def told() -> dict[str, object]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(packages)))}
        question = [sys.executable, "-m", "pytest_kld.hook", "pytest_kld.hook.sglang"]
        answer: dict[str, object] = json.loads(subprocess.check_output(question, env=environment, text=True))
        return answer

    assert told()["hooked"] is False
    assert "SGLang 0.5.9 in" in str(told()["why_not"])
    assert "pytest-kld patch --apply" in str(told()["why_not"])
    patch("apply", packages)
    assert told()["hooked"] is True


def test_a_patched_file_without_the_variable_imports_nothing_of_ours(packages: Path) -> None:
    """The lines that the patch adds, run where pytest-kld is not installed."""
    (found,) = load_patches()
    added = found.after.removeprefix(found.before).decode()
    script = f"import os, sys\n{added}\nassert 'pytest_kld' not in sys.modules"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTEST_KLD_CAPTURE_DIR", "PYTHONPATH")
    }
    subprocess.run([sys.executable, "-I", "-c", script], check=True, env=environment)
