"""Tensors with shapes and storages, and without values: a step runs on them in a second, whatever
its size, and everything it allocates can be counted.

They are plain CPU tensors, of whose memory no page is ever touched: what would fill them is not
done. So DDP's reducer, FSDP and DeepSpeed, which look into storages, run as they are; fake tensors
have no storages that C++ could look into.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

from distseg.distributed.compat import meta_chooses_all, ranks_of
from shards.errors import InputError

# tensors of so few elements, made of such alone, keep their values: counters, draws, shares
SMALL = 2**16
# of its own storage by its schema, but a view all the same
_VIEWS = {torch.ops.aten._unsafe_view.default}
# they change a tensor's shape in place, so they are done
_RESHAPING = ("resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_")
_UNFILLED = ("empty", "new_empty")
_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_SIZES: dict[Any, Any] = {}  # results on meta tensors, which hold no memory, by function and sizes
_READ = torch.ops.aten._local_scalar_dense.default


class Block:
    """One storage. kind: what it is for, said by whoever knows; network: in whose forward it was
    made; "" where nobody said.
    """

    __slots__ = ("hollow", "kind", "network", "size")

    def __init__(self, network: str):
        self.size, self.kind, self.network, self.hollow = 0, "", network, False


@dataclass(frozen=True)
class Work:
    """What one kernel does: operations of products, bytes read and written, and in which type."""

    operations: float
    bytes_moved: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Collective:
    """One exchange: its name as c10d has it, the bytes of its larger side, and between whom."""

    name: str
    num_bytes: int
    ranks: tuple[int, ...]


class Ledger:
    """Every storage that comes, grows and goes, in bytes and in order."""

    def __init__(self) -> None:
        self.changes: list[tuple[Block, int]] = []
        self.network = ""  # whose forward is under way
        self._blocks: dict[int, tuple[Block, Any]] = {}

    def block(self, tensor: Tensor) -> Block | None:
        """That of a tensor's storage; None of one that was made elsewhere."""
        found = self._blocks.get(id(tensor.untyped_storage()))
        return None if found is None else found[0]

    def add(self, tensor: Tensor) -> Block:
        """Note a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps the object for as long as the memory
        if key not in self._blocks:
            block = Block(self.network)
            self._blocks[key] = block, weakref.ref(storage, lambda _: self._free(key))
            self._change(block, storage.nbytes())
        return self._blocks[key][0]

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note a storage's new size."""
        if id(storage) in self._blocks:
            block = self._blocks[id(storage)][0]
            self._change(block, storage.nbytes() - block.size)

    def passing(self, size: int) -> None:
        """Note memory that a kernel takes for itself and gives back."""
        # it may be what the peak is made of, however short it is; noted where it is nothing too, so
        # that batches of other sizes leave as many changes
        block = Block(self.network)
        self._change(block, size)
        self._change(block, -size)

    def live(self) -> list[Block]:
        """All that is there now."""
        return [block for block, _ in self._blocks.values()]

    def totals(self) -> np.ndarray:
        """Bytes that are held after each change, (n,) int64."""
        return np.cumsum([change for _, change in self.changes], dtype=np.int64)

    def at_most(self) -> dict[Block, int]:
        """What is there when there is most, and its bytes."""
        # looked for afterwards: to note at every change what is held would be dear
        held: dict[Block, int] = {}
        for block, change in self.changes[: int(self.totals().argmax()) + 1]:
            held[block] = held.get(block, 0) + change
        return {block: size for block, size in held.items() if size}

    def _free(self, key: int) -> None:
        # by its key, as the storage itself has gone when this is called
        block, _ = self._blocks.pop(key)
        self._change(block, -block.size)

    def _change(self, block: Block, change: int) -> None:
        block.size += change
        self.changes.append((block, change))


class Hollow(TorchDispatchMode):
    """Within it, tensors have no values, and what they hold stands in `ledger`.

    What the host reads from one is 0. collectives, work: of the kernels since `forget`, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.collectives: list[Collective] = []
        self.work: list[Work] = []

    def forget(self) -> None:
        """Begin to note collectives and work anew."""
        self.collectives, self.work = [], []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # its own handler takes it apart, and what it then calls comes here
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._note_collective(func, args)
        result = self._done(func, args, kwargs)
        results = [it for it in tree_iter(result) if isinstance(it, Tensor) and not it.is_meta]
        for tensor in results:
            self.ledger.add(tensor)
        if func.namespace == "aten" and results and not _is_view(func):
            self._note_work(func, args, kwargs, result)
        self.ledger.passing(workspace(func, args, result))
        return result

    @contextmanager
    def counting(self) -> Iterator[Hollow]:
        """The mode, with the storages that are resized in place of being made anew."""
        original, ledger = torch.UntypedStorage.resize_, self.ledger

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            # no dispatcher hears of it: so FSDP frees what it has gathered
            result = original(storage, size)
            ledger.resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            # of what is chosen by values, all: no more can be
            with meta_chooses_all(), self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _done(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a function gives, computed only where it is cheap or where shapes depend on it."""
        tensors = [it for it in tree_iter((args, kwargs)) if isinstance(it, Tensor)]
        is_hollow = any(block.hollow for block in self._blocks(tensors))
        name = func._schema.name.partition("::")[2]
        if func is _READ:
            return torch.zeros((), dtype=tensors[0].dtype).item() if is_hollow else func(*args)
        to_meta = str(kwargs.get("device")) == "meta"  # structures, which hold nothing
        if to_meta or any(it.is_meta for it in tensors):
            return func(*args, **kwargs)
        if func.namespace == "c10d" and is_hollow:
            return self._exchanged(func, args, kwargs)
        if func.namespace == "fsdp" and is_hollow and not func._schema.returns:
            return None  # its copies out of what was gathered
        if func.namespace not in ("aten", "prims") or _is_view(func) or name in _RESHAPING:
            return func(*args, **kwargs)
        returns, written = func._schema.returns, _written(func, args, kwargs)
        # in place: nothing new, and not every such function could say sizes without values
        in_place = all(it.alias_info is not None for it in returns) and "out" not in kwargs
        metas = _metas((args, kwargs))
        sized = () if in_place else self._sized(func, metas, tensors)
        every = [*tensors, *(it for it in tree_iter(sized) if isinstance(it, Tensor))]
        is_small = sum(it.numel() for it in every) <= SMALL
        # numbers that are not floating point are written there by the host
        is_unfilled = name.startswith(_UNFILLED) and every[-1].is_floating_point()
        if is_small and not is_hollow and not is_unfilled:
            return func(*args, **kwargs)
        for tensor in written:
            self.ledger.add(tensor).hollow = True
        if any(it.alias_info is None for it in returns):
            return tree_map_only(Tensor, self._made, sized)
        for tensor, meta in zip(written, _written(func, *metas), strict=True):
            if tensor.shape != meta.shape:  # an `out` that it makes room in
                tensor.resize_(meta.shape)
                self.ledger.resized(tensor.untyped_storage())
        # it returns what it has written, or nothing
        return written[0] if len(returns) == 1 else tuple(written) if returns else None

    def _exchanged(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A collective of tensors without values, made of empty ones: what the fake group copies
        would touch every page.
        """
        # which of them it writes its schema does not say
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.ledger.add(tensor).hollow = True
        empty = tree_map_only(Tensor, lambda it: it.new_empty(0), (args, kwargs))
        return func(*empty[0], **empty[1])

    def _blocks(self, tensors: Iterable[Tensor]) -> list[Block]:
        found = [self.ledger.block(it) for it in tensors]
        return [block for block in found if block is not None]

    def _sized(self, func: Any, metas: tuple, tensors: list[Tensor]) -> Any:
        """What a function gives on meta tensors; the same calls come again in every step."""
        if metas[1].get("out") is not None:  # which it writes into
            return func(*metas[0], **metas[1])
        leaves, tree = tree_flatten(metas)
        key = func, str(tree), *map(_described, leaves)
        if key not in _SIZES:
            sized = func(*metas[0], **metas[1])
            if func is _CONVOLUTION and any(map(_is_channels_last, tensors[:2])):
                # devices choose so where either factor is; the meta device asks for both
                sized = sized.contiguous(memory_format=torch.channels_last)
            _SIZES[key] = sized
        return _SIZES[key]

    def _note_collective(self, func: Any, args: tuple) -> None:
        # the larger side: of a gather what comes out, of a scatter what goes in
        sides = [[it for it in tree_iter(arg) if isinstance(it, Tensor)] for arg in args[:2]]
        size = max(sum(it.nbytes for it in side) for side in sides)
        if size:
            name = func._schema.name.partition("::")[2]
            self.collectives.append(Collective(name, size, ranks_of(args)))

    def _note_work(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        # what it reads and what it writes
        tensors = [it for it in tree_iter((args, kwargs, result)) if isinstance(it, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        if func is _CONVOLUTION_BACKWARD:
            # torch's own takes a grouped convolution's gradient for a whole one's: the gradient of
            # either factor costs what the product does
            out, x, weight = (tensor.shape for tensor in args[:3])
            operations = sum(args[10][:2]) * conv_flop_count(x, weight, out, args[7])
        else:
            operations = 0.0 if count is None else count(*args, **kwargs, out_val=result)
        moved = sum(it.nbytes for it in tensors)
        self.work.append(Work(float(operations), moved, tensors[0].dtype))

    def _made(self, meta: Tensor) -> Tensor:
        try:
            # of the same strides: channels last goes on through a network
            tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
        except RuntimeError:
            # address space alone, but of one that is larger than the memory systems give none
            got = f"a batch that makes a tensor of {meta.nbytes / 1e9:.1f} GB, more than this "
            needed = "a smaller one: which batch fits a GPU is told for any"
            raise InputError(f"{got}machine gives", needed, "write a smaller batch_size") from None
        self.ledger.add(tensor).hollow = True
        return tensor


def _described(leaf: Any) -> Any:
    """A function's argument, as far as the size of its result depends on it."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    # 1, 1.0 and True are equal, and make results of different types
    return type(leaf), str(leaf)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def workspace(func: Any, args: tuple, result: Any) -> int:
    """Bytes that a convolution takes beside its tensors: factors and results in the kernel's own
    order, as oneDNN's were seen to (torch 2.13.0, benchmarks/memory.py). What cuDNN takes depends
    on the algorithm that it chooses.
    """
    if func is not _CONVOLUTION and func is not _CONVOLUTION_BACKWARD:
        return 0
    is_backward = func is _CONVOLUTION_BACKWARD
    # by the order of the arguments in either function
    out = args[0] if is_backward else result
    x, weight = args[1:3] if is_backward else args[:2]
    in_place = weight.dtype == torch.float32 and weight.shape[2:].numel() == 1
    is_depthwise = weight.shape[1] == 1 and weight.shape[0] == x.shape[1]
    if _is_channels_last(x) or _is_channels_last(weight):
        if in_place or is_depthwise:
            return 0
        # one more where the weights are in the plain order, as FSDP needs them
        is_plain = not _is_channels_last(weight)
        return weight.nbytes * (1 + is_backward + is_plain)
    # a plain convolution is reordered on its way in and out
    if in_place:
        return 0
    if is_backward:
        return out.nbytes + max(x.nbytes, weight.nbytes)
    return weight.nbytes + max(x.nbytes, out.nbytes)


def _is_view(func: Any) -> bool:
    if func in _VIEWS:
        return True
    infos = [it.alias_info for it in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _metas(arguments: Any) -> Any:
    """The arguments of a function, with meta tensors for its tensors."""

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    # strides too: kernels choose the layout of their results by them
    args, kwargs = tree_map_only(Tensor, meta, arguments)
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("meta")}
    return args, {
        name: it for name, it in kwargs.items() if name not in ("generator", "pin_memory")
    }


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a function writes into, in the order of its arguments."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[index] if index < len(args) else None)
            found += [it for it in tree_iter(value) if isinstance(it, Tensor)]
    return found
