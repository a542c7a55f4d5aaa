"""What kernels have to know of a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch

EARLY_CAPABILITY = (9, 0)
#: Bytes of shared memory from which there is room for pairs of values beside any number of activations.
ROOMY_SHARED = 160 << 10


@lru_cache
def starts_early(device: torch.device) -> bool:
    """Whether kernels on this device can start while the one before them still runs."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= EARLY_CAPABILITY


@lru_cache
def multiplies_in_background(device: torch.device) -> bool:
    """Whether ``dot`` is ``wgmma`` here, which alone reads registers later; so it is in what is compiled without a GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return ROOMY_SHARED
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])
