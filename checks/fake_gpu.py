"""A fake accelerator: whole training steps as on a GPU, without one; host waits and kernels are counted.

Tensors have shapes and devices but no numbers (`FakeTensorMode`). Their device is one of Python alone: tensors on
different devices do not mix, as on CUDA. `Watch` sees every operation. What it counts:

- waits: the host reads a number of the device (`.item()`, `.tolist()`), or copies between host and device without
  `non_blocking`. (What has a size that depends on numbers, as `nonzero` or a boolean index, raises here.)
- trailing waits: for an event after which more work was queued, so that the device does not run dry;
- kernels: operations on the device that are no views and more than an allocation. One that torch runs as one operation
  counts one, so these are a little fewer than a profiler shows;
- bytes: what all living tensors of the device hold, and the most that they have held.
"""

import contextlib
import math
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from runs import checkpoint
from training import metrics

ROOT = Path(__file__).parent.parent
NAME = "fakegpu"


class _Device:
    """What `torch.get_device_module` gives for the fake device, as far as the program asks."""

    class Event:
        """Of a device that is done with everything at once."""

        def __init__(self, enable_timing: bool = False):
            pass

        def record(self) -> None:
            self.at, self.queued = time.perf_counter(), WATCHES[-1].queued

        def synchronize(self) -> None:
            watch = WATCHES[-1]
            (watch.waits if self.queued == watch.queued else watch.trailing)[line()] += 1

        def elapsed_time(self, end) -> float:
            return 1000 * (end.at - self.at)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Device)
WATCHES: list["Watch"] = []
"""Those that are on, the innermost last."""
DEVICE = torch.device(NAME, 0)

ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")


class FakeAccelerator(Accelerator):
    """What Fabric has to know of the device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class FakeStrategy(SingleDeviceStrategy):
    """One fake device."""

    def module_to_device(self, module: nn.Module) -> None:
        """As on CUDA, a parameter stays the object that it was: only what is in it changes."""
        for owner in module.modules():
            for tensor in (*owner._parameters.values(), *owner._buffers.values()):
                if tensor is not None and tensor.device != DEVICE:
                    _move(tensor)


def _move(tensor: Tensor) -> None:
    with torch.no_grad():
        moved = tensor.to(DEVICE)
    if isinstance(tensor, nn.Parameter):
        moved = nn.Parameter(moved, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, moved)


class Watch(TorchDispatchMode):
    """Counts waits and kernels of the device, each by the line of the program it comes from."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.queued = fake, 0
        self.bytes, self._storages = 0, weakref.WeakSet()
        self.forget()

    def forget(self) -> None:
        self.waits: Counter[str] = Counter()
        self.trailing: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.most_bytes = self.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(self._faked, (args, kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            leaf.constant = None  # else numbers known beforehand are computed on real tensors
        on_device = any(leaf.device == DEVICE for leaf in leaves)
        if function is torch.ops.aten._local_scalar_dense.default:
            if on_device:
                self.waits[line()] += 1
            return _number(leaves[0].dtype)
        if function in (torch.ops.aten.equal.default, torch.ops.aten.allclose.default):
            self.waits[line()] += on_device
            return True
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made_here = any(leaf.device == DEVICE for leaf in results)
        if (on_device or made_here) and _is_blocking_copy(function, args, kwargs, leaves, results):
            self.waits[line()] += 1
        if made_here and not _is_view(function) and function._schema.name not in ALLOCATIONS:
            self.kernels[line()] += 1
            self.queued += 1
        for tensor in results:
            self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device != DEVICE or storage in self._storages:
            return
        self._storages.add(storage)
        self.bytes += storage.nbytes()
        self.most_bytes = max(self.most_bytes, self.bytes)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.bytes -= size

    def _faked(self, leaf):
        return self.fake.from_tensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


def _is_blocking_copy(function, args, kwargs, leaves, results) -> bool:
    name = function._schema.name
    if name not in ("aten::_to_copy", "aten::copy_"):
        return False
    non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
    return not non_blocking and len({leaf.device.type for leaf in (*leaves, *results)}) > 1


def _number(dtype: torch.dtype):
    """No flag is up, every error is small."""
    return False if dtype == torch.bool else 1e-9 if dtype.is_floating_point else 1


def _plausible(tensor: Tensor):
    """Nested lists of a number that may be a sum over some samples."""
    return [_plausible(row) for row in tensor] if tensor.dim() else 4.0


def _is_view(function) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def line() -> str:
    """Of the program, the innermost that led here."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if (
            path.parent.parent == ROOT
            and path.parent.name in ("gradients", "batches", "runs", "launch")
            or (path.parent == ROOT)
        ):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward"  # autograd's own thread


@contextlib.contextmanager
def fake_gpu(precision=None) -> Iterator[tuple[Fabric, Watch]]:
    """Inside, `Fabric` and every tensor named on its device are on the fake accelerator."""
    fabric = Fabric(strategy=FakeStrategy(device=DEVICE, accelerator=FakeAccelerator()), plugins=precision)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    watch = Watch(fake)
    # Modules move by exchanging what is in their tensors, where the fake mode's weak references would be in the way.
    without_weak_references = mock.patch.object(weakref, "getweakrefs", lambda _: [])
    with fake, watch, _numbers_between_host_and_device(), _finite_losses(), without_weak_references, _checkpoints():
        WATCHES.append(watch)
        try:
            yield fabric, watch
        finally:
            WATCHES.pop()


@contextlib.contextmanager
def _finite_losses() -> Iterator[None]:
    """A row's totals say that no sample's loss was bad, where a plausible number would name one."""
    by_rank = metrics.Reading.by_rank

    def finite(self) -> list[list[float]]:
        return [[*sums, clipped, math.inf, samples] for *sums, clipped, _, samples in by_rank(self)]

    with mock.patch.object(metrics.Reading, "by_rank", finite):
        yield


@contextlib.contextmanager
def _checkpoints() -> Iterator[None]:
    """Files hold zeros, without their check sums; what is loaded comes to the CPU, named so (the fake mode takes no
    functions)."""
    load = torch.load

    def by_name(*args, map_location=None, **kwargs):
        return load(*args, map_location="cpu" if callable(map_location) else map_location, **kwargs)

    nothing_to_restore = mock.patch.object(torch, "set_rng_state", lambda state: None)
    with (
        torch.serialization.skip_data(materialize_fake_tensors=True),
        mock.patch.object(torch, "load", by_name),
        mock.patch.object(checkpoint, "problem_of", lambda path: ""),
        nothing_to_restore,
    ):
        yield


@contextlib.contextmanager
def _numbers_between_host_and_device() -> Iterator[None]:
    """`torch.tensor(…, device=…)`, `new_tensor` and `tolist` are one copy each, for which the host waits."""
    tensor = torch.tensor

    def moved(data, *, dtype=None, device=None, **kwargs) -> Tensor:
        made = tensor(data, dtype=dtype, **kwargs)
        return made if device is None else made.to(device)

    def of_same(self, data, *, dtype=None, device=None, **kwargs) -> Tensor:
        return moved(data, dtype=dtype or self.dtype, device=device or self.device)

    with (
        mock.patch.object(torch, "tensor", moved),
        mock.patch.object(Tensor, "new_tensor", of_same),
        mock.patch.object(FakeTensor, "tolist", lambda self: _plausible(self.cpu())),
    ):
        yield
