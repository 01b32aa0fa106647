"""Classify files with a bundle, in a process without Thaw: argument 1 is the bundle, 2 the request, 3 the answer.

Only the certificate uses it; no bundle carries it.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    """Write the probabilities of every file, the milliseconds of a prediction, and the most memory."""
    bundle, request, answer = map(Path, sys.argv[1:4])
    content = json.loads(request.read_text(encoding="utf-8"))
    sys.modules.update(dict.fromkeys(content["without"]))  # importing one of these is an error from here on
    sys.path.insert(0, str(bundle))
    begin = time.perf_counter()
    import predict

    model = predict.Model(bundle, content["kind"], content["threads"])
    loading, raw, seconds = time.perf_counter() - begin, [], []
    for file in content["files"]:
        pixels = model.pixels(Path(file).read_bytes())
        begin = time.perf_counter()
        raw.append(model.raw(pixels))
        seconds.append(time.perf_counter() - begin)
    np.save(answer, np.stack(raw))
    times = {"load_seconds": loading, "milliseconds": 1000 * float(np.median(seconds))}
    print(json.dumps(times | {"peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Return the most memory of this process. Linux's getrusage would count the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1e3
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
