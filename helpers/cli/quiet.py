"""The terminal is for answers: the messages of native libraries such as TensorFlow go to a file."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def native_log() -> Iterator[None]:
    """Send what native code writes on standard error to a file while the block runs; Python's own output still shows.

    When the block fails and something was written, the file stays and the error gets a note that names it.
    """
    sys.stderr.flush()
    terminal, python_error = os.dup(2), sys.stderr
    descriptor, name = tempfile.mkstemp(prefix="thaw-", suffix=".log")
    os.dup2(descriptor, 2)
    os.close(descriptor)
    through = os.fdopen(os.dup(terminal), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    if _is_standard_error(python_error):
        sys.stderr = through
    keep = False
    try:
        yield
    except Exception as error:
        keep = os.path.getsize(name) > 0
        if keep:
            error.add_note(f"Messages of TensorFlow and other libraries: {name}")
        raise
    finally:
        sys.stderr = python_error
        through.close()
        os.dup2(terminal, 2)
        os.close(terminal)
        if not keep:
            Path(name).unlink(missing_ok=True)


def _is_standard_error(stream: object) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):
        return False
