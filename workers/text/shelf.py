"""A module's weights in host memory, from which its own process brings them back to a GPU, or another process takes
them over.

Above: `eager.py` (to host memory and back), `loader.py` (takes over). Below: torch, the kernel.

They lie one after the other in memory that has a file descriptor and no name (memfd_create(2)): nobody but this user's
processes can open it, through `/proc`, it is not limited as /dev/shm is, and it is gone with the last process that
holds it, however that one ends. Behind them lies the module, pickled without them. So whoever takes it over has the
module as it was served, quantized for example, and reads none of the model's weight files. The pages are pinned, which
is what a GPU copies from at the speed of its bus; where that fails it copies all the same.
"""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import mmap
import os
import pickle
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers import memory

log = logging.getLogger(__name__)

_ALIGNMENT = 256
_FOOTER_BYTES = 8
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name.
_POPULATE_AT_ONCE = 256 * 2**20
_MOST_THREADS = 8


class CannotTakeOver(Exception):
    """What lies there is not, or no more, a module that this process can serve."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies, and how; `index` is its own even if others share the bytes."""

    index: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_parameter: bool

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, memory_map: mmap.mmap) -> torch.Tensor:
        """Return the tensor whose memory this is."""
        if not self.num_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(memory_map, dtype=self.dtype, count=torch.Size(self.shape).numel(), offset=self.offset)
        return flat.as_strided(self.shape, self.stride)


class Shelf:
    """Where one module's tensors wait. Methods are blocking; called by one thread at a time.

    Attributes:
        path: what `take_over` wants; empty when nobody can take this module over. Good for as long as it waits.
    """

    def __init__(self, module: nn.Module, facts: object, *, shared: bool = True) -> None:
        """Bring all parameters and buffers here; the module's own tensors are views of this memory afterwards.

        Args:
            facts: what else whoever takes over should know; anything that can be pickled.
            shared: whether somebody may take it over.

        Raises:
            OSError, MemoryError: the system has not so much memory; the module is where it was.
        """
        tensors = tensors_of(module)
        places, end = _plan(tensors)
        skeleton = _pickled(module, facts, tensors, places) if shared else b""
        self.num_bytes = end + len(skeleton) + _FOOTER_BYTES
        self._fd = os.memfd_create("hostler weights")
        self._map: mmap.mmap | None = None
        self._pinned_at = 0
        try:
            os.ftruncate(self._fd, self.num_bytes)
            self._map = mmap.mmap(self._fd, self.num_bytes)
            address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            _populate(address, self.num_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        memory.shelve(self.num_bytes)
        if any(tensor.is_cuda for tensor in tensors) and _pin(address, self.num_bytes):
            self._pinned_at = address
        self._map[end:] = skeleton + len(skeleton).to_bytes(_FOOTER_BYTES, "little")
        views = [place.view(self._map) for place in places]
        for tensor, view in zip(tensors, views, strict=True):
            view.copy_(tensor, non_blocking=True)
        _settle(tensors)
        for tensor, view in zip(tensors, views, strict=True):
            tensor.data = view
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}" if skeleton else ""

    def clear(self, module: nn.Module, device: torch.device) -> None:
        """Bring the module's tensors to a device, and free the memory. Who has taken over keeps it until it is done."""
        move(module, device)
        self.path = ""
        if self._pinned_at:
            # To let go of pinned pages takes a tenth of a second for each gigabyte: nobody waits for it.
            threading.Thread(target=self._free, name="unpin", daemon=True).start()
        else:
            self._free()

    def _free(self) -> None:
        if self._pinned_at:
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)  # type: ignore[no-untyped-call]
        os.close(self._fd)
        self._map = None  # Unmapped with the last view of it.
        memory.shelve(-self.num_bytes)


def take_over(path: str) -> tuple[Any, Any]:
    """Return the module that lies on another process's shelf, and the facts beside it. Blocking: milliseconds.

    Its tensors are views of that memory, which stays for as long as they do: bring them to a device with `move`.

    Raises:
        CannotTakeOver: nothing is there, it is another user's, or its classes are not here.
    """
    try:
        with Path(path).open("rb") as file:
            if (owner := os.fstat(file.fileno()).st_uid) != os.geteuid():
                raise CannotTakeOver(f"it belongs to user {owner}")
            memory_map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        end = len(memory_map) - _FOOTER_BYTES
        begin = end - int.from_bytes(memory_map[end:], "little")
        module, facts = _Unpickler(memory_map, io.BytesIO(memory_map[begin:end])).load()
    except CannotTakeOver:
        raise
    except Exception as error:  # The process has ended, or this one lacks code that a pickled class needs.
        raise CannotTakeOver(f"{type(error).__name__}: {error}"[:300]) from error
    return module, facts


def move(module: nn.Module, device: torch.device) -> None:
    """Bring parameters and buffers to a device. Those that shared memory still do."""
    tensors = tensors_of(module)
    moved: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for tensor in tensors:
        key = tensor.data_ptr(), tensor.shape
        if key not in moved:
            moved[key] = tensor.to(device, non_blocking=True, copy=True)
    _settle(moved.values())
    for tensor in tensors:
        tensor.data = moved[tensor.data_ptr(), tensor.shape]


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Return a module's parameters and buffers, each once, however many layers share it."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())


def _plan(tensors: Iterable[torch.Tensor]) -> tuple[list[_Place], int]:
    """Return where each tensor is to lie, and where all of them end. Those that share bytes lie in one place."""
    taken: dict[tuple[int, torch.Size], int] = {}
    places, end = [], 0
    for index, tensor in enumerate(tensors):
        offset = taken.setdefault((tensor.data_ptr(), tensor.shape), end)
        laid_out = torch.empty_like(tensor, device="meta")  # Its strides, but without holes.
        place = _Place(
            index, offset, tensor.dtype, tuple(tensor.shape), laid_out.stride(), isinstance(tensor, nn.Parameter)
        )
        places.append(place)
        if offset == end:
            end += -(-place.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _pickled(module: nn.Module, facts: object, tensors: list[torch.Tensor], places: list[_Place]) -> bytes:
    """Return the module without the tensors; nothing when it cannot be pickled."""
    place_of = {id(tensor): place for tensor, place in zip(tensors, places, strict=True)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, what: object) -> _Place | None:
            return place_of.get(id(what))

    written = io.BytesIO()
    try:
        Pickler(written, pickle.HIGHEST_PROTOCOL).dump((module, facts))
    except Exception as reason:  # Anything that somebody hung on a module: closures, locks, open files.
        log.info("only this process can wake the model", extra={"reason": f"{type(reason).__name__}: {reason}"[:300]})
        return b""
    return written.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, memory_map: mmap.mmap, pickled: io.BytesIO) -> None:
        super().__init__(pickled)
        self._map = memory_map
        self._seen: dict[int, torch.Tensor] = {}

    def persistent_load(self, place: _Place) -> torch.Tensor:
        if place.index not in self._seen:
            view = place.view(self._map)
            self._seen[place.index] = nn.Parameter(view, requires_grad=False) if place.is_parameter else view
        return self._seen[place.index]


def _settle(tensors: Iterable[torch.Tensor]) -> None:
    """Return once all copies to and from these tensors have arrived."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _populate(address: int, num_bytes: int) -> None:
    """Have the kernel provide all pages now, in several threads: it clears each one in the thread that asks for it."""
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def provide(offset: int) -> None:
        size = min(_POPULATE_AT_ONCE, num_bytes - offset)
        if advise(address + offset, size, _POPULATE_WRITE) and (code := ctypes.get_errno()) != errno.EINVAL:
            raise OSError(code, os.strerror(code))  # EINVAL: an older kernel; it provides them as they are written.

    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(provide, range(0, num_bytes, _POPULATE_AT_ONCE)))


def _pin(address: int, num_bytes: int) -> bool:
    """Have the driver keep the pages where they are; return whether it does."""
    failed = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]
    if failed:
        log.warning("host memory could not be pinned: waking will be slower", extra={"cuda_error": failed})
    return not failed
