"""A correction of jsonschema 4.26: importing it compiles a grammar of web addresses, which takes more than a second.

nbformat, which papermill and nbconvert import, imports jsonschema and never asks it for such an address.
"""

import importlib
import sys

GRAMMAR = "rfc3987_syntax"  # jsonschema checks no web addresses where this package is missing


def correct() -> None:
    """Import jsonschema without the grammar. Call it before nbformat, papermill or nbconvert is imported."""
    if "jsonschema" in sys.modules or GRAMMAR in sys.modules:
        return
    sys.modules[GRAMMAR] = None
    try:
        importlib.import_module("jsonschema")
    finally:
        del sys.modules[GRAMMAR]
