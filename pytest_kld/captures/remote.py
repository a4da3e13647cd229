"""A remote directory, reached through fsspec: files are read, written whole or not at all, and claimed.

Object stores (S3, Google Cloud Storage, Azure, the Hugging Face hub) show a file once its upload is complete. In other
places (a shared disk, SFTP) a file is uploaded under a temporary name and then renamed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from pytest_kld.errors import KLDError, RemoteError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

READ_ONLY = ("http", "https")
"""Protocols through which nothing can be written."""
_WHOLE_UPLOADS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss")
"""Protocols of object stores, in which a file appears when its upload is complete."""
_CONNECT_SECONDS = 20
_ANSWER_SECONDS = 60
"""How long an HTTP server may take to connect, and to send the next bytes. Other backends set their own."""
_TRIES = 3
_PAUSE_SECONDS = 1.0
"""The pause before the second try; the third comes after four times as long."""


@dataclass(frozen=True)
class Remote:
    """A directory at a URL.

    Attributes:
        url: its URL, e.g. `s3://bucket/folder`. fsspec finds credentials where its backends look for them.

    """

    url: str

    @property
    def protocol(self) -> str:
        """Return the part of the URL before `://`."""
        return self.url.partition("://")[0]

    @property
    def shown(self) -> str:
        """Return the URL without a password, for messages."""
        password = urlsplit(self.url).password
        return self.url if not password else self.url.replace(f":{password}@", ":…@", 1)

    def read(self, name: str, most: int) -> bytes | None:
        """Return a small file's contents; None if there is no such file.

        Args:
            name: the file's name, relative to the directory.
            most: the greatest number of bytes that it may have.

        Raises:
            RemoteError: it cannot be read, or has more bytes.

        """

        def read() -> bytes | None:
            self._fs.invalidate_cache()
            try:
                return bytes(self._fs.cat_file(self._path(name), start=0, end=most + 1))
            except FileNotFoundError:
                return None

        contents = self._try(f"read {name}", read)
        if contents is not None and len(contents) > most:
            raise RemoteError(f"{self.shown}/{name} is too large to be what its name says")
        return contents

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if there is no such file.

        Raises:
            RemoteError: the remote cannot be asked.

        """

        def size() -> int | None:
            self._fs.invalidate_cache()
            try:
                found = self._fs.info(self._path(name))["size"]
            except FileNotFoundError:
                return None
            return None if found is None else int(found)

        return self._try(f"look at {name}", size)

    def download(self, name: str, path: Path, size: int) -> None:
        """Copy a file to a local path.

        Args:
            name: the file's name.
            path: where it goes.
            size: its number of bytes; the download ends with an error as soon as it has more.

        Raises:
            RemoteError: it is missing, cannot be read, or has more bytes.

        """
        self._try(f"download {name}", lambda: self._fs.get_file(self._path(name), str(path), callback=_bounded(size)))

    def upload(self, name: str, path: Path) -> None:
        """Copy a local file to the remote, whole or not at all.

        Raises:
            RemoteError: it cannot be written.

        """
        self._try(f"upload {name}", lambda: self._put(name, lambda to: self._fs.put_file(str(path), to)))

    def write(self, name: str, contents: bytes) -> None:
        """Write or replace a small file, whole or not at all.

        Raises:
            RemoteError: it cannot be written.

        """
        self._try(f"write {name}", lambda: self._put(name, lambda to: self._fs.pipe_file(to, contents)))

    def create(self, name: str, contents: bytes) -> bool:
        """Write a small file unless it exists, and return whether it was written.

        Of several callers only one is told that it wrote the file, if the backend can create a file exclusively. With
        other backends two that call at the same moment may both be told so.

        Raises:
            RemoteError: it cannot be written.

        """

        def create() -> bool:
            path = self._path(name)
            try:
                if self.protocol in _WHOLE_UPLOADS:
                    self._fs.pipe_file(path, contents, mode="create")
                else:
                    self._fs.makedirs(self._fs._parent(path), exist_ok=True)
                    with self._fs.open(path, "xb") as file:
                        file.write(contents)
            except FileExistsError:
                return False
            except (ValueError, TypeError, NotImplementedError):  # the backend cannot create exclusively
                if self._fs.exists(path):
                    return False
                self._put(name, lambda to: self._fs.pipe_file(to, contents))
            return True

        return self._try(f"write {name}", create)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            RemoteError: it cannot be removed.

        """

        def remove() -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self._try(f"remove {name}", remove)

    @cached_property
    def _backend(self) -> tuple[Any, str]:
        """Return fsspec's file system and the directory's path there."""
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if self.protocol in READ_ONLY:
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        system, root = url_to_fs(self.url, **options)
        return system, str(root).rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._backend[0]

    def _path(self, name: str) -> str:
        return f"{self._backend[1]}/{name}"

    def _put(self, name: str, write: Callable[[str], Any]) -> None:
        path = self._path(name)
        if self.protocol in _WHOLE_UPLOADS:
            write(path)
            return
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            write(temporary)
            self._fs.mv(temporary, path)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)
            raise

    def _try(self, what: str, work: Callable[[], T]) -> T:
        """Do something on the remote; try again after errors that may pass.

        Raises:
            RemoteError: it failed; the message says what was tried, where, and what the backend said.

        """
        for attempt in range(1, _TRIES + 1):
            try:
                return work()
            except KLDError:
                raise
            except Exception as error:  # each backend has errors of its own
                if attempt == _TRIES or _is_final(error):
                    raise RemoteError(f"cannot {what} at {self.shown}: {_said(error)}. {_remedy(error)}") from error
                time.sleep(_PAUSE_SECONDS * 4 ** (attempt - 1))
        raise AssertionError("the last try returns or raises")


def _bounded(most: int) -> Any:
    """Return a callback that ends a download that brings more bytes than it should."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > most:
                raise RemoteError(f"the remote sent more than the {most:,} bytes that a file should have")

    return Bounded()


def _is_final(error: Exception) -> bool:
    """Tell whether it is useless to try again: access is denied, or something is missing."""
    status = getattr(error, "status", None)
    return isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError | TypeError) or (
        isinstance(status, int) and 400 <= status < 500
    )


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}".rstrip(".") if lines else type(error).__name__


def _remedy(error: Exception) -> str:
    if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
        return (
            "Check the credentials and what they allow: reading needs permission to get and list objects (without the "
            "latter S3 denies access to what does not exist), --kld-cache-push needs permission to put and delete them."
        )
    if isinstance(error, FileNotFoundError):
        return "Check the URL."
    return "Check the network and the URL, or leave out --kld-cache-url."
