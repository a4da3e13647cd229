"""Patches for releases of SGLang that have no plugins: find, apply, check, revert.

A patch is a unified diff in `patches/` with one hunk for one file, and it names the releases that it is for. Its place
is found by its text, which must occur exactly once; line numbers do not matter. Standard library only: this runs where
SGLang runs.
"""

from __future__ import annotations

import re
import shutil
import sys
import uuid
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from pytest_kld.errors import PatchError

_RELEASES = b"Releases: "
_VERSION = re.compile(r"^__version__ = (?:version = )?['\"]([^'\"]+)['\"]", re.MULTILINE)
_TRACE = b"pytest_kld"
"""Text that every file patched by pytest-kld contains, whatever its present state."""


class State(Enum):
    """The state of an SGLang installation, in words."""

    NOTHING_TO_PATCH = "has plugins and needs no patch"
    PATCHED = "is patched"
    NOT_PATCHED = "is not patched"
    MODIFIED = "is modified otherwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One hunk for one file.

    Attributes:
        releases: versions of SGLang that it is for.
        target: the file, relative to the parent directory of the package `sglang`.
        before: the lines of the hunk before the change.
        after: the lines of the hunk after the change.

    """

    releases: tuple[str, ...]
    target: str
    before: bytes
    after: bytes

    @classmethod
    def parse(cls, diff: bytes) -> Patch:
        """Read a unified diff.

        Raises:
            ValueError: the diff is not one hunk for one file, or names no releases.

        """
        head, *hunks = re.split(rb"^@@ .*\n", diff, flags=re.MULTILINE)
        names = re.findall(rb"^(?:---|\+\+\+) [ab]/(.+)$", head, flags=re.MULTILINE)
        releases = [line for line in head.splitlines() if line.startswith(_RELEASES)]
        if len(hunks) != 1 or len(names) != 2 or names[0] != names[1] or len(releases) != 1:
            raise ValueError("expected one hunk of one file, and a line with the releases that it is for")
        lines = hunks[0].splitlines(keepends=True)
        return cls(
            releases=tuple(releases[0].removeprefix(_RELEASES).decode().split()),
            target=names[0].decode(),
            before=b"".join(line[1:] for line in lines if line[:1] in b" -"),
            after=b"".join(line[1:] for line in lines if line[:1] in b" +"),
        )

    def state(self, contents: bytes) -> State:
        """Return the state of a file's contents with regard to this patch."""
        if contents.count(self.after) == 1 and contents.count(_TRACE) == self.after.count(_TRACE):
            return State.PATCHED
        if contents.count(self.before) == 1 and _TRACE not in contents:
            return State.NOT_PATCHED
        return State.MODIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """An SGLang installation on disk.

    Attributes:
        root: the directory of the package `sglang`.
        release: its version.
        patch: the patch for it; None if it has plugins.

    """

    root: Path
    release: str
    patch: Patch | None

    @classmethod
    def find(cls, path: Path | None = None) -> Installation:
        """Find the SGLang that this interpreter imports, or the one at a path.

        Args:
            path: the package's directory, or its parent directory.

        Raises:
            PatchError: there is no SGLang, or its release is not supported.

        """
        root = _root(path)
        release = _release(root, [str(root.parent), *(sys.path if path is None else ())])
        if has_plugins(root):
            return cls(root=root, release=release, patch=None)
        patches = load_patches()
        for patch in patches:
            if release.partition("+")[0] in patch.releases:
                return cls(root=root, release=release, patch=patch)
        known = ", ".join(release for patch in patches for release in patch.releases)
        raise PatchError(
            f"SGLang {release} in {root} is not supported. There are patches for {known}; 0.5.11 and newer need none."
        )

    @property
    def target(self) -> Path | None:
        """The file that the patch changes."""
        return None if self.patch is None else self.root.parent / self.patch.target

    def state(self) -> State:
        """Check whether it is patched."""
        if self.patch is None or self.target is None:
            return State.NOTHING_TO_PATCH
        return self.patch.state(_read(self.target))

    def apply(self) -> bool:
        """Patch it; return whether anything had to be changed.

        Raises:
            PatchError: the file is modified otherwise, or cannot be written. Nothing is changed in that case.

        """
        return self._change(State.NOT_PATCHED, State.PATCHED)

    def revert(self) -> bool:
        """Restore the state before `apply`; return whether anything had to be changed.

        Raises:
            PatchError: the file is modified otherwise, or cannot be written. Nothing is changed in that case.

        """
        return self._change(State.PATCHED, State.NOT_PATCHED)

    def _change(self, origin: State, aim: State) -> bool:
        if self.patch is None or self.target is None:
            return False
        contents = _read(self.target)
        state = self.patch.state(contents)
        if state is aim:
            return False
        if state is not origin:
            raise PatchError(
                f"SGLang {self.release} {state.value}: {self.target} is neither as it was released nor as the patch "
                "leaves it. Reinstall SGLang, or undo the change."
            )
        old, new = (
            (self.patch.before, self.patch.after) if aim is State.PATCHED else (self.patch.after, self.patch.before)
        )
        _replace(self.target, contents.replace(old, new))
        return True


def has_plugins(root: Path) -> bool:
    """Tell whether an SGLang loads plugins, as 0.5.11 and newer do."""
    return (root / "srt" / "plugins").is_dir()


def load_patches() -> list[Patch]:
    """Read the patches that come with this package."""
    installed, checkout = Path(__file__).parents[1] / "patches", Path(__file__).parents[2] / "patches"
    directory = installed if installed.is_dir() else checkout
    return [Patch.parse(path.read_bytes()) for path in sorted(directory.glob("*.patch"))]


def _root(path: Path | None) -> Path:
    if path is None:
        found = find_spec("sglang")
        if found is None or not found.submodule_search_locations:
            raise PatchError(f"{sys.executable} finds no SGLang. Name its directory with --sglang PATH.")
        return Path(found.submodule_search_locations[0])
    for root in (path / "sglang", path):
        if (root / "srt").is_dir():
            return root
    raise PatchError(f"no SGLang in {path}: expected the directory of the package `sglang`, or the one that holds it.")


def _release(root: Path, metadata_path: list[str]) -> str:
    """Return the version from the package itself, or else from its metadata: a checkout may lack the former."""
    for name in ("_version.py", "version.py"):
        if (root / name).is_file() and (match := _VERSION.search((root / name).read_text())):
            return match[1]
    for distribution in distributions(name="sglang", path=metadata_path):
        return distribution.version
    raise PatchError(f"cannot tell which release of SGLang is in {root}: it has no _version.py and no metadata.")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error}") from error


def _replace(path: Path, contents: bytes) -> None:
    """Replace a file atomically: it has either its old or its new contents, never a mixture."""
    try:
        compile(contents, path, "exec")
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"{path} would no longer compile: {error}. Nothing was changed.") from error
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(contents)
        shutil.copymode(path, temporary)
        temporary.replace(path)
    except OSError as error:
        raise PatchError(f"cannot write {path}: {error}. Nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)
