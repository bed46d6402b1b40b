"""Files that are written as a whole or not at all, and what is asked before the work begins."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class RunError(ValueError):
    """A saved model or run that cannot be used; one line names the file and the field."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that replaces it once the block has ended."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to somewhere else
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Whether a file or directory can be made at `path`, or written where it exists.

    Its nearest existing directory is tried: what permissions say is not all that can stand in the
    way (a read-only file system, a full one, a folder of the kernel's).

    Raises:
        RunError: it cannot; one line with the path and why.
    """
    folder = Path(os.path.abspath(path))
    try:
        while not folder.exists():
            folder = folder.parent
        if path.is_file():
            folder = path.parent
        # a name as long as that of `atomic`
        names = (".", ".partial") if path.is_dir() else (f".{path.name}", "")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=names[0], suffix=names[1]) as file:
            file.write(b" ")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def remove(path: Path) -> None:
    """Removes a file, a link or a directory, if it is there; what a link leads to is left alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_memory() -> int | None:
    """Bytes that this process can still take, None where the system does not say."""
    found = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with suppress(OSError, ValueError):  # "max" where a container has no limit
        limits = Path("/sys/fs/cgroup")
        found.append(
            int((limits / "memory.max").read_text()) - int((limits / "memory.current").read_text())
        )
    return min(found, default=None)
