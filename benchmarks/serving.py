"""The function of a bundle under load, beside the same Keras model behind FastAPI, on this machine.

    python benchmarks/serving.py runs/elpv                # needs: pip install fastapi uvicorn

The run has a function (`thaw export runs/elpv --serve`). Each server starts cold, answers its first request, then 1,000
requests, 50 at a time, of validation images; every answer is compared with what the Keras model predicts for that file.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import psutil
import requests
import setting

from helpers.core import disk, project

FASTAPI = """
import sys
import keras, numpy as np
from fastapi import FastAPI, Request
from helpers.core import disk
from helpers.data import images
app, folder = FastAPI(), "{folder}"
model, names, about = (keras.saving.load_model(folder + "/model.keras"), disk.read_json(folder + "/class_names.json"),
                       disk.read_json(folder + "/model.json"))

def answer(data):
    size, fit = about["image_size"], about["fit"]
    image = images.open_image(data)
    pixels = images.resize(images.decode(image, at_least=images._inner_size(image.size, size, fit)), size, fit)
    return model.predict_on_batch(pixels[None])[0].tolist()

@app.get("/health")
def health():
    return {{}}

@app.post("/predict")
async def predict(request: Request):
    from starlette.concurrency import run_in_threadpool
    chances = await run_in_threadpool(answer, await request.body())
    return {{"results": [{{"probabilities": dict(zip(names, chances))}}]}}
"""


def main() -> None:
    """Print a row for each server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--images", type=int, default=40, help="different ones")
    arguments = parser.parse_args()
    print(setting.machine())
    run = project.run_folder(arguments.run)
    files, expected = proof(run, arguments.images)
    binaries = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as place:
        Path(place, "keras_app.py").write_text(FASTAPI.format(folder=(run / "evaluate").resolve()))
        servers = {
            "function, LiteRT": ([binaries / "functions-framework", "--target", "classify", "--host", "127.0.0.1",
                                  "--port"], run / "export" / "function"),
            "FastAPI, Keras": ([binaries / "uvicorn", "keras_app:app", "--log-level", "error", "--port"], Path(place)),
        }  # fmt: skip
        print("server | cold start, s | first answer, s | p50, ms | p99, ms | requests/s | memory, MB | lost | wrong")
        for name, (command, folder) in servers.items():
            print(name, "|", measure(command, folder, files, expected, arguments), flush=True)


def proof(run: Path, count: int) -> tuple[list[bytes], list[dict[str, float]]]:
    """Return images of validation as files and what the Keras model predicts for each."""
    import keras

    from helpers.compute import inference
    from helpers.export import bundle

    images = bundle.proof_images(run / "resize", run / "explore", "val", limit=count)
    model = keras.saving.load_model(run / "evaluate" / "model.keras")
    about, names = (disk.read_json(run / "evaluate" / f"{name}.json") for name in ("model", "class_names"))
    chances = bundle.expected(inference.fast(model), images.files, about)
    return [path.read_bytes() for path in images.files], [
        dict(zip(names, map(float, row), strict=True)) for row in chances
    ]


def measure(command: list, folder: Path, files: list[bytes], expected: list[dict], args: argparse.Namespace) -> str:
    """Start a server, ask it, end it, and return its row."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "THREADS": str(args.at_once),
        "PYTHONPATH": str(project.ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    begin = time.perf_counter()
    server = subprocess.Popen([*map(str, command), str(port)], cwd=folder, env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        cold = started(address, begin)
        first = ask(address, files[0])[1]
        order = [number % len(files) for number in range(args.requests)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(args.at_once) as pool:
            answers = list(pool.map(lambda number: ask(address, files[number]), order))
        seconds = time.perf_counter() - begin
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        memory = sum(process.memory_info().rss for process in processes) / 1e6
    finally:
        server.terminate()
        server.wait()
    lost = sum(answer is None for answer, _ in answers)
    wrong = sum(
        answer is not None and any(abs(answer[name] - chance) > 1e-4 for name, chance in expected[number].items())
        for number, (answer, _) in zip(order, answers, strict=True)
    )
    p50, p99 = np.percentile([1000 * seconds_each for _, seconds_each in answers], [50, 99])
    rate = args.requests / seconds
    return f"{cold:.1f} | {first:.2f} | {p50:,.0f} | {p99:,.0f} | {rate:.1f} | {memory:,.0f} | {lost} | {wrong}"


def started(address: str, begin: float) -> float:
    """Wait for a server and return the seconds since its start."""
    while time.perf_counter() - begin < 120:
        try:
            if requests.get(f"{address}/health", timeout=60).ok:
                return time.perf_counter() - begin
        except requests.ConnectionError:
            time.sleep(0.05)
    raise RuntimeError(f"{address} did not start in 2 minutes; are its packages installed?")


def ask(address: str, data: bytes) -> tuple[dict[str, float] | None, float]:
    """Return the probabilities, None where there was no answer, and the seconds."""
    begin = time.perf_counter()
    try:
        headers = {"Content-Type": "image/png"}
        reply = requests.post(f"{address}/predict", data=data, headers=headers, timeout=300)
        answer = reply.json()["results"][0]["probabilities"] if reply.ok else None
    except (requests.RequestException, KeyError, ValueError):
        answer = None
    return answer, time.perf_counter() - begin


if __name__ == "__main__":
    main()
