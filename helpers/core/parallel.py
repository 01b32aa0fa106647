"""Work on many cores, and on several hosts through a Dask scheduler.

The hosts are the scheduler's workers. Each is started from the project's folder, in its environment:

    dask scheduler                                                        # on one host
    dask worker tcp://scheduler:8786 --nthreads 1 --nworkers 1            # on every host

All hosts share a file system and see the project, the runs and the images under the same paths.
"""

import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
from joblib import Parallel, cpu_count, delayed

from helpers.core import progress, project

if TYPE_CHECKING:
    from distributed import Client

PIECE = 64  # images that a host gets at a time
AHEAD = 4  # pieces in progress, for each host
RETRIES = 2  # of a piece that fails; workers that die do not count
START = "dask worker {address} --nthreads 1 --nworkers 1"


class HostError(RuntimeError):
    """A host failed or differs from the others; the message names it and says how to fix it."""


@contextmanager
def connect(address: str) -> Iterator["Client"]:
    """Connect to a scheduler, such as tcp://10.0.0.1:8786.

    Raises:
        ImportError: Dask is not installed.
        HostError: no scheduler answers there.
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
    function: Callable[[Any], Any], pieces: Iterable[Any], *, address: str, reads: Sequence[str | os.PathLike]
) -> Iterator[Any]:
    """Yield function(piece) for each piece, in order, computed on the hosts; if a host dies, others take its pieces.

    Args:
        function: of a module of this project, or a `functools.partial` of one.
        pieces: picklable; only a few for each host are in progress, so memory does not grow with their number.
        address: the scheduler's.
        reads: files and folders that the pieces need; those that exist here must be on every host.

    Raises:
        HostError: a host does not see them, or the scheduler is gone. Errors of `function` pass through.
    """
    with connect(address) as client:
        from distributed import CancelledError

        shared_paths = [str(path) for path in reads if os.path.exists(path)]
        submit = partial(client.submit, _piece, function=function, reads=shared_paths, retries=RETRIES, pure=False)
        tasks = (submit(piece) for piece in pieces)
        ahead = deque(itertools.islice(tasks, AHEAD * max(1, len(client.nthreads()))))
        while ahead:
            try:
                result = ahead.popleft().result()
                ahead.extend(itertools.islice(tasks, 1))
            except CancelledError:
                raise HostError(f"The scheduler {address} is gone. The same command resumes when it is back.") from None
            yield result


def _piece(piece: Any, *, function: Callable[[Any], Any], reads: list[str]) -> Any:
    if missing := [path for path in reads if not os.path.exists(path)]:
        raise HostError(f"{socket.gethostname()} does not see {missing[0]}. All hosts need it under the same path.")
    return function(piece)


def for_each(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int = 0,
    label: str = "",
    reads: Sequence[str | os.PathLike] = (),
) -> Iterator[Any]:
    """Yield function(item) for each item, in order, on several cores, with progress.

    Args:
        workers: threads; 0 means one for each core.
        label: the name of the work, for the progress.
        reads: files and folders that each host must see. With it, the hosts of a `thaw run --hosts` share the work;
            the function must then be of a module, or a `functools.partial` of one.
    """
    address = os.environ.get(project.HOSTS_VARIABLE)
    if reads and address:
        pieces = [items[start : start + PIECE] for start in range(0, len(items), PIECE)]
        lists = spread(partial(_all_of, function), pieces, address=address, reads=reads)
        results = itertools.chain.from_iterable(lists)
    else:
        results = in_threads(function, items, workers)
    yield from progress.track(results, total=len(items), label=label)


def in_threads(function: Callable[[Any], Any], items: Sequence[Any], workers: int = 0) -> Iterator[Any]:
    """Yield function(item) for each item, in order, on several cores.

    Threads, since decoding, resizing, hashing and encoding all release Python's lock: as fast as processes and
    ready immediately. Only a few items are in progress at a time, so memory does not grow with their number.
    """
    run = Parallel(n_jobs=workers or cpu_count(), prefer="threads", return_as="generator")
    threads_before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # all cores are already in use
    try:
        yield from run(delayed(function)(item) for item in items)
    finally:
        cv2.setNumThreads(threads_before)


def _all_of(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return list(in_threads(function, items))
