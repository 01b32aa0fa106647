"""A fork server: a process that imports libraries once, and whose forks become kernels.

    python -m helpers.pipeline.forking FILE_DESCRIPTOR MODULE...

It imports nothing of this project, so that each kernel reads the project's code as it is then. It ends when the process
that started it ends, and a kernel ends when the server does.
"""

import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

READY = b"+"
NUMBER = 8  # bytes of a number on the channel


def serve(channel: socket.socket, modules: Iterable[str]) -> None:
    """Import `modules`, report it, then fork for each request on `channel` until the other side closes it.

    A request is the number of its bytes, with the file that takes the kernel's output, then JSON: arguments,
    environment and folder of a kernel. The answer is the number of the new process.
    """
    for name in modules:
        with suppress(Exception):  # a class or function, or a library that is not installed: the notebook will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that an ended kernel leaves no zombie
    channel.sendall(READY)
    while True:
        head, files, *_ = socket.recv_fds(channel, NUMBER, 1)
        if not head:
            return
        request = json.loads(receive(channel, int.from_bytes(head)))
        process = os.fork()
        if not process:
            channel.close()
            become_kernel(request, files[0])
        os.close(files[0])
        channel.sendall(process.to_bytes(NUMBER))


def receive(channel: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes of a channel.

    Raises:
        EOFError: the other side closed it before.
    """
    content = b""
    while len(content) < size:
        more = channel.recv(size - len(content))
        if not more:
            raise EOFError("the channel was closed")
        content += more
    return content


def become_kernel(request: dict[str, Any], output: int) -> None:
    """Make this fork what ``python -m ipykernel_launcher`` would be, run it to its end, and exit."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        random.seed()  # else each fork would draw the same
        sys.modules["numpy"].random.seed()
        from ipykernel.kernelapp import IPKernelApp

        sys.argv = ["ipykernel_launcher", *request["arguments"]]
        IPKernelApp.launch_instance([*request["arguments"], f"--IPKernelApp.parent_handle={os.getppid()}"])
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as to_parent:
        serve(to_parent, sys.argv[2:])
