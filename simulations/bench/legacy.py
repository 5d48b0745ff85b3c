"""What one neighbour's mask costs a device: Flower's legacy SecAgg+ modifier against :mod:`common.secagg.masks`.

Per neighbour the legacy modifier expands the mask with ``np.random.RandomState`` to int64 and adds it to a new array.
Left out on both sides: key agreement, and the reduction that the device does once for all masks. Its modules are not
deprecated as of Flower 1.42 and warn of nothing.
"""

from statistics import median
from time import process_time

import numpy as np
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from common.secagg.masks import KEY_BYTES, add_masks, lane

_LEGACY_MODULUS = 2**32  # the workflow's default


def compare_masks(d: int, bits: int, repeats: int) -> dict[str, float]:
    """Both, as medians of `repeats` measurements, and how many times as much the legacy one takes."""
    ours = median(our_mask_ms(d, 32, bits) for _ in range(repeats))
    legacy = median(legacy_mask_ms(d, 2) for _ in range(repeats))
    return {
        "mask_ms_per_million": round(legacy, 3),
        "ours_mask_ms_per_million": round(ours, 4),
        "ratio": round(legacy / ours, 1),
    }


def legacy_mask_ms(d: int, repeats: int) -> float:
    """Milliseconds of CPU time per mask and million entries; mean of `repeats` masks of `d` entries."""
    total = [np.zeros(d, np.int64)]
    begin = process_time()
    for key in _keys(repeats):
        total = parameters_addition(total, pseudo_rand_gen(key, _LEGACY_MODULUS, [(d,)]))
    return (process_time() - begin) / repeats / d * 1e9


def our_mask_ms(d: int, repeats: int, bits: int) -> float:
    """The same with our masks in the lanes of `bits`."""
    total = np.zeros(d, lane(bits))
    begin = process_time()
    add_masks(total, [(key, 1) for key in _keys(repeats)])
    return (process_time() - begin) / repeats / d * 1e9


def _keys(count: int) -> list[bytes]:
    return [number.to_bytes(KEY_BYTES, "little") for number in range(count)]
