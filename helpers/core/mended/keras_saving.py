"""A correction of Keras 3.15: it makes a new layer, metric or optimiser for each one that it saves or loads.

It does so to learn which attributes they all have. It stores the answer, but looks for it under another name.
"""

import functools


def correct() -> None:
    """Let Keras learn this once for each kind. Call it before weights or models are saved or loaded."""
    from keras.src.saving import saving_lib

    if not hasattr(saving_lib.get_attr_skipset, "cache_info"):
        saving_lib.get_attr_skipset = functools.cache(saving_lib.get_attr_skipset)
