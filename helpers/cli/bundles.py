"""`thaw predict --bundle`: any number of images by a bundle, without TensorFlow, in constant memory, resumable.

What is written is whole lines. Interrupted, the same command goes on behind the last image that is in the file.
"""

import csv
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from helpers.cli import quiet
from helpers.core import disk, project, words
from helpers.export import loading

SECONDS_BETWEEN_LINES = 10
FLUSH = 64  # images between two writes to the disk
UNFINISHED = ".unfinished"

Bundle = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Predict by a bundle of `thaw export`, without TensorFlow.")
]
Formats = Annotated[str, typer.Option(metavar="A,B,...", help="See `thaw params 07`; the first one is used.")]
Serve = Annotated[bool, typer.Option("--serve", help="Also write a function that answers over HTTP.")]
More = Annotated[
    list[str] | None, typer.Option("--set", metavar="PARAMETER=VALUE", help="A parameter of 07; may be repeated.")
]


def predict(bundle: Path, paths: Sequence[Path], file: Path | None, console: Console) -> int:
    """Classify images by a bundle; return the exit code, which is 1 where an image could not be read.

    Args:
        bundle: the folder; its own code reads the images.
        paths: images, and folders that are searched for images.
        file: the CSV to write, with a row for each image and the reason where it was not read; None prints a line each.
        console: where answers or progress go.

    Raises:
        FileNotFoundError: there is no such bundle, image or folder.
        ValueError: the unfinished file beside `file` has other columns.
    """
    folder = bundle if bundle.is_dir() else project.resolve(bundle)
    used = loading.load(folder)
    with quiet.native_log():
        model = used.Model(folder)
    if file is None:
        return _print(used.rows(model, paths), console)
    partial = file.with_name(file.name + UNFINISHED)
    with _going_on(partial, used.header(model)) as (stream, done, last):
        found = used.find(paths)
        if last:
            _skip(found, done, last, partial)
            console.print(f"{done:,} images are in {partial.name} already; going on after {last}", markup=False)
        unread = _write(used.rows(model, found), stream, done, console)
    os.replace(partial, file)
    console.print(f"Written: {file}", markup=False)
    return int(unread > 0)


def predict_by_run(
    run: str, paths: Sequence[Path], file: Path | None, columns: str, hosts: str, console: Console
) -> int:
    """Classify images with the model of a run; return the exit code, which is 1 where an image could not be read.

    Args:
        run: its folder or name.
        paths: images, and folders that are searched for images.
        file: the CSV to write, or None.
        columns: of the CSV, separated by commas, as a competition asks for them; "" for all.
        hosts: address of a Dask scheduler, or "".
        console: where answers go.

    Raises:
        FileNotFoundError: there is no such run, image or folder.
        ValueError: columns without a file.
    """
    if columns and not file:
        raise ValueError("--columns says how the CSV is to be written: give --csv FILE too.")
    with quiet.native_log():
        from helpers.evaluation import prediction

        table, unreadable = prediction.predict(run, paths, hosts)
    if caution := table.attrs.get("caution"):
        console.print(caution, style="yellow", markup=False)
    for line in prediction.lines(table):
        console.print(line, markup=False)
    for path, reason in unreadable.items():
        console.print(f"{path}  not read: {reason}", style="yellow", markup=False)
    if file:
        written = prediction.submission(table, columns.split(",")) if columns else table
        disk.write_text(file, written.to_csv(index=False))
        console.print(f"Written: {file}", markup=False)
    return int(bool(unreadable))


def _print(rows: Iterator[list[str]], console: Console) -> int:
    unread = 0
    for path, predicted, confidence, reason, *_ in rows:
        unread += bool(reason)
        said = f"not read: {reason}" if reason else f"{predicted}  {float(confidence):.3f}"
        console.print(f"{path}  {said}", style="yellow" if reason else None, markup=False)
    return int(unread > 0)


def _write(rows: Iterator[list[str]], stream: TextIO, done: int, console: Console) -> int:
    """Write rows as they come and return how many images could not be read; tell of these and of the progress."""
    writer, unread, begin, told = csv.writer(stream), 0, time.monotonic(), time.monotonic()
    for count, row in enumerate(rows, 1):
        writer.writerow(row)
        if row[3]:
            unread += 1
            console.print(f"{row[0]}  not read: {row[3]}", style="yellow", markup=False)
        if count % FLUSH == 0:
            stream.flush()
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            rate = count / (told - begin)
            console.print(
                f"{done + count:,} images, {rate:,.0f} a second, {words.duration(told - begin)}", markup=False
            )
    return unread


@contextmanager
def _going_on(partial: Path, header: list[str]) -> Iterator[tuple[TextIO, int, str]]:
    """Open the unfinished file behind its last whole line; yield it, the images in it, and the path of the last."""
    done, last, end = 0, "", 0
    if partial.is_file():
        with open(partial, newline="", encoding="utf-8") as stream:
            counted = _Lines(stream)
            reader = csv.reader(counted)
            if next(reader, header) != header:
                raise ValueError(f"{partial} has the columns of another bundle. Remove it, or name another --csv.")
            end = counted.end
            for row in reader:
                if len(row) == len(header) and counted.whole:
                    done, last, end = done + 1, row[0], counted.end
    with open(partial, "r+" if end else "w", newline="", encoding="utf-8") as stream:
        stream.seek(end)
        stream.truncate()
        if not end:
            csv.writer(stream).writerow(header)
        yield stream, done, last


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


def _skip(found: Iterator[Any], done: int, last: str, partial: Path) -> None:
    """Pass over the images that are in the unfinished file.

    Raises:
        ValueError: they are other images.
    """
    passed = str(next(itertools.islice(found, done - 1, done), ""))
    if passed != last:
        raise ValueError(
            f"{partial} was begun with other images ({last} where {passed} is now). Remove it to begin again."
        )
