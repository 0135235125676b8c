"""What a denoiser costs: latency, FLOPs, parameters and memory, of the whole and of each slot.

Legend: B batch, C latent channels, H × W latent size, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from grafting.errors import UserError
from grafting.operators import Grid, Operator
from grafting.seeding import generator

WARMUP = 2


class SlotPlace(Protocol):
    """What is asked of a slot here: where its module is, dotted, in the model."""

    @property
    def module_path(self) -> str: ...


class Denoiser(Protocol):
    """What is asked of a host here."""

    model: nn.Module

    @property
    def slots(self) -> Mapping[str, SlotPlace]: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def grid(self) -> Grid: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def denoise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor: ...


class Speed(BaseModel):
    """One denoiser at one batch size on one machine.

    `latency_ms` is the median time of one `host.denoise` call on the whole batch, with its 20th and 80th
    percentile. `images_per_second` is derived from it: batch / (steps · branches · latency), where guidance
    other than 1 takes two branches; it leaves out the codec and takes the latency to grow in proportion with
    the batch. `flops` are those of one call on one sample (a multiply-add counts as two). `peak_memory_bytes`
    is the weights plus the peak of what one call allocates.
    """

    model_config = ConfigDict(frozen=True)

    latency_ms: float
    latency_p20_ms: float
    latency_p80_ms: float
    images_per_second: float
    batch_size: int
    steps: int
    guidance: float
    parameters: int
    flops: int
    peak_memory_bytes: int
    device: str
    threads: int
    torch_version: str
    repeats: int


class SlotCost(BaseModel):
    """What a slot's operator costs: parameters, FLOPs per sample, and the median time in a call."""

    model_config = ConfigDict(frozen=True)

    parameters: int
    flops: int
    latency_ms: float


def measure(
    host: Denoiser,
    *,
    batch_size: int = 8,
    repeats: int = 20,
    steps: int = 50,
    guidance: float = 1.0,
    device: torch.device | str | None = None,
) -> Speed:
    """Measure one host; see `Speed` for what the numbers mean.

    With `device` the model is moved there for the measurement, and back. Raises UserError for a batch
    or repeats below 1.
    """
    speeds = compare(
        {"host": host}, batch_size=batch_size, repeats=repeats, steps=steps, guidance=guidance, device=device
    )
    return speeds["host"]


def compare(
    hosts: Mapping[str, Denoiser],
    *,
    batch_size: int = 8,
    repeats: int = 20,
    steps: int = 50,
    guidance: float = 1.0,
    device: torch.device | str | None = None,
) -> dict[str, Speed]:
    """Measure several hosts in turns (A B A B …), so that their ratios hold on a machine with other work.

    Every host is called `repeats` times after two calls of warm-up. Arguments and errors as for `measure`.
    """
    _at_least_one(batch_size=batch_size, repeats=repeats, steps=steps)
    with contextlib.ExitStack() as stack:
        for host in hosts.values():
            stack.enter_context(_on(host, device))
        stack.enter_context(torch.no_grad())
        calls = {name: _call(host, batch_size) for name, host in hosts.items()}
        for call in calls.values():
            for _ in range(WARMUP):
                call()
        times: dict[str, list[float]] = {name: [] for name in hosts}
        for _ in range(repeats):
            for name, call in calls.items():
                times[name].append(_timed(call, hosts[name].device))
        branches = 1 if guidance == 1.0 else 2
        result = {}
        for name, host in hosts.items():
            p20, median, p80 = _quantiles(times[name], 0.2, 0.5, 0.8)
            result[name] = Speed(
                latency_ms=1e3 * median,
                latency_p20_ms=1e3 * p20,
                latency_p80_ms=1e3 * p80,
                images_per_second=batch_size / (steps * branches * median),
                batch_size=batch_size,
                steps=steps,
                guidance=guidance,
                parameters=parameters(host.model),
                flops=flops(host),
                peak_memory_bytes=weight_bytes(host.model) + _peak_bytes(calls[name], host.device),
                device=_device_name(host.device),
                threads=torch.get_num_threads(),
                torch_version=torch.__version__,
                repeats=repeats,
            )
        return result


def per_slot(host: Denoiser, batch_size: int = 8, *, repeats: int = 5) -> dict[str, SlotCost]:
    """Parameters, FLOPs and latency of what stands in each slot, timed inside the denoiser's own calls.

    Slots that the denoiser does not call as a module cost no time and no FLOPs here. Raises UserError for
    a batch or repeats below 1.
    """
    _at_least_one(batch_size=batch_size, repeats=repeats)
    _, slot_flops = _count_flops(host)
    modules = _slot_modules(host)
    starts: dict[nn.Module, float] = {}
    spent: dict[nn.Module, float] = {}

    def enter(module: nn.Module, _: Any) -> None:
        starts[module] = _now(host.device)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        spent[module] = spent.get(module, 0.0) + _now(host.device) - starts[module]

    times: dict[str, list[float]] = {name: [] for name in modules}
    call = _call(host, batch_size)
    with torch.no_grad():
        for _ in range(WARMUP):
            call()
        with _hooked(modules.values(), enter, leave):
            for _ in range(repeats):
                spent.clear()
                call()
                for name, module in modules.items():
                    times[name].append(spent.get(module, 0.0))
    return {
        name: SlotCost(
            parameters=parameters(module),
            flops=slot_flops[name],
            latency_ms=1e3 * _quantiles(times[name], 0.5)[0],
        )
        for name, module in modules.items()
    }


def flops(host: Denoiser) -> int:
    """FLOPs of one denoiser call on one sample; a multiply-add counts as two.

    Outside the slots the matrix products and convolutions that ran are counted; an operator in a slot answers
    for itself by `flops(tokens)`, since its taps, gates and windows are not matrix products.
    """
    return _count_flops(host)[0]


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once, fixed ones (position tables) included."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of tensors that were created inside the block and still live, on any device.

    Counts storages, so views are free. Scratch memory inside a kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        # By the storage's address; its weak reference lives as long as the storage, not its Python wrapper.
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage_key(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and _storage_key(tensor) not in before:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    """Peak of what one call allocates beyond what is allocated already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as tracker:
        call()
    return tracker.peak


def _count_flops(host: Denoiser) -> tuple[int, dict[str, int]]:
    """FLOPs per sample of the whole, and of each slot."""
    modules = _slot_modules(host)
    rows, columns = host.grid
    counter = FlopCounterMode(display=False)
    correction = 0  # what the operators say of themselves, less what was counted inside them
    starts: list[int] = []
    spent: dict[nn.Module, int] = {}

    def total() -> int:
        return counter.get_total_flops() + correction

    def enter(_: nn.Module, __: Any) -> None:
        starts.append(total())

    def leave(module: nn.Module, args: Any, _: Any) -> None:
        nonlocal correction
        start = starts.pop()
        if isinstance(module, Operator):
            tokens = args[0].shape[1] if args and isinstance(args[0], Tensor) else rows * columns
            correction += start + module.flops(tokens) - total()
        spent[module] = spent.get(module, 0) + total() - start

    # Attention as plain matrix products: the fused CPU kernel is unknown to torch's counter.
    with _hooked(modules.values(), enter, leave), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        _call(host, 1)()
    return total(), {name: spent.get(module, 0) for name, module in modules.items()}


def _slot_modules(host: Denoiser) -> dict[str, nn.Module]:
    return {name: host.model.get_submodule(slot.module_path) for name, slot in host.slots.items()}


@contextlib.contextmanager
def _hooked(
    modules: Any, enter: Callable[[nn.Module, Any], None], leave: Callable[[nn.Module, Any, Any], None]
) -> Iterator[None]:
    """Call `enter` before and `leave` after each forward of the modules."""
    handles = []
    for module in dict.fromkeys(modules):
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(host: Denoiser, batch_size: int) -> Callable[[], Tensor]:
    """One denoiser call on a fixed random batch."""
    weights = next(host.model.parameters())
    z = torch.randn(batch_size, *host.latent_shape, generator=generator(0, "speed")).to(weights.device, weights.dtype)
    t = torch.linspace(0, 999, batch_size).long().to(weights.device)
    condition = torch.arange(batch_size, device=weights.device) % host.num_classes
    return lambda: host.denoise(z, t, condition)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(call: Callable[[], Tensor], device: torch.device) -> float:
    start = _now(device)
    call()
    return _now(device) - start


def _quantiles(values: list[float], *at: float) -> list[float]:
    return torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor(at, dtype=torch.float64)).tolist()


@contextlib.contextmanager
def _on(host: Denoiser, device: torch.device | str | None) -> Iterator[None]:
    """The model on `device` for the time of the block."""
    before = host.device
    if device is not None:
        host.model.to(device)
    try:
        yield
    finally:
        if device is not None:
            host.model.to(before)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})"


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"speed: {name} must be at least 1, not {value}")
