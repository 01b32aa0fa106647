"""Ask a bundle about files, in a process that has nothing else: argument 1 is the bundle, 2 what to do, 3 the answer.

Only the certificate uses it, and it lies in no bundle.
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
    wanted = json.loads(request.read_text(encoding="utf-8"))
    sys.modules.update(dict.fromkeys(wanted["without"]))  # importing one of these is an error from here on
    sys.path.insert(0, str(bundle))
    begin = time.perf_counter()
    import predict

    model = predict.Model(bundle, wanted["kind"], wanted["threads"])
    loading, raw, seconds = time.perf_counter() - begin, [], []
    for file in wanted["files"]:
        pixels = model.pixels(Path(file).read_bytes())
        begin = time.perf_counter()
        raw.append(model.raw(pixels))
        seconds.append(time.perf_counter() - begin)
    np.save(answer, np.stack(raw))
    found = {"load_seconds": loading, "milliseconds": 1000 * float(np.median(seconds))}
    print(json.dumps(found | {"peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Return the most memory of this process. Linux's getrusage would count that of the process which started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1e3
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
