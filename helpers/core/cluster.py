"""Several hosts through a Dask scheduler, and pieces of bulk work spread over them.

The hosts are the scheduler's workers. Each is started from the project's folder, in its environment:

    dask scheduler                                                        # on one host
    dask worker tcp://scheduler:8786 --nthreads 1 --nworkers 1            # on every host

All of them find the project, the runs and the images under the same paths, on a file system that they share.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

RETRIES = 2  # of a piece of bulk work that fails, not counting workers that die
START = "dask worker {address} --nthreads 1 --nworkers 1"


class HostError(RuntimeError):
    """A host failed or is not as the others; the message says which and how to mend it."""


@contextmanager
def connect(address: str) -> Iterator["Client"]:
    """Connect to a scheduler, such as tcp://10.0.0.1:8786.

    Raises:
        ImportError: Dask is not installed.
        HostError: nobody answers there.
    """
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--hosts needs an extra: pip install -e '.[cluster]'") from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise HostError(
            f"No Dask scheduler answers at {address} ({str(error).splitlines()[0]}). Start one with `dask scheduler`,"
            f" and on every host `{START.format(address=address)}`."
        ) from None
    with client:
        yield client


def spread(
    function: Callable[[Any], Any], pieces: Sequence[Any], *, address: str, reads: Sequence[str | os.PathLike]
) -> Iterator[Any]:
    """Yield function(piece) for each piece, in order, computed on the hosts; a host that dies costs nothing.

    Args:
        function: of a module of this project, or a `functools.partial` of one.
        pieces: what can be pickled.
        address: the scheduler's.
        reads: files and folders that the pieces need; those that are here must be on every host.

    Raises:
        HostError: a host does not see them, or the scheduler is gone; or what `function` raises.
    """
    with connect(address) as client:
        from distributed import CancelledError

        seen = [str(path) for path in reads if os.path.exists(path)]
        tasks = client.map(_piece, pieces, function=function, reads=seen, retries=RETRIES, pure=False)
        for task in tasks:
            try:
                yield task.result()
            except CancelledError:
                raise HostError(f"The scheduler {address} is gone. The same command goes on when it is back.") from None


def _piece(piece: Any, *, function: Callable[[Any], Any], reads: list[str]) -> Any:
    if missing := [path for path in reads if not os.path.exists(path)]:
        raise HostError(f"{socket.gethostname()} does not see {missing[0]}. All hosts need it under the same path.")
    return function(piece)
