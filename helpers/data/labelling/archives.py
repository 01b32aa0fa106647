"""Unpacking a downloaded zip or tar archive into a new folder."""

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from helpers.core import disk, progress, project
from helpers.data.formats import listing
from helpers.data.labelling import folders

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHERS = (".7z", ".rar", ".gz", ".zst")  # recognised, but not unpacked here
LEAST, RATIO = 2**30, 100  # bytes that are always allowed; beyond them, the limit in archive sizes
BLOCK = 2**20


def is_archive(path: Path) -> bool:
    """Return whether a file is named like an archive.

    Raises:
        ValueError: it is an archive of a kind that is not unpacked here.
    """
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return True
    if name.endswith(OTHERS):
        raise ValueError(f"{path.name} is an archive that is not read ({', '.join(SUFFIXES)} are): unpack it yourself.")
    return False


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into a new folder, which appears whole or not at all.

    Args:
        archive: a file that `is_archive`.
        folder: where its files go; it must not exist.

    Returns:
        `folder`.

    Raises:
        FileExistsError: the folder exists.
        ValueError: the archive is damaged or locked, or holds links, devices, paths that lead out of the folder, or far
            more than its size allows.
    """
    if folder.exists():
        shown = project.display_path(folder)
        raise FileExistsError(f"{shown} exists already. Name it instead of the archive, or remove it first.")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}{disk.TEMPORARY}")
    staging.mkdir(parents=True)
    try:
        _unpack(archive, staging)
        os.replace(staging, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"{archive.name} is damaged or not an archive of its kind: {error}. Download it again."
        ) from None
    except (RuntimeError, NotImplementedError) as error:  # from zipfile: a password, an unknown compression
        raise ValueError(f"{archive.name} cannot be unpacked here: {error}. Unpack it yourself.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _unpack(archive: Path, staging: Path) -> None:
    limit = max(LEAST, RATIO * archive.stat().st_size)
    bytes_left = min(limit, shutil.disk_usage(staging).free - LEAST // 10)
    is_zip = archive.name.lower().endswith(".zip")
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
        members = opened.infolist() if is_zip else opened.getmembers()
        for member in progress.track(members, total=len(members), unit="file", label="unpack"):
            files = _zipped(opened, member) if is_zip else _tarred(opened, member)
            for name, stream in files:
                target = _place(staging, name)
                if target is None:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, target.open("wb") as file:
                    while block := stream.read(BLOCK):
                        bytes_left -= len(block)
                        if bytes_left < 0:
                            raise ValueError(
                                f"{archive.name} holds more than {limit:,} bytes, which is {RATIO} times its size,"
                                " or more than the disk has free. Nothing is kept. If you trust it, unpack it"
                                " yourself."
                            )
                        file.write(block)


def _zipped(opened: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[tuple[str, IO[bytes]]]:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(_refused(member.filename, "a link or a device"))
    if not member.is_dir():
        yield member.filename, opened.open(member)


def _tarred(opened: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[tuple[str, IO[bytes]]]:
    if not (member.isreg() or member.isdir()):
        raise ValueError(_refused(member.name, "a link or a device"))
    if member.isreg():
        yield member.name, opened.extractfile(member)


def _place(staging: Path, name: str) -> Path | None:
    """Return where a member goes, None for a hidden or system file."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]) or "\0" in name:
        raise ValueError(_refused(name, "a path that leads out of the folder"))
    if not path.parts or any(listing.is_clutter(part) for part in path.parts):
        return None
    return staging / path


def _refused(name: str, what: str) -> str:
    return f"The archive holds {what}: {folders.shown(name)}. Nothing is unpacked. If you trust it, unpack it yourself."
