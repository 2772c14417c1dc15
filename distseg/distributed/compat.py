"""What distseg uses of torch and DeepSpeed that they do not promise to keep, in one place.

Each entry names the versions that it was seen in, and what happens where it is absent. Whoever
raises an upper bound in pyproject.toml looks through this file first. DeepSpeed is optional and
slow to import, so its entries take an engine and import nothing at the top.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

# The class of all batch normalisations, nn.SyncBatchNorm too. Seen in torch 2.13.0.
BATCH_NORM = nn.modules.batchnorm._BatchNorm
# The autograd function inside nn.SyncBatchNorm, on GPUs only. Seen in torch 2.13.0.
SYNC_BATCH_NORM_FUNCTION = SyncBatchNorm


def job_store() -> Any:
    """The job's key-value store, over a connection of its own where torch can open one.

    On a shared connection a call that waits holds up every other one. `_get_default_store` and
    `clone` were seen in torch 2.13.0; older releases have no `clone`, and share the connection.
    """
    store = dist.distributed_c10d._get_default_store()
    clone = getattr(store, "clone", None)
    return clone() if clone is not None else store


def set_collective_timeout(seconds: float) -> None:
    """Give the collectives of all process groups that there are so much time, from now on.

    `_set_pg_timeout` and `_world.pg_map` were seen in torch 2.13.0. Where they are absent, groups
    keep what they began with.
    """
    c10d = dist.distributed_c10d
    if hasattr(c10d, "_set_pg_timeout"):
        # this rank's: of the others it holds no more than their names
        for group in getattr(getattr(c10d, "_world", None), "pg_map", [None]):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def destroy_process_groups() -> None:
    """Destroy all of this process's process groups, for DeepSpeed too, where it is in use.

    It keeps a copy of the world's group, which a later job of this process would be given. Its
    `destroy_process_group` forgets that; seen in DeepSpeed 0.19.8.
    """
    # looked up, as nothing but its own learners imports it
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def flight_record() -> list[dict[str, Any]]:
    """The collectives that this process has entered, the oldest first: torch's Flight Recorder.

    `_dump_fr_trace` was seen in torch 2.13.0, for gloo (NCCL's, by the same name, was not tried).
    [] where it is absent, or switched off (TORCH_FR_BUFFER_SIZE=0).
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)
    # a pickle that this very process makes
    return [] if dump is None else pickle.loads(dump()).get("entries", [])


def silence_profiler() -> None:
    """Keep torch's profiler from writing into the log that it begins and ends; before its first
    use in a process.

    KINETO_LOG_LEVEL, seen in torch 2.13.0, where these lines (USDT) are of level 5 and all below is
    kept back in any case. Where it is absent, they come. A level that the user has set stays.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def record_memory_history() -> None:
    """Have torch remember where a GPU's memory is asked for, some microseconds each time.

    `_record_memory_history` was seen in torch 2.13.0. Where it is absent, snapshots name no lines.
    """
    record = getattr(torch.cuda.memory, "_record_memory_history", None)
    if record is not None:
        record(max_entries=200_000, stacks="python")


def memory_snapshot() -> Callable[[str], None] | None:
    """What writes, to a path, all that this process holds of the GPU's memory; None: there is none.

    `_dump_snapshot` was seen in torch 2.13.0. Where it is absent, nothing is written.
    """
    is_there = torch.cuda.is_initialized()
    return getattr(torch.cuda.memory, "_dump_snapshot", None) if is_there else None


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Within a backward: have it call something when all gradients have been computed, before what
    was asked for later (DDP's and FSDP2's waits for their exchanges).

    `_execution_engine.queue_callback` was seen in torch 2.13.0. Where it is absent, nothing is
    called.
    """
    engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
    if hasattr(engine, "queue_callback"):
        engine.queue_callback(callback)


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN has bf16 dot products on this CPU, and may use them (ONEDNN_MAX_CPU_ISA).

    Emulated ones are slower than fp32. All probes were seen in torch 2.13.0; of the first two one
    that is absent counts as no.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    # the user's limit on instructions; a torch without this probe knows of none
    allowed = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)()
    return allowed and any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def ddp_without_buffer_broadcast() -> dict[str, Any]:
    """The argument that keeps DistributedDataParallel from sending rank 0's buffers to all ranks.

    `forward_sync_buffers` in torch 2.13.0, which warns of the name before it: `broadcast_buffers`.
    """
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    renamed = "forward_sync_buffers"
    return {renamed if renamed in parameters else "broadcast_buffers": False}


def measure_no_backwards(ddp: DistributedDataParallel) -> None:
    """Keep DistributedDataParallel from measuring backwards for its own log after the first ten.

    On a GPU it would have the host wait for one in every hundred. The method was seen in torch
    2.13.0; where it is absent, the host waits that often.
    """
    if hasattr(ddp, "_set_ddp_runtime_logging_sample_rate"):
        ddp._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # a C++ int


def forget_fsdp_forwards(network: nn.Module) -> None:
    """Have FSDP2 forget forwards that no backward follows, which it lists until there is one.

    `_get_fsdp_state`, its `_comm_ctx.post_forward_order` and a group's `_post_forward_indices` were
    seen in torch 2.13.0. Where they are absent, the list grows by some bytes a layer and forward.
    """
    state = getattr(network, "_get_fsdp_state", lambda: None)()
    order = getattr(getattr(state, "_comm_ctx", None), "post_forward_order", [])
    for group in order:
        getattr(group, "_post_forward_indices", []).clear()
    order.clear()


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """Within it this process is rank 0 of a job whose other ranks are not there; what they would
    send is what this one has.

    torch's "fake" process group, made for its own tests; it is in every release. Seen in 2.13.0.
    """
    # which registers the backend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def reduce_by_hook(ddp: DistributedDataParallel) -> None:
    """Have DDP's reducer exchange its buckets by Python.

    Its own exchange asks the fake group for what that does not have: an internal error of torch
    2.13.0.
    """

    # without types: torch compares them with its own, and here they are texts
    def hook(_, bucket):
        dist.all_reduce(bucket.buffer())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, hook)


def ranks_of(arguments: tuple) -> tuple[int, ...]:
    """Those that a function of c10d is between, by its arguments.

    `ProcessGroup.unbox` was seen in torch 2.13.0; where it is absent, they are the job's.
    """
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and hasattr(dist.ProcessGroup, "unbox"):
            with suppress(RuntimeError):  # of another class, such as a ReduceOp
                group = dist.ProcessGroup.unbox(argument)
                return tuple(dist.get_process_group_ranks(group))
    return tuple(range(dist.get_world_size()))


@contextmanager
def meta_chooses_all() -> Iterator[None]:
    """Within it, meta tensors that are chosen by values are as large as if all were chosen.

    A setting of torch's own compiler, seen in torch 2.13.0.
    """
    from torch.fx.experimental import _config

    with _config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        yield


def without_shared_memory_kernel(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling an all-reduce for inference on CPUs, which nobody calls here.

    It would need a C++ compiler and ninja at every start. Seen in DeepSpeed 0.19.8.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def remove_forward_hooks(engine: Any) -> None:
    """Take an engine's own hooks off its network. Seen in DeepSpeed 0.19.8."""
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()


def begin_zero_micro_batch(engine: Any) -> None:
    """Tell a ZeRO engine (stages 1 to 3) that another forward begins. Seen in DeepSpeed 0.19.8."""
    engine.optimizer.clear_backward_seen_flag()


def begin_zero_backward(engine: Any) -> None:
    """Prepare a ZeRO engine (stages 1 to 3) for the backward of a forward that was not its own.

    What DeepSpeedEngine.forward does before it returns. Seen in DeepSpeed 0.19.8.
    """
    engine.optimizer.backward_prologue()
    engine.optimizer.enter_backward()


def keep_gathered(engine: Any) -> None:
    """Have ZeRO stage 3 keep the parameters that are below its threshold from their first forward
    on.

    It promises to, but until it has seen a whole step it releases them after every layer's backward
    too. Seen in DeepSpeed 0.19.8.
    """
    for parameter in engine.optimizer.persistent_parameters:
        parameter.is_external_param = True


def link_zero_optimizer_state(engine: Any) -> None:
    """Show a ZeRO engine (stages 1 and 2) the optimizer state that is there before its first step.

    It would look for it after that step, too late for a checkpoint before it. Seen in DeepSpeed
    0.19.8.
    """
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def flat_zero_parameters(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors of ZeRO stage 3's own optimizer. Seen in DeepSpeed 0.19.8."""
    return engine.optimizer.fp32_partitioned_groups_flat
