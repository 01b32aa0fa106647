"""`thaw predict`: any number of images by a run or by a bundle, in constant memory, resumable.

Rows are written to an unfinished file as they come, whole lines at a time. After an interruption, the same command
resumes after the last image in it. Once all images are in it, it becomes the requested file.
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
REASON = 3  # the column with the reason why a file was not read

Bundle = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Predict by a bundle of `thaw export`, without TensorFlow.")
]


@dataclass(frozen=True)
class Predictor:
    """What classifies: a run or a bundle.

    Attributes:
        header: the columns of a row: path, predicted, confidence, why it was not read, notes, each class.
        class_names: in the model's order.
        version: changes when the model does.
        rows: files -> a row for each, in order.
        caution: a warning about the rows so far, or "".
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
        ValueError: columns are requested; or as `by_run`.
    """
    if columns:
        raise ValueError("--columns takes a run, not a bundle, whose answer may be unsure: thaw predict RUN ...")
    _check(file)
    folder = bundle if bundle.is_dir() else project.resolve(bundle)
    code = loading.load(folder)
    with quiet.native_log():
        model = code.Model(folder)
    version = disk.version_of(folder / name for name in (*code.DECISIVE, model.file))
    predictor = Predictor(code.header(model), model.classes, version, partial(code.rows, model), model.caution)
    return _classify(predictor, paths, file, "", console)


def by_run(run: str, paths: Sequence[Path], file: Path | None, columns: str, hosts: str, console: Console) -> int:
    """Classify images with the model of a run; return the exit code, which is 1 where an image could not be read.

    Args:
        run: its folder or name.
        paths: images, and folders that are searched for images.
        file: the CSV or Parquet file to write, with a row for each image; None prints a line each.
        columns: of a CSV, separated by commas, as a competition requires them; "" for all.
        hosts: address of a Dask scheduler, or "".
        console: where answers or progress go.

    Raises:
        FileNotFoundError: there is no such run, image or folder.
        ValueError: columns without a CSV, Parquet without its extra, or the unfinished file is of another model.
    """
    if columns and (not file or file.suffix.lower() in PARQUET):
        raise ValueError("--columns names the columns of a CSV: give --csv FILE too, a CSV.")
    _check(file)
    with quiet.native_log():
        from helpers.evaluation import prediction

        model = prediction.Classifier(run, hosts)
        rows = partial(model.rows, reads=paths)
        predictor = Predictor(model.header, model.class_names, model.version, rows, model.caution)
        return _classify(predictor, paths, file, columns, console)


def _check(file: Path | None) -> None:
    """Check before the work that the file can be written."""
    if file and file.suffix.lower() in PARQUET:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(f"{file.name} needs a writer of Parquet: pip install -e '.[parquet]'") from None
    if file and not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent} to write {file.name} into. Make it first.")


def _classify(predictor: Predictor, paths: Sequence[Path], file: Path | None, columns: str, console: Console) -> int:
    from helpers.data.formats import listing  # with OpenCV, which other commands need not wait for

    files = listing.find(paths)
    if file is None:
        unread = _print(predictor, files, console)
    else:
        unfinished = _unfinished(file, predictor.version)
        with _resumed(unfinished, predictor.header) as (stream, done, last, unread):
            if last:
                _skip(files, done, last, unfinished)
                console.print(f"{done:,} images are in {unfinished.name} already; resuming after {last}", markup=False)
            unread += _write(predictor.rows(files), stream, done, console)
        _finish(unfinished, file, predictor, columns)
        console.print(f"Written: {file}", markup=False)
    if caution := predictor.caution():
        console.print(caution, style="yellow", markup=False)
    return int(unread > 0)


def _print(predictor: Predictor, files: Iterator[Path], console: Console) -> int:
    unread, notes = 0, predictor.header[REASON + 1 : -len(predictor.class_names)]
    for row in predictor.rows(files):
        path, predicted, confidence, reason, *rest = _as_text(row)
        if reason:
            unread += 1
            _print_unread(path, reason, console)
            continue
        note_values = dict(zip((name.rstrip("_") for name in notes), rest, strict=False))
        line = f"{path}  {predicted}  {float(confidence):.3f}"
        line += f"  unsure, or {note_values['second']}" if note_values.get("answer") == "unsure" else ""
        console.print(line + ("  looks like none of the classes" if note_values.get("novel") else ""), markup=False)
    return unread


def _write(rows: Iterator[list], stream: TextIO, done: int, console: Console) -> int:
    """Write rows as they come and return how many images could not be read; print these and the progress."""
    writer, unread, begin, printed_at = csv.writer(stream), 0, time.monotonic(), time.monotonic()
    for count, row in enumerate(map(_as_text, rows), 1):
        writer.writerow(row)
        if row[REASON]:
            unread += 1
            _print_unread(row[0], row[REASON], console)
        if count % FLUSH == 0:
            stream.flush()
        if time.monotonic() - printed_at > SECONDS_BETWEEN_LINES:
            printed_at = time.monotonic()
            rate = count / (printed_at - begin)
            console.print(
                f"{done + count:,} images, {rate:,.0f} a second, {words.duration(printed_at - begin)}", markup=False
            )
    return unread


def _print_unread(path: str, reason: str, console: Console) -> None:
    console.print(f"{path}  not read: {reason}", style="yellow", markup=False)


def _as_text(row: list) -> list[str]:
    """Return a row as it is written: numbers with the digits of float32, names that are not UTF-8 with \\x.."""
    return [f"{value:.9g}" if isinstance(value, float) else _plain(value) for value in row]


def _plain(text: Any) -> str:
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _unfinished(file: Path, version: str) -> Path:
    """Return the unfinished file of this model.

    Raises:
        ValueError: there is one of another model.
    """
    path = file.with_name(f"{file.name}.{version}{UNFINISHED}")
    for other in file.parent.iterdir():
        if other.name.startswith(f"{file.name}.") and other.name.endswith(UNFINISHED) and other != path:
            raise ValueError(f"{other} was begun with another model. Remove it to begin again, or name another file.")
    return path


@contextmanager
def _resumed(unfinished: Path, header: list[str]) -> Iterator[tuple[TextIO, int, str, int]]:
    """Open the unfinished file after its last whole line; yield it, the number of images in it, the path of the last,
    and how many of them could not be read.
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


def _skip(files: Iterator[Path], done: int, last: str, unfinished: Path) -> None:
    """Skip the images that are in the unfinished file.

    Raises:
        ValueError: they are other images.
    """
    passed = _plain(next(itertools.islice(files, done - 1, done), ""))
    if passed != last:
        raise ValueError(
            f"{unfinished} was begun with other images ({last} where {passed} is now). Remove it to begin again."
        )


def _finish(unfinished: Path, file: Path, predictor: Predictor, columns: str) -> None:
    """Write the requested file from all rows; it appears whole or not at all."""
    if not columns and file.suffix.lower() not in PARQUET:
        os.replace(unfinished, file)
        return
    draft = file.with_name(f".{file.name}.{os.getpid()}{disk.TEMPORARY}")
    try:
        if columns:
            _submission(unfinished, draft, predictor, columns.split(","))
        else:
            _parquet(unfinished, draft, predictor)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    unfinished.unlink()


def _submission(rows: Path, draft: Path, predictor: Predictor, columns: list[str]) -> None:
    """Write a CSV in the columns of a competition, without images that could not be read."""
    from helpers.evaluation import prediction

    for number, chunk in enumerate(disk.read_table(rows, chunksize=CHUNK)):
        chunk = chunk[chunk[predictor.header[REASON]] == ""]
        chunk.attrs["class_names"] = predictor.class_names
        prediction.submission(chunk, columns).to_csv(draft, mode="a", index=False, header=not number)


def _parquet(rows: Path, draft: Path, predictor: Predictor) -> None:
    """Write Parquet: texts, and float32 that is null where an image could not be read."""
    import pyarrow
    from pyarrow import csv as reading
    from pyarrow import parquet

    types = dict.fromkeys(predictor.header, pyarrow.string())
    types |= dict.fromkeys(["confidence", *predictor.class_names], pyarrow.float32())
    convert = reading.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False)
    parse = reading.ParseOptions(newlines_in_values=True)
    with (
        reading.open_csv(rows, parse_options=parse, convert_options=convert) as batches,
        parquet.ParquetWriter(draft, batches.schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
