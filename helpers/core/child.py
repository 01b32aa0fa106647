"""A function that answers in a process of its own: JSON in, JSON or an error out.

For functions that need TensorFlow where it is not loaded, keep memory afterwards, or may crash their process. The
module that answers ends with ``if __name__ == "__main__": child.answer(function)``; the caller names the module.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from helpers.core import project

REFUSED = 2  # the exit code after an error that has a message for the user
LAST_WORDS = 2000  # characters shown of an unexpected error


@dataclass(frozen=True)
class Answer:
    """The answer of a module.

    Attributes:
        value: what its function returned, as JSON holds it.
        log: what it wrote to standard error, "" where the terminal shows it.
    """

    value: Any
    log: str


class ChildError(RuntimeError):
    """The process gave no answer. The message is that of the function's error, or the end of what the process wrote.

    Attributes:
        signal: the name of the signal that ended it, such as "SIGKILL", or "".
        log: what it wrote to standard error.
    """

    def __init__(self, message: str, signal: str, log: str) -> None:
        super().__init__(message)
        self.signal, self.log = signal, log


def ask(
    module: str,
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    shows: bool = False,
) -> Answer:
    """Run `module` in a process of its own and return what its function answers to `request`.

    Args:
        module: a dotted name.
        request: the arguments of its function, which JSON can hold.
        environment: variables to set, such as KERAS_BACKEND.
        meanwhile: called once while the process works.
        shows: show its standard error in the terminal, such as the bar of a download.

    Raises:
        ChildError: it gave no answer.
    """
    command = [sys.executable, "-m", module, json.dumps(dict(request))]
    variables = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | dict(environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": None if shows else subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=project.ROOT, env=variables) as process:
        meanwhile()
        output, log = process.communicate()
    lines, log = output.strip().splitlines(), log or ""
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ChildError(f"its process was ended by {name}", name, log)
    if process.returncode == REFUSED and lines:
        raise ChildError(json.loads(lines[-1]), "", log)
    if process.returncode or not lines:
        raise ChildError(log.strip()[-LAST_WORDS:] or f"its process ended with {process.returncode}", "", log)
    return Answer(json.loads(lines[-1]), log)


def answer(function: Callable[..., Any]) -> None:
    """Answer the request on the command line with `function`, and end this process.

    A ValueError, OSError, ImportError or MemoryError becomes a ChildError with the same message in the caller.
    """
    code, reply = 0, None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            reply = function(**json.loads(sys.argv[1]))
    except (ValueError, OSError, ImportError, MemoryError) as error:
        code, reply = REFUSED, str(error) or type(error).__name__
    except Exception:
        traceback.print_exc()
        code = 1
    print(json.dumps(reply))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # TensorFlow would need a second to exit
