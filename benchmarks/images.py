"""Speed and memory of the data stages: python benchmarks/images.py

Everything is measured in one run on the same files, and ratios are printed:
- resizing 12-megapixel JPEGs to 224 pixels, against a plain loop of cv2.imread and cv2.resize, on one core;
- the same with writing, against vipsthumbnail (Debian: libvips-tools) on all cores;
- the inventory of the same files against resizing them;
- the peak memory of explore, split and resize for 20,000 small images against 2,000.
Processor time is compared too, since other work on the machine disturbs the clock.

The JPEGs are made here from the two photos in scikit-learn, enlarged, with the fine noise of a sensor. Phones
write 2 to 5 MB for 12 megapixels (1.3 to 3.3 bits a pixel, colour at half the resolution), so there are light, typical
and heavy files, each held level and held upright: phones store an upright photo on its side and note in EXIF how to
turn it, which the plain loop does with all 12 megapixels.

Four times the speed of the plain loop is reached for light files, almost for typical ones held upright, and not for
the others (two cores of an AMD EPYC: 4.1, 2.5 and 2.1 times held level, 6.4, 3.8 and 3.0 times held upright). Thaw
cannot change that. At a scale of 1/8 a JPEG decoder computes almost nothing, but it must still read every bit of the
Huffman code, since only the end of one symbol shows where the next begins. This reading is measured alone, by decoding
to grey at 1/8, one number for each block: it grows in proportion to the bits and is 76 to 90 % of our time. The plain
loop's time divided by it is printed too: the limit for every program that reads with libjpeg-turbo, as Pillow,
OpenCV and libvips do (5.3, 2.9 and 2.4 times held level).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import setting
from joblib import cpu_count
from PIL import Image
from sklearn.datasets import load_sample_images

from helpers.core import notebooks, parallel, progress, project
from helpers.data import grouping, images, inventory, leaks, links, resizing, sources, splits

SIZE = 224
PIXELS = 4000 * 3000
CASES = {"light": (1, 85), "typical": (4, 93), "heavy": (6, 95)}  # noise in grey levels, quality
HELD = {"level": 1, "upright": 6}  # EXIF orientation


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=24, help="12-megapixel photos of each kind; 0 leaves them out")
    parser.add_argument("--many", type=int, default=20_000, help="small images for the memory check; 0 leaves it out")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # the memory check calls itself
    arguments = parser.parse_args()
    if arguments.measure:
        _send_through(Path(arguments.measure))
        return
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.photos:
            compare_photos(Path(folder), arguments.photos)
        if arguments.many:
            compare_memory(Path(folder), arguments.many // 10, arguments.many)


def compare_photos(folder: Path, count: int) -> None:
    """Compare on photos of each kind, and print how the time of reading depends on their bits."""
    bits, seconds = [], []
    for case, (noise, quality) in CASES.items():
        photos = make_photos(folder / case, count, noise, quality)
        bits.append(sum(file.stat().st_size for file in photos) * 8 / count / PIXELS)
        for held, orientation in HELD.items():
            files = [turned(file, orientation) for file in photos]
            alone = compare(f"{case}, held {held}", files, bits[-1])
        seconds.append(alone / count)
        shutil.rmtree(folder / case)
    each, fixed = np.polyfit(bits, seconds, 1) * 1e3
    print(f"\nReading alone takes {fixed:.1f} ms an image and {each:.1f} ms more for each bit a pixel")


def make_photos(folder: Path, count: int, noise: float, quality: int) -> list[Path]:
    """Write `count` JPEGs of 4000 x 3000 pixels with noise of the given strength in grey levels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (3000, 4000, 3)).astype(np.float32), (0, 0), 0.7)
    grain *= noise / grain.std()
    photos = load_sample_images().images
    for number in range(count):
        photo = photos[number % 2][number : number + 400, 2 * number : 2 * number + 540]
        large = cv2.resize(photo, (4000, 3000), interpolation=cv2.INTER_CUBIC) + np.roll(grain, 131 * number, axis=1)
        Image.fromarray(np.clip(large, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=quality)
    return sorted(folder.iterdir())


def turned(file: Path, orientation: int) -> Path:
    """Write a photo once more, bit for bit the same except for its EXIF orientation, and return the new file."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    segment, data = exif.tobytes(), file.read_bytes()
    copy = file.parent / str(orientation) / file.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:])
    return copy


def compare(case: str, files: list[Path], bits: float) -> float:
    """Print the speeds of the plain loop, our loading, the inventory, and of both programs with writing.

    Returns:
        Seconds of processor time that reading the Huffman code of all files takes.
    """
    size = np.mean([file.stat().st_size for file in files]) / 1e6
    print(f"\n{len(files)} JPEGs of 12 megapixels, {case}: {size:.1f} MB each, {bits:.2f} bits a pixel")
    plain = timed("cv2.imread + cv2.resize, 1 core", files, lambda: [plain_loop(file) for file in files])
    load = timed("helpers.images.load, 1 core", files, lambda: [images.load(file, SIZE) for file in files])
    alone = timed("reading the Huffman code alone, 1 core", files, lambda: [read_code(file) for file in files])
    check = partial(inventory.examine, min_size=16, max_aspect=20, max_pixels=images.MAX_PIXELS)
    look = timed("inventory (checks and hashes), 1 core", files, lambda: [check(file) for file in files])
    print(f"  load is {plain / load:.2f} times as fast as the plain loop (wanted: 4)")
    print(f"  reading alone is {plain / alone:.2f} times as fast as the plain loop, and {alone / load:.0%} of load")
    target = files[0].parent.parent / "resized"
    ours = timed(f"load and write, {cpu_count()} cores", files, lambda: resize_all(files, target), best_of=2)
    print(f"  the inventory is {ours / look:.2f} times as fast as load and write (wanted: 1)")
    if shutil.which("vipsthumbnail"):
        theirs = timed(f"vipsthumbnail, {cpu_count()} cores", files, lambda: vips_all(files, target), best_of=2)
        print(f"  load and write is {theirs / ours:.2f} times as fast as vipsthumbnail (wanted: 0.9)")
    else:
        print("  vipsthumbnail is not installed (Debian: apt-get install libvips-tools)")
    return alone


def plain_loop(file: Path) -> np.ndarray:
    """Load an image as most scripts do."""
    return cv2.resize(cv2.imread(str(file)), (SIZE, SIZE))


def read_code(file: Path) -> np.ndarray:
    """Read a JPEG to its end and compute as little as possible: one grey value for each block of 8 x 8 pixels."""
    return cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION)


def resize_all(files: list[Path], target: Path) -> None:
    """Resize and write on all cores, as 02_resize does."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for _ in parallel.for_each(lambda file: images.write(target / file.name, images.load(file, SIZE)), files):
        pass


def vips_all(files: list[Path], target: Path) -> None:
    """Do the same with one vipsthumbnail for each core."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    command = ["vipsthumbnail", "--size", f"{SIZE}x{SIZE}", "--smartcrop", "centre", "-o", f"{target}/%s.jpg[Q=95]"]
    shares = [files[core :: cpu_count()] for core in range(cpu_count())]
    environment = os.environ | {"VIPS_CONCURRENCY": "1"}
    for process in [subprocess.Popen([*command, *map(str, share)], env=environment) for share in shares if share]:
        process.wait()


def timed(name: str, files: list[Path], work: Callable[[], object], best_of: int = 3) -> float:
    """Print and return the seconds of processor time that `work` takes, the best of several tries."""
    seconds, clock = [], []
    for _ in range(best_of):
        before, start = setting.processor_seconds(), time.perf_counter()
        work()
        seconds.append(setting.processor_seconds() - before)
        clock.append(time.perf_counter() - start)
    each, wall = min(seconds) / len(files) * 1e3, min(clock) / len(files) * 1e3
    print(f"  {name:<40} {each:7.1f} ms of processor time, {wall:7.1f} ms by the clock, per image")
    return min(seconds)


def compare_memory(folder: Path, few: int, many: int) -> None:
    """Print the peak memory of the data stages for few and for many small images."""
    peaks = []
    for count in (few, many):
        raw = folder / f"raw{count}"
        make_small(raw, count)
        command = [sys.executable, __file__, "--measure", str(raw)]
        environment = os.environ | {progress.PROGRESS_VARIABLE: os.devnull, "PYTHONPATH": str(project.ROOT)}
        process = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        peaks.append(json.loads(process.stdout.splitlines()[-1]))
        print(f"\n{count:,} small images: peak memory {peaks[-1] / 1024:.0f} MiB")
    print(f"  {peaks[1] / peaks[0]:.2f} times the memory for {many / few:g} times the images (wanted: at most 1.15)")


def make_small(folder: Path, count: int) -> None:
    """Write `count` images of 64 x 64 pixels in two folders."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        image = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "ab"[number % 2] / f"{number:06d}.jpg"), image)


def _send_through(raw: Path) -> None:
    """Explore, split and resize `raw` in this process and print its peak memory in KiB."""
    parameters = {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
    data = sources.read(parameters | {"source": str(raw)})
    table, _ = inventory.take(data)
    table = grouping.group(table)
    table["part"] = splits.assign(table)
    out = raw.with_name(raw.name + "-out")
    (out / "split").mkdir(parents=True)
    links.write_split(out / "split", table, data.root)
    leaks.check_split(out / "split", links.read_split(out / "split"), table, distance=8)
    (out / "resize").mkdir()
    resizing.write_images(out / "resize", out / "split", image_size=32, fit="crop")
    # Not ru_maxrss: a new process inherits that of the one that started it.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1])


if __name__ == "__main__":
    main()
