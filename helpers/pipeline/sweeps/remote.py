"""Stages of a sweep made on several hosts: the workers of a Dask scheduler, one stage each at a time.

A stage whose worker is gone is given to another one, which resumes it. When the sweep itself ends, workers finish their
current stage, and the same command finds it made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from helpers.core import disk, project
from helpers.core.parallel import HostError, connect
from helpers.pipeline import hosts, housekeeping, planning
from helpers.pipeline.sweeps import pauses, plans

if TYPE_CHECKING:
    from distributed import Client


class Hosts:
    """Makes units on the workers of a scheduler.

    Attributes:
        workers: their addresses when the sweep began.
    """

    def __init__(self, client: "Client"):
        store = project.runs_folder() / housekeeping.STORE
        disk.check_writable(store)
        self.client, self.workers = client, hosts.check(client, store)

    def make(self, unit: plans.Unit, place: str) -> float:
        """Make one unit; return the seconds.

        Raises:
            planning.StageError, ValueError, OSError: it failed.
            HostError: one worker after the other died while making it, or the scheduler is gone.
        """
        from distributed import CancelledError, KilledWorker

        task = self.client.submit(_make, unit.step, unit.until, pure=False)
        try:
            return task.result()
        except KilledWorker as error:
            raise HostError(f"{unit.name}: {error}") from None
        except CancelledError:
            raise HostError(f"The Dask scheduler is gone. {hosts.RESUMES}") from None


@contextmanager
def opened(address: str) -> Iterator[Hosts]:
    """Connect to a scheduler, such as tcp://10.0.0.1:8786, whose workers can all do the same.

    Raises:
        ImportError: Dask is not installed.
        HostError: no scheduler answers there, or the workers differ.
    """
    with connect(address) as client:
        yield Hosts(client)


def _make(step: planning.Step, until: int) -> float:
    """Make a stage on this host; called by a worker of Dask."""
    return pauses.make(step, until, lambda line: None, lambda text: None)
