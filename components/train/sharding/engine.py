"""DeepSpeed as we use it: its configuration, and how it is imported."""

from __future__ import annotations

import logging
import os
from typing import Any

from components.shared import causal
from components.shared.errors import TuneyardError
from components.train.sharding.config import Sharding

_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def settings_of(sharding: Sharding, largest: float) -> dict[str, Any]:
    """DeepSpeed's own configuration; what stands in no pipeline file is its default.

    Args:
        sharding: settings.
        largest: norm that a gradient may have.
    """
    stage = _STAGES[sharding.kind]
    pinned = causal.device().type == "cuda"
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": pinned}
    if sharding.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if stage == 3:
        # Small weights are cut up as well: the memory of a process is then the same share of any model.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        # Updates are counted by the loop, which says which backward pass is the last one of each.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": largest,
        "zero_optimization": zero,
        # The optimizer is the one that trains without pieces. DeepSpeed's own for offloading is compiled when
        # it is first used, and there is no compiler in the image; PyTorch's fused one does the same.
        "zero_force_ds_cpu_optimizer": False,
    }


def library() -> Any:
    """The library, told to use processors where there is no GPU."""
    if causal.device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise TuneyardError(
            "hardware.sharding names a stage of ZeRO, and DeepSpeed is not installed here",
            "set hardware.sharding: fsdp2, or install it: pip install 'tuneyard[gpu]'",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Processes on processors of one machine would talk through memory, by code that is compiled here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
