"""DeepSpeed's configuration made from ours, what a user may add to it, and an engine started with
it.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from distseg.config.schema import Config, OptimizerConfig
from distseg.distributed.compat import without_shared_memory_kernel
from distseg.distributed.ranks import Ranks
from shards.errors import InputError

# Elements reduced at once, 32 MB. For DeepSpeed's own 5e8 stages 1 and 2 allocate 2 GB at a step,
# and stage 3 keeps it.
BUCKET = 2**23

# What of a user's file may stand on top of ours; the alternating step is proven with nothing else.
ALLOWED = [
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "steps_per_print",
    "dump_state",
    "memory_breakdown",
]
ALLOWED_ZERO = [
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "sub_group_size",
    "round_robin_gradients",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
]
OURS = {  # DeepSpeed's key -> the key of ours that says it
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "segmentor_optimizer.clip_norm and discriminator_optimizer.clip_norm",
    "optimizer": "segmentor_optimizer and discriminator_optimizer",
    "scheduler": "schedule",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "parallel.zero_stage",
}


def check(config: Config) -> None:
    """Raise InputError for what does not go with parallel.strategy=deepspeed.

    Needs no DeepSpeed.
    """
    stage = config.parallel.zero_stage
    what = f"parallel.strategy=deepspeed with {{}}, parallel.zero_stage={stage}"
    if config.precision == "fp64":
        needed = "precision=fp32, bf16 or fp16: DeepSpeed updates parameters in fp32"
        raise InputError(what.format("precision=fp64"), needed, "or write parallel.strategy=ddp")
    if config.compile:
        raise InputError(
            what.format("compile=true"), "compile=false", "or write parallel.strategy=ddp"
        )
    if config.ema_decay > 0 and stage == 3:
        needed = "whole parameters at every step, which stage 3 does not keep"
        action = "write parallel.zero_stage=2, or ema_decay=0"
        raise InputError(what.format(f"ema_decay={config.ema_decay}"), needed, action)
    user_settings(config)


def user_settings(config: Config) -> dict[str, Any]:
    """The user's own file, or {}.

    Raises InputError for one that cannot be read, and for a key that is not allowed.
    """
    name = config.parallel.deepspeed_config
    if not name:
        return {}
    try:
        # read at the start too (`check`): a bad file must not first fail where an engine is made
        settings = json.loads(Path(name).read_text(encoding="utf-8"))
        zero = settings.get("zero_optimization", {}).keys()
    except (OSError, ValueError, AttributeError) as error:
        got = f"parallel.deepspeed_config={name}: {error}"
        raise InputError(
            got, "a JSON file of DeepSpeed's settings", "correct the path or the file"
        ) from None
    refused = [key for key in settings if key not in ALLOWED]
    refused += [f"zero_optimization.{key}" for key in zero if key not in ALLOWED_ZERO]
    if refused:
        needed = f"only {', '.join(ALLOWED)}; of zero_optimization {', '.join(ALLOWED_ZERO)}"
        # most of these have a key of ours, which a user of DeepSpeed need not know
        ours = OURS.get(refused[0])
        action = f"set distseg's own {ours} and remove it there" if ours else "remove it there"
        raise InputError(f"{name}: {refused[0]}", needed, action)
    return settings


def stays_whole(network: nn.Module) -> bool:
    """Whether ZeRO stage 3 is to leave a network's parameters whole: a discriminator's."""
    return not hasattr(network, "output_stride")  # which segmentors have


def generate(
    network: nn.Module, optimizer: OptimizerConfig, config: Config, world_size: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for one network.

    The precision is not in it: the engine sees fp32 parameters and our autocast's forward, as every
    strategy does. Stage 0 clips in our step, which can also skip. Under stage 3 a discriminator's
    parameters stay whole on every rank (its gradients and optimizer state do not): two backward
    passes go through its graph, the proxy's and its own, and DeepSpeed gathers a parameter for as
    many as there were forward passes.
    """
    stage = config.parallel.zero_stage
    # elements; buckets beyond the network would be memory that nothing fills
    size = sum(parameter.numel() for parameter in network.parameters())
    bucket = max(2, min(BUCKET, size) // 2 * 2)  # an even number, or DeepSpeed refuses it
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    micro_batch = config.batch_size // world_size // config.gradient_accumulation_steps
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, micro_batch),
        # micro-batches are added up by `no_sync`, and divided by nobody
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_norm if stage else 0.0,
        # our fused torch optimizers, the same kernels as under the other strategies
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    user = user_settings(config)
    zero |= user.get("zero_optimization", {})
    # a parameter of no more elements than the threshold stays whole: all of a discriminator's
    if stage == 3 and stays_whole(network):
        zero["stage3_param_persistence_threshold"] = size
    return settings | user | {"zero_optimization": zero}


def initialize(
    network: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], ranks: Ranks
) -> Any:
    """An engine around a network that is on its device already; the process group exists.

    Raises InputError for a value that DeepSpeed does not take.
    """
    deepspeed = _quiet_deepspeed(ranks.device)
    from pydantic import ValidationError  # which DeepSpeed requires

    number = ranks.local_rank if ranks.device.index is None else ranks.device.index
    # stage 3 reads it again in every forward
    is_kept = settings["zero_optimization"]["stage"] == 3
    try:
        with _device_number_as_local_rank(number, is_kept):
            engine, *_ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=number),
                model=network,
                optimizer=optimizer,
                config=settings,
                # the group exists; DeepSpeed's own search for one may end at a missing mpi4py
                dist_init_required=False,
            )
    except ValidationError as error:
        got = f"DeepSpeed's settings: {error}"
        raise InputError(
            got, "values of DeepSpeed's types", "correct the file parallel.deepspeed_config"
        ) from None
    return engine


def _quiet_deepspeed(device: torch.device) -> Any:
    """The package, without what it would do and say on its own account."""
    # It would take a GPU that it sees, whatever device=cpu says; read when it is imported first.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # its warnings are of our optimizer, which it has not tested
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # these are of its own calls
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning
    )
    without_shared_memory_kernel(deepspeed)
    return deepspeed


@contextmanager
def _device_number_as_local_rank(number: int, is_kept: bool) -> Iterator[None]:
    """LOCAL_RANK set to the number of this process's GPU, and afterwards back, unless `is_kept`.

    DeepSpeed insists on the variable and takes it for that number, which need not be the local
    rank: a launcher may show each process its own GPU alone.
    """
    launched_with = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(number)
    try:
        yield
    finally:
        if not is_kept:
            del os.environ["LOCAL_RANK"]
            # as it was: under srun there was none, and half of torchrun's variables are refused
            if launched_with is not None:
                os.environ["LOCAL_RANK"] = launched_with
