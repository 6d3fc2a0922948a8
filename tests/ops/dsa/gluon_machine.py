"""Run Gluon kernels of Hopper on a CPU, program after program, which Triton's interpreter cannot.

What is started arrives as late as it may: a copy leaves NaN in its place until its group, or the barrier at which it
arrives, is waited for and the fence has passed, and a product reads its operands when it is started and once more when
it is waited for, which must be the same.  Whatever is not waited for has no value.  Partitions of a program are threads
here, which meet at barriers in memory only; one that waits for longer than a program takes has been forgotten.  A
partition is one thread: what its own threads must wait for each other for is not seen; the compiler places those
barriers.
"""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl


class Values(Tensor):
    """A tensor of a kernel."""

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Values:
        return self.view(dtype) if bitcast else super().to(dtype)


def values(x: Any) -> Values:
    return torch.as_tensor(x).as_subclass(Values)


class Pointer:
    """Pointers into the memory of a tensor, in elements from its first one."""

    def __init__(self, memory: Tensor, offset: Tensor) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.offset[key])

    def _reached(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Return which elements are reached and where they lie; outside of the tensor none may be."""
        mask = torch.as_tensor(True if mask is None else mask)
        offset, mask = torch.broadcast_tensors(self.offset, mask)
        assert ((offset >= 0) & (offset < self.memory.numel()))[mask].all(), "reaches outside of a tensor"
        return mask, offset[mask].long()

    def load(self, mask: Any = None, other: Any = 0) -> Values:
        mask, offset = self._reached(mask)
        result = torch.full(mask.shape, other, dtype=self.memory.dtype)
        result[mask] = self.memory[offset]
        return values(result)

    def store(self, x: Tensor, mask: Any = None) -> None:
        mask, offset = self._reached(mask)
        assert offset.unique().numel() == offset.numel(), "writes an element twice"
        self.memory[offset] = torch.broadcast_to(x, mask.shape)[mask].to(self.memory.dtype)

    def add(self, x: Tensor, mask: Any) -> None:
        mask, offset = self._reached(mask)
        self.memory.index_add_(0, offset, torch.broadcast_to(x, mask.shape)[mask].as_subclass(Tensor))


class Shared:
    """Shared memory, or a view of it: as threads see it, and as products do, for which what is new passes a fence."""

    def __init__(self, machine: Machine, threads: Tensor, products: Tensor) -> None:
        self.machine, self.threads, self.products = machine, threads, products
        self.shape, self.dtype = list(threads.shape), threads.dtype

    def _view(self, view: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(self.machine, view(self.threads), view(self.products))

    def index(self, i: Any) -> Shared:
        return self._view(lambda x: x[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return self._view(lambda x: x[start : start + length])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(lambda x: x.permute(order))

    def load(self, layout: Any) -> Values:
        return values(self.threads.clone())

    def store(self, x: Tensor) -> None:
        self.threads.copy_(x)
        self.products.fill_(float("nan"))
        self.machine.under_way.written.append(self)


class Barriers:
    """Barriers in memory, or one of them: complete phases are counted, and of a phase those who have arrived."""

    PATIENCE = 60.0

    def __init__(self, number: int) -> None:
        self.members = [self] if number == 1 else [Barriers(1) for _ in range(number)]
        self.changed, self.count, self.arrived, self.complete = threading.Condition(), 0, 0, 0
        self.copies: list[tuple[Shared, Tensor]] = []

    def index(self, i: Any) -> Barriers:
        return self.members[int(i)]

    def arrive(self, count: int) -> None:
        with self.changed:
            self.arrived += count
            assert self.arrived <= self.count, "more arrive at a barrier than it waits for"
            if self.arrived == self.count:
                self.arrived, self.complete = 0, self.complete + 1
                self.changed.notify_all()

    def arrive_with(self, copies: list[tuple[Shared, Tensor]]) -> None:
        """Let copies arrive, of which nothing is seen until somebody waits."""
        with self.changed:
            self.copies = copies
        self.arrive(self.count)

    def wait(self, phase: Any) -> list[Shared]:
        """Wait while the phase of this parity is going on; return what copies have written since."""
        with self.changed:
            done = self.changed.wait_for(lambda: self.complete % 2 != int(phase), self.PATIENCE)
            assert done, "nobody arrives at a barrier"
            for shared, x in self.copies:
                shared.threads.copy_(x)
            return [shared for shared, _ in self.copies]


class Product:
    """A product on its way."""

    def __init__(self, a: Any, b: Shared, onto: Any, use_acc: bool) -> None:
        self.a, self.b, self.use_acc = a, b, use_acc
        self.onto = onto if isinstance(onto, Product) else onto.clone()
        self.begun, self.result = self._product(), None

    def _product(self) -> Tensor:
        a = self.a.products if isinstance(self.a, Shared) else self.a
        return a.float().as_subclass(Tensor) @ self.b.products.float()

    def finish(self) -> None:
        now = self._product()
        assert torch.equal(now.nan_to_num(7e30), self.begun.nan_to_num(7e30)), "an operand changed under a product"
        onto = self.onto.result if isinstance(self.onto, Product) else self.onto
        self.result = values(now + onto if self.use_acc else now)


class UnderWay(threading.local):
    """What a partition has started."""

    def __init__(self) -> None:
        self.copies: list[tuple[Shared, Tensor]] = []
        self.groups: list[list[tuple[Shared, Tensor]]] = []
        self.written: list[Shared] = []
        self.products: list[Product] = []
        self.partition = 0

    def is_nothing(self) -> bool:
        return not (self.copies or self.groups or self.products)


class Machine:
    """What the kernels call."""

    PAUSE = 5e-4
    """Seconds for which a partition that has arrived at a barrier leaves the others alone."""
    seconds_of_products: tuple[float, ...] = (0.0,)
    """How long products take that are waited for: in the first partition, the second and so on, and the others."""

    def __init__(self) -> None:
        self.program = 0
        self.under_way = UnderWay()

    # Memory and copies

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared | Barriers:
        if layout == "barrier":
            return Barriers(shape[0])
        return Shared(self, *(torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)))

    def async_load(self, shared: Shared, pointer: Pointer, mask: Any = None) -> None:
        shared.threads.fill_(float("nan"))
        shared.products.fill_(float("nan"))
        self.under_way.copies.append((shared, pointer.load(mask)))

    def commit_group(self) -> None:
        self.under_way.groups.append(self.under_way.copies)
        self.under_way.copies = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.under_way.groups) > outstanding:
            for shared, x in self.under_way.groups.pop(0):
                shared.threads.copy_(x)
                self.under_way.written.append(shared)

    def mbarrier_arrive(self, barrier: Barriers, increment_count: bool) -> None:
        assert not increment_count
        barrier.arrive_with(self.under_way.copies)
        self.under_way.copies = []

    def fence_async_shared(self) -> None:
        for shared in self.under_way.written:
            shared.products.copy_(shared.threads)
        self.under_way.written = []

    def barrier(self) -> None:
        pass

    # Partitions

    def warp_specialize(self, partitions: list[tuple[Callable[..., None], tuple]], warps: Any, registers: Any) -> None:
        failed: list[BaseException] = []

        def run(partition: int, function: Callable[..., None], arguments: tuple) -> None:
            self.under_way.partition = partition
            try:
                function(*arguments)
                assert self.under_way.is_nothing(), "something is on its way when a partition ends"
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(i, *partition)) for i, partition in enumerate(partitions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def barriers(self) -> types.SimpleNamespace:
        def init(barrier: Barriers, count: int) -> None:
            barrier.count = count

        def arrive(barrier: Barriers, count: int, pred: Any = True) -> None:
            if pred:
                barrier.arrive(count)
                time.sleep(self.PAUSE)  # who gives something away too early finds it overwritten

        return types.SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            arrive=arrive,
            init=init,
            wait=lambda barrier, phase: self.under_way.written.extend(barrier.wait(phase)),
        )

    # Products

    def warpgroup_mma(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        self.under_way.products.append(Product(a, b, acc, use_acc))
        return self.under_way.products[-1]

    def warpgroup_mma_wait(self, outstanding: int, deps: list[Any]) -> Any:
        if len(self.under_way.products) > outstanding:
            seconds = self.seconds_of_products
            time.sleep(seconds[min(self.under_way.partition, len(seconds) - 1)])  # who writes to an operand has time to
        while len(self.under_way.products) > outstanding:
            self.under_way.products.pop(0).finish()
        results = tuple(x.result if isinstance(x, Product) else x for x in deps)
        assert all(x is not None for x in results), "a product is read before it is waited for"
        return results if len(results) > 1 else results[0]

    # The language

    def language(self) -> types.SimpleNamespace:
        def pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
            return lambda x, y: function(x, torch.as_tensor(y, dtype=x.dtype))

        def where(mask: Any, x: Any, y: Any) -> Values:
            return values(torch.where(torch.as_tensor(mask), x, y))

        def cast(x: Any, dtype: torch.dtype) -> Values:
            return values(torch.tensor(x, dtype=dtype))

        names = {name: getattr(torch, name) for name in ("bfloat16", "float32", "int16", "int32", "int64")}
        layouts = ("Blocked", "Slice", "NVMMADistributed", "NVMMAShared", "DotOperand", "SwizzledShared")
        return types.SimpleNamespace(
            **names,
            **{f"{name}Layout": lambda *args, **kwargs: None for name in layouts},
            allocate_shared_memory=self.allocate_shared_memory,
            abs=torch.abs,
            atomic_add=lambda pointer, x, mask, sem: pointer.add(x, mask),
            arange=lambda first, last, layout=None: values(torch.arange(first, last, dtype=torch.int32)),
            cast=cast,
            convert_layout=lambda x, layout, assert_trivial=False: x,
            exp2=torch.exp2,
            full=lambda shape, x, dtype, layout: values(torch.full(shape, x, dtype=dtype)),
            load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
            log=torch.log,
            max=lambda x, axis: x.amax(axis),
            maximum=pair(torch.maximum),
            program_id=lambda axis: values(torch.tensor(self.program, dtype=torch.int32)),
            static_range=range,
            store=lambda pointer, x, mask=None: pointer.store(x, mask),
            sum=lambda x, axis: x.sum(axis),
            warp_specialize=self.warp_specialize,
            where=where,
            zeros=lambda shape, dtype, layout: values(torch.zeros(shape, dtype=dtype)),
        )

    def translate(self, kernel: Any) -> Callable[..., None]:
        """Return a Gluon function that runs here."""
        here = {
            name: getattr(self, name)
            for name in ("async_load", "barrier", "fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait")
        }
        here["gl"] = self.language()
        here["async_copy"], here["mbarrier"] = self, self.barriers()
        modules: dict[int, dict[str, Any]] = {}
        functions: dict[int, Callable[..., None]] = {}

        def function(kernel: Any) -> Callable[..., None]:
            if id(kernel) not in functions:
                names = module(kernel.fn.__globals__)
                functions[id(kernel)] = types.FunctionType(kernel.fn.__code__, names, argdefs=kernel.fn.__defaults__)
            return functions[id(kernel)]

        def module(names: dict[str, Any]) -> dict[str, Any]:
            if id(names) not in modules:
                modules[id(names)] = translated = dict(names)
                for name, x in names.items():
                    if isinstance(x, gl.constexpr):
                        translated[name] = x.value
                    elif hasattr(x, "is_gluon"):
                        translated[name] = function(x)
                translated.update(here)
            return modules[id(names)]

        return function(kernel)


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run all programs of a kernel; tensors become pointers to their first elements."""
    machine = Machine()
    function = machine.translate(kernel)
    for machine.program in range(programs):
        given = []
        for x in arguments:
            if isinstance(x, Tensor):
                memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                x = Pointer(memory, torch.tensor(x.storage_offset()))
            given.append(x)
        function(*given, **constants)
        assert machine.under_way.is_nothing(), "something is on its way when the program ends"
