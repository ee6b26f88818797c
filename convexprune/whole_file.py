"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write beside the target under a name of its own, then rename: neither half a file nor a lost old one.

    A file that is there keeps its mode; a symbolic link stays, and what it points to is replaced. Two writers of one
    path leave one whole file, of one of them.

    Raises OSError, naming the path, where the target is no regular file and where it cannot be written; nothing is
    left beside it then.
    """
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode if target.exists() else None
    if target.is_symlink() or (mode is not None and not stat.S_ISREG(mode)):  # a link still: they go round in a ring
        raise OSError(f"{target} is not a regular file; nothing was written")
    data = content.encode("utf-8") if isinstance(content, str) else content
    beside = target.with_name(f".convexprune-{secrets.token_hex(8)}.part")  # not longer for a longer name
    try:
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), stat.S_IMODE(mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the file was not written: {error.strerror}", str(target)) from error
