"""One folder at an fsspec address: a few files read and written, what fails tried again and told in one line.

Credentials and options are the file system's own: its environment variables and files, or fsspec's configuration.
"""
from __future__ import annotations

import contextlib
import os
import posixpath
import urllib.parse
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from m2rl_core import post
from m2rl_core.errors import StudyError, one_line

SETTING = "M2RL_STORE"
TRIES = 3  # attempts at what the address may do the next time
OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"}  # no folders; a file is put whole


class RemoteError(StudyError):
    """The address cannot be used; one line with what it said and the mend."""


class Address:
    """The folder `name` at an address; all paths are relative to it."""

    def __init__(self, address: str, name: str):
        """RemoteError where the package for such addresses is not installed, or no package knows them."""
        self.address = address
        self.shown = f"{_shown(address).rstrip('/')}/{name}"
        self.name = name
        self._folders: set[str] = set()
        self.fs  # noqa: B018  to say at once what is missing

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec
        scheme = urllib.parse.urlsplit(self.address).scheme or "file"
        options = {} if scheme in ("file", "local", "memory") else {"use_listings_cache": False}
        try:
            fs, path = fsspec.core.url_to_fs(self.address, **options)
        except ImportError as error:
            package = _package(scheme, error)
            raise RemoteError(f"{SETTING}={_shown(self.address)}: {scheme}:// needs a package that is not installed here: "
                              f"`pip install {package}`") from error
        except ValueError as error:
            raise RemoteError(f"{SETTING}={_shown(self.address)} is no address that fsspec knows ({one_line(error)}): a path, "
                              "or s3://bucket/folder, for example") from error
        except Exception as error:  # some connect at once, and each has errors of its own
            raise self._error("cannot be reached", error) from error
        return fs, f"{path.rstrip('/')}/{self.name}"

    @property
    def fs(self):
        return self._opened[0]

    @property
    def objects(self) -> bool:
        """Whether a file appears there whole or not at all."""
        names = self.fs.protocol
        return not OBJECTS.isdisjoint({names} if isinstance(names, str) else names)

    def exists(self, path: str) -> bool:
        return self._do("cannot be read", self.fs.exists, self._path(path))

    def read(self, path: str) -> bytes:
        """A small file; FileNotFoundError where there is none."""
        return self._do("cannot be read", self.fs.cat_file, self._path(path))

    def write(self, path: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        self._folder_of(path)
        if self.objects:
            return self._do("cannot be written", self.fs.pipe_file, self._path(path), data)
        new = f"{self._path(path)}.{os.getpid()}.new"
        self._do("cannot be written", self.fs.pipe_file, new, data)
        self._do("cannot be written", self.fs.mv, new, self._path(path))

    def put(self, file: Path, path: str) -> None:
        self._folder_of(path)
        self._do("cannot be written", self.fs.put_file, str(file), self._path(path))

    def get(self, path: str, file: Path) -> None:
        """Copy a file to this machine; FileNotFoundError where there is none."""
        self._do("cannot be read", self.fs.get_file, self._path(path), str(file))

    def remove(self, path: str, recursive: bool = False) -> None:
        gone = self._path(path)
        self._folders = {folder for folder in self._folders if not f"{folder}/".startswith(f"{gone}/")}
        with contextlib.suppress(FileNotFoundError):
            self._do("cannot be written", self.fs.rm, gone, recursive)

    def names(self, path: str) -> list[str]:
        """What stands in a folder now."""
        def listed() -> list[str]:
            self.fs.invalidate_cache()
            return self.fs.ls(self._path(path), detail=False)
        with contextlib.suppress(FileNotFoundError):
            return sorted(posixpath.basename(name.rstrip("/")) for name in self._do("cannot be read", listed))
        return []

    def touched(self, path: str) -> float | None:
        """When a file was written last, in seconds of the address's own clock; None where it does not tell."""
        def asked() -> float:
            self.fs.invalidate_cache()
            return self.fs.modified(self._path(path)).timestamp()
        try:
            return self._do("cannot be read", asked)
        except NotImplementedError:
            return None

    def _path(self, path: str) -> str:
        return f"{self._opened[1]}/{path}"

    def _folder_of(self, path: str) -> None:
        folder = posixpath.dirname(self._path(path))
        if not self.objects and folder not in self._folders:
            self._do("cannot be written", lambda: self.fs.makedirs(folder, exist_ok=True))
            self._folders.add(folder)

    def _do(self, what: str, work: Callable, *args):
        """`work`, tried again where that can help; FileNotFoundError and NotImplementedError pass."""
        for attempt in range(TRIES):
            post.wait(attempt)
            try:
                return work(*args)
            except (FileNotFoundError, NotImplementedError):
                if what == "cannot be read" or work == self.fs.rm:
                    raise
                raise self._error(what, FileNotFoundError("there is no such bucket or folder")) from None
            except PermissionError as error:
                raise self._error(what, error) from error
            except Exception as error:  # each file system has errors of its own
                last = error
        raise self._error(what, last) from last

    def _error(self, what: str, error: Exception) -> RemoteError:
        mend = {"cannot be written": "give the right to write there", "cannot be read": "is it up, are the rights there?"}
        denied = isinstance(error, PermissionError) or what != "cannot be written"
        return RemoteError(f"{SETTING}: {self.shown} {what} ({type(error).__name__}: {one_line(error)}): "
                           + (mend.get(what, "is the address right?") if denied else "is the address right, is there room?"))


def _package(scheme: str, error: ImportError) -> str:
    from fsspec.registry import known_implementations
    home = known_implementations.get(scheme, {}).get("class", "").split(".")[0]
    return home if home not in ("", "fsspec") else str(error.name or scheme).split(".")[0]


def _shown(address: str) -> str:
    """The address as it may stand in a message: without a password."""
    head, at, rest = address.partition("@")
    return f"{head.split('://')[0]}://{rest}" if at and "://" in head and "/" not in head.split("://")[1] else address
