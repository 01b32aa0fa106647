"""A function that classifies images over HTTP: `classify` for functions-framework, Cloud Functions and Cloud Run.

POST /predict   an image as the body, multipart/form-data with one or several files, or JSON
                {"images": ["<base64>", ...]}
GET  /          a page to drop a photo on
GET  /health    the model and its version
GET  /metrics   in the text format of Prometheus

The function stores nothing of a request, and no answer holds information about the host.
"""

import base64
import binascii
import io
import json
import logging
import os
import queue
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from werkzeug.exceptions import HTTPException

from helpers.data import images
from helpers.export.carried import predict

MAX_BYTES = int(os.environ.get("MAX_BYTES", 20_000_000))  # of a whole request
MAX_FILES = int(os.environ.get("MAX_FILES", 16))  # of one request
MAX_PIXELS = int(os.environ.get("MAX_PIXELS", 64_000_000))  # of one image
MODELS = int(os.environ.get("MODELS", os.cpu_count() or 1))  # predictions at the same time
WAIT_SECONDS = float(os.environ.get("WAIT_SECONDS", 60))  # for one of the models to be free
ORIGIN = os.environ.get("ALLOW_ORIGIN", "")  # a site whose pages may call this function (CORS); none if empty

FOLDER = Path(__file__).resolve().parent
# HTTP status by the reason of images.ImageError; every other reason is 422.
STATUS = {"not an image": 415, "format": 415, "too many pixels": 413, "empty": 400}
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src blob:"
)

REQUESTS = prometheus.Counter("requests", "Answered requests", ["path", "status"])
ANSWERS = prometheus.Counter("answers", "Classified images", ["predicted"])
SECONDS = prometheus.Histogram("predict_seconds", "Seconds of one image: waiting, reading and the network")

_models: queue.LifoQueue = queue.LifoQueue()  # an interpreter serves one thread at a time
for _ in range(MODELS):
    _models.put(predict.Model(FOLDER))
_first = _models.queue[0]


class Refused(Exception):
    """A request, or one image of it, that is not answered: the status and the content of the error."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.content = status, {"error": reason, "detail": detail}


def classify(request) -> tuple[str, int, dict[str, str]]:
    """Answer a flask.Request."""
    request.max_content_length, request.max_form_parts = MAX_BYTES + 1, MAX_FILES + 8
    paths = {"/": _page, "/health": _health, "/metrics": _metrics, "/predict": _predict}
    path = request.path.rstrip("/") or "/"
    try:
        if path not in paths:
            raise Refused(404, "not found", f"There are {', '.join(paths)}.")
        allowed = ("POST", "OPTIONS") if path == "/predict" else ("GET", "HEAD")
        if request.method not in allowed:
            raise Refused(405, "method", f"{path} takes {allowed[0]}.")
        body, status, headers = paths[path](request)
    except Refused as refused:
        body, status, headers = _json(refused.content, refused.status)
    except HTTPException as error:  # of werkzeug, such as a body that is too large
        body, status, headers = _json({"error": error.name.lower(), "detail": _too_large()}, error.code or 400)
    except Exception:
        logging.exception("An error of the function itself")
        body, status, headers = _json({"error": "internal", "detail": "The function failed; its log says why."}, 500)
    _drain(request)
    REQUESTS.labels(path if path in paths else "other", status).inc()
    cross = {"Access-Control-Allow-Origin": ORIGIN, "Access-Control-Allow-Headers": "Content-Type", "Vary": "Origin"}
    return body, status, HEADERS | headers | (cross if ORIGIN else {})


def _predict(request) -> tuple[str, int, dict[str, str]]:
    if request.method == "OPTIONS":
        return "", 204, {}
    results, worst = [], 200
    for name, data in _files(request):
        begin = time.perf_counter()
        try:
            answer = _answer(data)
            ANSWERS.labels(answer["predicted"]).inc()
        except Refused as refused:
            answer, worst = refused.content | {"status": refused.status}, max(worst, refused.status)
        SECONDS.observe(time.perf_counter() - begin)
        results.append({"name": name} | answer if name else answer)
    if len(results) == 1 and worst != 200:
        return _json({key: value for key, value in results[0].items() if key != "status"}, worst)
    every = all("error" in result for result in results)
    return _json({"model": _first.name, "version": _first.version, "results": results}, worst if every else 200)


def _answer(data: bytes) -> dict[str, Any]:
    if not data:
        raise Refused(400, "empty", "The image has 0 bytes.")
    with _model() as model:
        try:
            return model.answer(model.pixels(data, MAX_PIXELS))
        except images.ImageError as error:
            raise Refused(STATUS.get(error.reason, 422), error.reason, error.detail) from None


@contextmanager
def _model():
    """Lend one of the models; images are read while it is held, which limits the memory of parallel requests."""
    try:
        model = _models.get(timeout=WAIT_SECONDS)
    except queue.Empty:
        raise Refused(503, "busy", "Too many requests wait. Try again.") from None
    try:
        yield model
    finally:
        _models.put(model)


def _files(request) -> list[tuple[str, bytes]]:
    """Return (name, content) of each image of a request.

    Raises:
        Refused: there is none, there are too many, they are too large, or the body does not fit its type.
    """
    if (request.content_length or 0) > MAX_BYTES:
        raise Refused(413, "too large", _too_large())
    kind = (request.mimetype or "").lower()
    if kind == "multipart/form-data":
        named_images = [(_plain(file.filename), file.read()) for _, file in request.files.items(multi=True)]
        if not named_images:
            raise Refused(400, "no image", "The form holds no file.")
    elif kind == "application/json":
        named_images = [("", data) for data in _base64(_body(request))]
    elif kind.startswith("image/") or kind == "application/octet-stream":
        named_images = [("", _body(request))]
    else:
        types = "image/..., application/octet-stream, multipart/form-data or application/json"
        raise Refused(415, "content type", f"Send {types}.")
    if len(named_images) > MAX_FILES:
        raise Refused(413, "too many images", f"{len(named_images)} images came; a request takes at most {MAX_FILES}.")
    return named_images


def _body(request) -> bytes:
    data = request.get_data()
    if len(data) > MAX_BYTES:  # a body in chunks has no length, and is cut off at the limit
        raise Refused(413, "too large", _too_large())
    return data


def _drain(request) -> None:
    """Read the rest of a body, up to the limit: the framework would read it later, and fail beyond the limit."""
    try:
        request.get_data()
    except HTTPException:
        request.stream = io.BytesIO()


def _base64(body: bytes) -> list[bytes]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "json", "The body is not valid JSON.") from None
    texts = content.get("images", [content.get("image")]) if isinstance(content, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "json", 'Send {"images": ["<base64>", ...]} or {"image": "<base64>"}.')
    if len(texts) > MAX_FILES:
        raise Refused(413, "too many images", f"{len(texts)} images came; a request takes at most {MAX_FILES}.")
    try:
        return [base64.b64decode(text.partition("base64,")[2] or text, validate=True) for text in texts]
    except (binascii.Error, ValueError):
        raise Refused(400, "base64", "An image is not valid base64.") from None


def _page(request) -> tuple[str, int, dict[str, str]]:
    page = (FOLDER / "public" / "index.html").read_text(encoding="utf-8")
    return page, 200, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": PAGE_POLICY}


def _health(request) -> tuple[str, int, dict[str, str]]:
    return _json({"status": "ok", "model": _first.name, "version": _first.version, "classes": _first.classes}, 200)


def _metrics(request) -> tuple[str, int, dict[str, str]]:
    return prometheus.generate_latest().decode(), 200, {"Content-Type": prometheus.CONTENT_TYPE_LATEST}


def _json(content: dict[str, Any], status: int) -> tuple[str, int, dict[str, str]]:
    return json.dumps(content), status, {"Content-Type": "application/json"}


def _too_large() -> str:
    return f"A request takes at most {MAX_BYTES:,} bytes and {MAX_FILES} files."


def _plain(name: str | None) -> str:
    """Return the last part of the client's file name, without control characters."""
    return "".join(c for c in (name or "").replace("\\", "/").rpartition("/")[2] if c.isprintable())[:200]
