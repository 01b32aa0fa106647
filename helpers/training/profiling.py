"""Where the time of a training step goes, measured by the TensorFlow Profiler."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import pandas as pd

from helpers.core import disk

CALLS = re.compile(r".*(Call|While|If)$")  # operations whose time is that of the operations in them
ROWS = 15


def check(steps: Sequence[int]) -> None:
    """Raise a ValueError unless `steps` is empty, or holds a first and a last step and TensorFlow trains."""
    if steps and keras.backend.backend() != "tensorflow":
        raise ValueError(f"profile_steps needs TensorFlow; Keras runs on {keras.backend.backend()}. Leave it out.")
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise ValueError(f"profile_steps: expected [first, last] step, such as [10, 20]; got {list(steps)}.")


def tensorboard(logs: Path, steps: Sequence[int] = ()) -> keras.callbacks.TensorBoard:
    """Return the callback that writes scalars and the graph to `logs`, and a profile of the steps from first to last.

    If `fit` runs several steps in one call, every call that holds one of the steps is profiled.
    """
    check(steps)
    return _TensorBoard(str(logs), steps=steps)


class _TensorBoard(keras.callbacks.TensorBoard):
    def __init__(self, logs: str, *, steps: Sequence[int]):
        super().__init__(logs, write_graph=True, profile_batch=tuple(steps) or 0)
        self.steps = steps

    def on_train_begin(self, logs: dict | None = None) -> None:
        super().on_train_begin(logs)
        if self.steps:  # Keras counts how often `fit` was called back
            together = self.model.steps_per_execution
            self._start_batch, self._stop_batch = (-(-step // together) for step in self.steps)


def write_profile(out: Path, steps: Sequence[int] = (1, 1)) -> pd.DataFrame | None:
    """Write profile.csv of the newest profile in a stage's folder and return its first rows.

    Columns: op (the kind of operation on a CPU, the kernel on a GPU), calls, milliseconds (of all threads or streams
    together), share (of all operations, 0 to 1). The trace itself is in logs/, for TensorBoard's profile plugin.

    Args:
        out: the stage's folder.
        steps: first and last step that were profiled; if there are none, nothing is written.
    """
    if not steps:
        return None
    traces = sorted((out / "logs").glob("train/plugins/profile/*/*.xplane.pb"))
    if not traces:  # no reason to lose the trained model
        print("profile_steps: no step was profiled, since the training had fewer.")
    events = pd.DataFrame(_operations(traces[-1]) if traces else [], columns=["op", "milliseconds"])
    table = events.groupby("op")["milliseconds"].agg(calls="size", milliseconds="sum")
    table = table.sort_values("milliseconds", ascending=False).reset_index()
    table["share"] = table["milliseconds"] / table["milliseconds"].sum()
    disk.write_text(out / "profile.csv", table.round(4).to_csv(index=False))
    return table.head(ROWS).round(4)


def _operations(trace: Path) -> Iterator[tuple[str, float]]:
    """Yield the kind and the milliseconds of each operation that ran."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace.FromString(trace.read_bytes())
    devices = [plane for plane in space.planes if plane.name.startswith("/device:")]
    for plane in devices or space.planes:
        for event in (event for line in plane.lines for event in line.events):
            about = plane.event_metadata[event.metadata_id]
            kind = about.name if devices else about.display_name
            # On a CPU an operation is "its/name:Kind", among others, such as the threads' notes.
            if devices or (about.name.endswith(f":{kind}") and not CALLS.fullmatch(kind)):
                yield kind, event.duration_ps / 1e9
