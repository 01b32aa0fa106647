"""`thaw predict`: any number of images by a run or by a bundle, in constant memory, resumable.

Rows are written to an unfinished file as they come, whole lines at a time. Interrupted, the same command goes on behind
the last image that is in it. Once all are there, it becomes the file that was asked for.
"""

import csv
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from helpers.cli import quiet
from helpers.core import disk, project, words
from helpers.export import loading

SECONDS_BETWEEN_LINES = 10
FLUSH = 64  # images between two writes to the disk
CHUNK = 10_000  # rows of a submission that are in memory at a time
UNFINISHED = ".unfinished"
PARQUET = (".parquet", ".pq")
REASON = 3  # the column that says why a file is no readable image

Bundle = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Predict by a bundle of `thaw export`, without TensorFlow.")
]


@dataclass(frozen=True)
class Asked:
    """What classifies: a run or a bundle.

    Attributes:
        header: the columns of a row: path, predicted, confidence, why it was not read, notes, each class.
        class_names: in the model's order.
        version: changes when the model does.
        rows: files -> a row for each, in order.
        caution: what should be known about the rows so far, or "".
    """

    header: list[str]
    class_names: list[str]
    version: str
    rows: Callable[[Iterator[Path]], Iterator[list]]
    caution: Callable[[], str]


def by_bundle(bundle: Path, paths: Sequence[Path], file: Path | None, columns: str, console: Console) -> int:
    """Classify images by a bundle, whose own code reads them; the rest is as for `by_run`.

    Raises:
        FileNotFoundError: there is no such bundle, image or folder.
        ValueError: columns are asked for; or as `by_run`.
    """
    if columns:
        raise ValueError("--columns takes a run, not a bundle, whose answer may be unsure: thaw predict RUN ...")
    _check(file)
    folder = bundle if bundle.is_dir() else project.resolve(bundle)
    used = loading.load(folder)
    with quiet.native_log():
        model = used.Model(folder)
    version = disk.version_of(folder / name for name in (*used.DECISIVE, model.file))
    asked = Asked(used.header(model), model.classes, version, partial(used.rows, model), model.caution)
    return _classify(asked, paths, file, "", console)


def by_run(run: str, paths: Sequence[Path], file: Path | None, columns: str, hosts: str, console: Console) -> int:
    """Classify images with the model of a run; return the exit code, which is 1 where an image could not be read.

    Args:
        run: its folder or name.
        paths: images, and folders that are searched for images.
        file: the CSV or Parquet file to write, with a row for each image; None prints a line each.
        columns: of a CSV, separated by commas, as a competition asks for them; "" for all.
        hosts: address of a Dask scheduler, or "".
        console: where answers or progress go.

    Raises:
        FileNotFoundError: there is no such run, image or folder.
        ValueError: columns without a CSV, Parquet without its extra, or the unfinished file is of another model.
    """
    if columns and (not file or file.suffix.lower() in PARQUET):
        raise ValueError("--columns says how the CSV is to be written: give --csv FILE too, a CSV.")
    _check(file)
    with quiet.native_log():
        from helpers.evaluation import prediction

        model = prediction.Classifier(run, hosts)
        rows = partial(model.rows, reads=paths)
        asked = Asked(model.header, model.class_names, model.version, rows, model.caution)
        return _classify(asked, paths, file, columns, console)


def _check(file: Path | None) -> None:
    """Find out before the work whether the file can be written."""
    if file and file.suffix.lower() in PARQUET:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(f"{file.name} needs a writer of Parquet: pip install -e '.[parquet]'") from None
    if file and not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent} to write {file.name} into. Make it first.")


def _classify(asked: Asked, paths: Sequence[Path], file: Path | None, columns: str, console: Console) -> int:
    from helpers.data.formats import listing  # with OpenCV, which other commands need not wait for

    found = listing.find(paths)
    if file is None:
        unread = _print(asked, found, console)
    else:
        unfinished = _unfinished(file, asked.version)
        with _going_on(unfinished, asked.header) as (stream, done, last, unread):
            if last:
                _skip(found, done, last, unfinished)
                console.print(f"{done:,} images are in {unfinished.name} already; going on after {last}", markup=False)
            unread += _write(asked.rows(found), stream, done, console)
        _finish(unfinished, file, asked, columns)
        console.print(f"Written: {file}", markup=False)
    if caution := asked.caution():
        console.print(caution, style="yellow", markup=False)
    return int(unread > 0)


def _print(asked: Asked, found: Iterator[Path], console: Console) -> int:
    unread, notes = 0, asked.header[REASON + 1 : -len(asked.class_names)]
    for row in asked.rows(found):
        path, predicted, confidence, reason, *rest = _as_text(row)
        if reason:
            unread += 1
            _say_unread(path, reason, console)
            continue
        said = dict(zip((name.rstrip("_") for name in notes), rest, strict=False))
        line = f"{path}  {predicted}  {float(confidence):.3f}"
        line += f"  unsure, or {said['second']}" if said.get("answer") == "unsure" else ""
        console.print(line + ("  looks like none of the classes" if said.get("novel") else ""), markup=False)
    return unread


def _write(rows: Iterator[list], stream: TextIO, done: int, console: Console) -> int:
    """Write rows as they come and return how many images could not be read; tell of these and of the progress."""
    writer, unread, begin, told = csv.writer(stream), 0, time.monotonic(), time.monotonic()
    for count, row in enumerate(map(_as_text, rows), 1):
        writer.writerow(row)
        if row[REASON]:
            unread += 1
            _say_unread(row[0], row[REASON], console)
        if count % FLUSH == 0:
            stream.flush()
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            rate = count / (told - begin)
            console.print(
                f"{done + count:,} images, {rate:,.0f} a second, {words.duration(told - begin)}", markup=False
            )
    return unread


def _say_unread(path: str, reason: str, console: Console) -> None:
    console.print(f"{path}  not read: {reason}", style="yellow", markup=False)


def _as_text(row: list) -> list[str]:
    """Return a row as it is written: numbers with the digits of float32, names that are no UTF-8 with \\x.."""
    return [f"{value:.9g}" if isinstance(value, float) else _plain(value) for value in row]


def _plain(text: Any) -> str:
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _unfinished(file: Path, version: str) -> Path:
    """Return the unfinished file of this model.

    Raises:
        ValueError: there is one of another model.
    """
    own = file.with_name(f"{file.name}.{version}{UNFINISHED}")
    for other in file.parent.iterdir():
        if other.name.startswith(f"{file.name}.") and other.name.endswith(UNFINISHED) and other != own:
            raise ValueError(f"{other} was begun with another model. Remove it to begin again, or name another file.")
    return own


@contextmanager
def _going_on(unfinished: Path, header: list[str]) -> Iterator[tuple[TextIO, int, str, int]]:
    """Open the unfinished file behind its last whole line; yield it, the images in it, the path of the last, and how
    many of them could not be read.
    """
    done, last, unread, end = 0, "", 0, 0
    if unfinished.is_file():
        with open(unfinished, newline="", encoding="utf-8") as stream:
            counted = _Lines(stream)
            reader = csv.reader(counted)
            if next(reader, header) == header and counted.whole:
                end = counted.end
                for row in reader:
                    if len(row) == len(header) and counted.whole:
                        done, last, end, unread = done + 1, row[0], counted.end, unread + bool(row[REASON])
    with open(unfinished, "r+" if end else "w", newline="", encoding="utf-8") as stream:
        stream.seek(end)
        stream.truncate()
        if not end:
            csv.writer(stream).writerow(header)
        begin = stream.tell()
        try:
            yield stream, done, last, unread
        finally:
            if not done and stream.tell() == begin:  # it failed before the first row
                unfinished.unlink()


class _Lines:
    """The lines of a file, with where the last one ends in bytes and whether it is whole."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.end, self.whole = stream, 0, True

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self.stream)
        self.end, self.whole = self.end + len(line.encode()), line.endswith("\n")
        return line


def _skip(found: Iterator[Path], done: int, last: str, unfinished: Path) -> None:
    """Pass over the images that are in the unfinished file.

    Raises:
        ValueError: they are other images.
    """
    passed = _plain(next(itertools.islice(found, done - 1, done), ""))
    if passed != last:
        raise ValueError(
            f"{unfinished} was begun with other images ({last} where {passed} is now). Remove it to begin again."
        )


def _finish(unfinished: Path, file: Path, asked: Asked, columns: str) -> None:
    """Make what was asked for of all rows; it appears whole or not at all."""
    if not columns and file.suffix.lower() not in PARQUET:
        os.replace(unfinished, file)
        return
    draft = file.with_name(f".{file.name}.{os.getpid()}{disk.TEMPORARY}")
    try:
        if columns:
            _submission(unfinished, draft, asked, columns.split(","))
        else:
            _parquet(unfinished, draft, asked)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    unfinished.unlink()


def _submission(rows: Path, draft: Path, asked: Asked, columns: list[str]) -> None:
    """Write a CSV in the columns of a competition, without images that could not be read."""
    from helpers.evaluation import prediction

    for number, chunk in enumerate(disk.read_table(rows, chunksize=CHUNK)):
        chunk = chunk[chunk[asked.header[REASON]] == ""]
        chunk.attrs["class_names"] = asked.class_names
        prediction.submission(chunk, columns).to_csv(draft, mode="a", index=False, header=not number)


def _parquet(rows: Path, draft: Path, asked: Asked) -> None:
    """Write Parquet: texts, and float32 that is null where an image could not be read."""
    import pyarrow
    from pyarrow import csv as reading
    from pyarrow import parquet

    types = dict.fromkeys(asked.header, pyarrow.string())
    types |= dict.fromkeys(["confidence", *asked.class_names], pyarrow.float32())
    convert = reading.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False)
    parse = reading.ParseOptions(newlines_in_values=True)
    with (
        reading.open_csv(rows, parse_options=parse, convert_options=convert) as batches,
        parquet.ParquetWriter(draft, batches.schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
