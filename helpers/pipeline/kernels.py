"""Kernels for papermill: an ordinary process each, or the fork of one that has imported what notebooks import.

Importing TensorFlow takes five seconds of a core, and most notebooks need it. While the first stage of a run computes,
a fork server (`forking`) imports the libraries; the kernels of the later stages begin as its forks. TensorFlow starts
no thread and opens no device when it is imported, so nothing is lost in a fork. A kernel starts in the ordinary way
where the server is not ready yet, outside Linux, and where THAW_FORK is "no". The result is the same.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from helpers.core import project
from helpers.pipeline import fingerprints, forking

LAUNCHER = "ipykernel_launcher"
SLOW_TO_IMPORT = {"keras", "tensorflow"}
SWITCH = "THAW_FORK"


class Fork:
    """A forked kernel, with what Jupyter uses of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)
        self._has_ended = False

    def poll(self) -> int | None:
        """Return None while the kernel runs, and 1 when it has ended: only its parent could know how."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the kernel ends, for `timeout` seconds at most, and return what `poll` returns."""
        if not self._has_ended and select.select([self._handle], [], [], timeout)[0]:
            self._has_ended = True
            os.close(self._handle)
        return 1 if self._has_ended else None

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel, if it still runs."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """End the kernel now."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the kernel to end."""
        self.send_signal(signal.SIGTERM)


class Forks:
    """A fork server, which lives as long as this process.

    Args:
        modules: dotted names of what it imports; those that are no modules are passed over.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._channel, other_end = socket.socketpair()
        for end in (self._channel, other_end):
            end.setblocking(True)  # a library may have set a default time limit for all sockets
        command = [sys.executable, "-m", forking.__name__, str(other_end.fileno()), *modules]
        # matplotlib reads the first when it is imported; a kernel sets it before that, see ipykernel.
        variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "TF_CPP_MIN_LOG_LEVEL": "2"}
        with other_end:
            self._process = subprocess.Popen(
                command,
                env=os.environ | variables,
                cwd=project.ROOT,
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which ends the kernels itself
            )
        self._is_ready = False
        atexit.register(self.close)

    def close(self) -> None:
        """End the server, which has no kernel by then, so that no zombie is left where process 1 collects none."""
        self._process.kill()
        self._process.wait()

    def is_ready(self) -> bool:
        """Say whether all is imported."""
        if not self._is_ready and select.select([self._channel], [], [], 0)[0]:
            self._is_ready = self._channel.recv(len(forking.READY)) == forking.READY
        return self._is_ready

    def start(self, arguments: Sequence[str], environment: dict[str, str], folder: str, output: TextIO) -> Fork:
        """Start a kernel.

        Args:
            arguments: of the kernel's launcher.
            environment: all variables of the kernel.
            folder: where it works.
            output: takes its standard output and errors.

        Raises:
            OSError: the server has ended, or this system does not watch processes that are not its children.
        """
        request = {"arguments": list(arguments), "environment": environment, "folder": folder}
        content = json.dumps(request).encode()
        socket.send_fds(self._channel, [len(content).to_bytes(forking.NUMBER)], [output.fileno()])
        self._channel.sendall(content)
        try:
            return Fork(int.from_bytes(forking.receive(self._channel, forking.NUMBER)))
        except EOFError:
            raise BrokenPipeError("the fork server has ended") from None


def forks_for(notebooks: Sequence[Path]) -> Forks | None:
    """Return the fork server of this process, which begins to import what the notebooks import.

    None is returned where forks gain nothing: no notebook after the first one is slow to import.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open") or os.environ.get(SWITCH) == "no":
        return None
    names = [fingerprints.libraries(notebook) for notebook in notebooks]
    if not any(SLOW_TO_IMPORT & needed for needed in names[1:]):
        return None
    return _server(frozenset({"ipykernel.kernelapp", "numpy"}.union(*names)))


@cache
def _server(modules: frozenset[str]) -> Forks:
    return Forks(sorted(modules))


def manager(output: TextIO, process_groups: list[int], forks: Forks | None = None) -> type:
    """Return a kernel manager whose kernel's own output, which is not a cell's, goes to `output`.

    Args:
        output: an open file.
        process_groups: the number of the kernel's process group is added to it.
        forks: where the kernel is to be forked if it is ready; None for an ordinary process.
    """
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    class Forked(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **settings: Any) -> dict[str, Any]:
            arguments, self.cwd = cmd[cmd.index(LAUNCHER) + 1 :], settings.get("cwd") or os.getcwd()
            try:
                self.process = forks.start(arguments, settings["env"], self.cwd, output)
            except OSError:  # then in the ordinary way
                return await super().launch_kernel(cmd, **settings)
            self.pid = self.pgid = self.process.pid
            return self.connection_info

    class Manager(AsyncKernelManager):
        async def _async_start_kernel(self, **settings: Any) -> None:
            if forks and forks.is_ready():
                self.kernel_id = str(uuid.uuid4())
                self.provisioner = Forked(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
            await super()._async_start_kernel(stdout=output, stderr=output, **settings)
            process_groups.append(self.provisioner.pid)

        start_kernel = _async_start_kernel

    return Manager
