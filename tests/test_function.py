"""The function over real HTTP: every kind of body gets the right answer or a clear 4xx in JSON, never a 500."""

import base64
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image

from helpers.core import disk
from helpers.data import images
from helpers.evaluation import prediction
from helpers.evaluation.trust import distances, novelty
from helpers.export import bundle, function

CLASSES, SIZE = ["dark", "bright"], 32
LIMITS = {"MAX_BYTES": "3000000", "MAX_FILES": "4", "MAX_PIXELS": "60000000", "MODELS": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function whose model tells whether an image is bright, answers "unsure" in between, and knows only grey."""
    place = tmp_path_factory.mktemp("function")
    image = keras.Input((SIZE, SIZE, 3), name="image")
    value = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
    model = keras.Model(image, keras.layers.Dense(2, activation="softmax", name="probabilities")(value))
    model.layers[-1].set_weights([np.array([[-3, 3]] * 3, np.float32), np.array([4.5, -4.5], np.float32)])
    rows = []
    for number in range(6):
        path = place / f"{number}.png"
        cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), number * 50, np.uint8))
        rows.append({"path": path.name, "label": CLASSES[number > 2], "part": "val", "file": path.name})
    pd.DataFrame(rows).to_csv(place / "images.csv", index=False)
    (place / "source").symlink_to(place)
    disk.write_json(place / "model.json", {"image_size": SIZE, "fit": "crop", "backbone": "toy"})
    disk.write_json(place / "class_names.json", CLASSES)
    promise = {"kind": "precision", "wanted": 0.9, "thresholds": [0.9, 0.9]}
    disk.write_json(place / "decision.json", {"promise": promise})
    distances.Novelty(distances.unit(np.ones((6, 3))), 0.3, 0.05).write(place)
    made, model = place / "bundle", novelty.with_features(model)
    about, proof = bundle.begin(made, place), bundle.proof_images(place, place, "val")
    given = bundle.expected(prediction.asking(model, place), proof.files, about)
    few = np.zeros((1, SIZE, SIZE, 3), np.float32)
    bundle.add(made, ["litert"], model, proof, given, name="toy", representative=few, tolerance=0)
    function.write(place / "function", made)
    return place / "function"


def start(folder: Path, **variables: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | LIMITS | variables | {"PYTHONDONTWRITEBYTECODE": "1", "THREADS": "16"}
    command = [str(Path(sys.executable).with_name("functions-framework")), "--target", "classify"]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    log = open(folder.parent / "server.log", "w")  # noqa: SIM115
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            requests.get(f"{address}/health", timeout=5)
            return server, address
        except requests.ConnectionError:
            assert server.poll() is None, (folder.parent / "server.log").read_text()
            time.sleep(0.1)
    raise AssertionError("the function did not start")


@pytest.fixture(scope="module")
def address(folder):
    server, address = start(folder)
    yield address
    server.terminate()
    server.wait(10)


def picture(value: int = 250, size=(60, 40), mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that promises many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def long_text() -> bytes:
    """A PNG with a text that unpacks to 50 MB."""
    plain = picture()
    text = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(50_000_000)))
    return plain[:33] + text + plain[33:]


def deep() -> bytes:
    return cv2.imencode(".png", np.full((40, 60), 65_000, np.uint16))[1].tobytes()


def turned() -> bytes:
    """Bright above, dark below once turned as its EXIF says; the middle square of it is half of each."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, 15:60] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", exif=exif, quality=95)
    return stream.getvalue()


def large() -> bytes:
    """50 megapixels in less than 3 MB."""
    return picture(250, (8160, 6120), "L", "JPEG", quality=50)


RIGHT = {
    "png": lambda: picture(),
    "jpeg": lambda: picture(kind="JPEG"),
    "webp": lambda: picture(kind="WEBP"),
    "gif": lambda: picture(kind="GIF"),
    "bmp": lambda: picture(kind="BMP"),
    "tiff": lambda: picture(kind="TIFF"),
    "grey": lambda: picture(mode="L"),
    "one bit": lambda: picture(mode="1"),
    "palette": lambda: picture(mode="P"),
    "transparent": lambda: picture(mode="RGBA"),
    "cmyk": lambda: picture(mode="CMYK", kind="JPEG"),
    "16 bits": deep,
    "50 megapixels": large,
    "a text that unpacks to 50 MB": long_text,
    "one pixel": lambda: picture(size=(1, 1)),
    "a line": lambda: picture(size=(3000, 1)),
}
WRONG = {
    "empty": (lambda: b"", 400, "empty"),
    "text": (lambda: b"hello", 415, "not an image"),
    "html": (lambda: b"<html><script>alert(1)</script>", 415, "not an image"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image"),
    "pdf": (lambda: b"%PDF-1.7\n", 415, "not an image"),
    "a zip": (lambda: b"PK\x03\x04" + bytes(100), 415, "not an image"),
    "noise": (lambda: np.random.default_rng(0).bytes(5000), 415, "not an image"),
    "cut off jpeg": (lambda: noisy("JPEG")[:900], 422, "truncated"),
    "cut off png": (lambda: noisy("PNG")[:900], 422, "truncated"),
    "jpeg header alone": (lambda: b"\xff\xd8\xff\xe0", 422, "truncated"),
    "broken png": (lambda: bytes(b ^ (i > 60) for i, b in enumerate(noisy("PNG"))), 422, None),
    "bomb": (lambda: bomb(60_000, 60_000), 413, "too many pixels"),
    "bomb within the limit": (lambda: bomb(7000, 7000), 422, "truncated"),
    "no pixels": (lambda: bomb(0, 0), 422, None),
    "too many bytes": (lambda: bytes(3_000_001), 413, "too large"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not an image"),
    "float tiff": (lambda: floats(), 415, "format"),
}


def noisy(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


def floats() -> bytes:
    return cv2.imencode(".tiff", np.linspace(0, 1, 2400, dtype=np.float32).reshape(40, 60))[1].tobytes()


def post(address: str, body: bytes, kind: str = "application/octet-stream", **more) -> requests.Response:
    return requests.post(f"{address}/predict", data=body, headers={"Content-Type": kind}, timeout=60, **more)


@pytest.mark.parametrize("name", RIGHT)
def test_an_image_of_any_kind_is_classified(address, name):
    reply = post(address, RIGHT[name](), "image/png")
    assert reply.status_code == 200, reply.text
    (said,) = reply.json()["results"]
    assert said["predicted"] == "bright" and said["confidence"] > 0.95
    assert list(said["probabilities"]) == CLASSES


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_good_image_gets_a_clear_4xx_in_json(address, name):
    make, status, reason = WRONG[name]
    reply = post(address, make())
    assert reply.status_code == status, reply.text
    said = reply.json()
    assert set(said) == {"error", "detail"} and said["detail"]
    assert reason is None or said["error"] == reason
    for secret in ("Traceback", "/work", "/tmp", "/usr", "site-packages", ".py", "helpers"):
        assert secret not in reply.text


def test_an_image_held_upright_by_exif_is_turned(address, folder, tmp_path):
    (tmp_path / "turned.jpg").write_bytes(turned())
    bright = images.load(tmp_path / "turned.jpg", SIZE).mean() / 255
    said = post(address, turned()).json()["results"][0]
    expected = 1 / (1 + np.exp(-(2 * 9 * bright - 9)))
    assert said["probabilities"]["bright"] == pytest.approx(expected, abs=1e-4)


def test_in_between_it_is_unsure(address):
    said = post(address, picture(130)).json()["results"][0]
    assert said["predicted"] == "unsure" and 0.5 < said["confidence"] < 0.9


def test_an_image_like_none_of_the_classes_is_called_novel(address):
    red = cv2.imencode(".png", np.full((40, 60, 3), (0, 0, 250), np.uint8))[1].tobytes()
    assert post(address, red).json()["results"][0]["novel"] is True
    assert post(address, picture(250)).json()["results"][0]["novel"] is False


def test_several_files_of_a_form_are_answered_each(address):
    files = [("image", ("../../a\n.png", picture(250))), ("image", ("b.png", picture(0))), ("other", ("c.txt", b"no"))]
    reply = requests.post(f"{address}/predict", files=files, timeout=60)
    assert reply.status_code == 200
    first, second, third = reply.json()["results"]
    assert (first["predicted"], second["predicted"], third["error"]) == ("bright", "dark", "not an image")
    assert "/" not in first["name"] and third["status"] == 415


def test_base64_is_taken_plain_or_as_a_data_url(address):
    text = base64.b64encode(picture()).decode()
    for given in ({"image": text}, {"images": [text, f"data:image/png;base64,{text}"]}):
        results = requests.post(f"{address}/predict", json=given, timeout=60).json()["results"]
        assert {one["predicted"] for one in results} == {"bright"}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"null", "application/json", 400),
        (b'{"images": []}', "application/json", 400),
        (b'{"images": [1]}', "application/json", 400),
        (b'{"image": "***"}', "application/json", 400),
        ('{"image": "é"}'.encode(), "application/json", 400),
        (json.dumps({"images": ["aGk="] * 5}).encode(), "application/json", 413),
        (b"x=1", "application/x-www-form-urlencoded", 415),
        (b"hello", "text/plain", 415),
        (b"", "", 415),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"nothing", "multipart/form-data", 400),
        (b"\x80" * 50, "multipart/form-data; boundary=y", 400),
    ],
)
def test_a_body_that_is_not_what_its_type_says_is_refused(address, body, kind, status):
    reply = post(address, body, kind)
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error", "detail"}


def test_a_body_in_chunks_is_limited_too(address):
    reply = post(address, (bytes(100_000) for _ in range(60)), "image/png")
    assert reply.status_code == 413 and reply.json()["error"] == "too large"


def test_too_many_files_are_refused(address):
    files = [("image", (f"{number}.png", picture())) for number in range(5)]
    reply = requests.post(f"{address}/predict", files=files, timeout=60)
    assert reply.status_code == 413 and "at most 4" in reply.json()["detail"]


def test_other_paths_and_methods_are_told(address):
    assert requests.get(f"{address}/predict", timeout=5).status_code == 405
    assert requests.delete(f"{address}/", timeout=5).status_code == 405
    assert requests.post(address, data=bytes(4_000_000), timeout=5).status_code == 405
    for path in ("/main.py", "/model.tflite", "/../main.py", "/public/index.html", "/%2e%2e/etc/passwd"):
        reply = requests.get(address + path, timeout=5)
        assert reply.status_code == 404 and reply.json()["error"] == "not found"


def test_health_page_and_metrics(address, folder):
    health = requests.get(f"{address}/health", timeout=5).json()
    assert health["classes"] == CLASSES and len(health["version"]) == 12
    page = requests.get(address, timeout=5)
    assert "Drop a photo here" in page.text and "default-src 'none'" in page.headers["Content-Security-Policy"]
    post(address, picture())
    text = requests.get(f"{address}/metrics", timeout=5).text
    assert 'requests_total{path="/predict",status="200"}' in text and "predict_seconds_bucket" in text


def test_cors_is_off_unless_a_site_is_named(address, folder):
    assert "Access-Control-Allow-Origin" not in post(address, picture()).headers
    server, other = start(folder, ALLOW_ORIGIN="https://example.org")
    try:
        reply = requests.options(f"{other}/predict", timeout=5)
        assert reply.status_code == 204 and reply.headers["Access-Control-Allow-Origin"] == "https://example.org"
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.browser
def test_a_photo_dropped_on_the_page_is_classified(address, tmp_path):
    from playwright import sync_api

    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    (tmp_path / "<b>bright.png").write_bytes(picture(250, (300, 200)))
    (tmp_path / "grey.png").write_bytes(picture(130, (300, 200)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 720, "height": 900})
        problems = []
        page.on(
            "console", lambda message: problems.append(message.text) if "Failed to load" not in message.text else None
        )
        page.goto(address)
        page.set_input_files("#file", sorted(map(str, tmp_path.glob("*.png"))))
        page.locator("article").nth(2).wait_for()
        headings = page.locator("article h2").all_text_contents()
        page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "page.png"))
        browser.close()
    assert sorted(headings) == ["bright", "not an image", "unsure"] and not problems


def test_many_at_once_get_each_their_own_answer(address):
    values = [0, 250] * 40
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda value: post(address, picture(value)).json()["results"][0]["predicted"], values))
    assert answers == ["dark", "bright"] * 40
