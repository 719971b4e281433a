"""Plans: the launches of an op, prepared once for each signature and queued from then on with other addresses.

A signature is all that an op's `gpu` function can see: the op, its options, its numbers, the shapes and dtypes of its
arrays. The function is traced once for each: it runs on arrays whose addresses say which array they belong to and
how far from its beginning, so that neither addresses nor values can decide what is launched. Checks run then.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import cupy as cp
import numpy as np
from cupy_backends.cuda.api import driver

from forge.backend import edits, sources
from forge.backend.base import Launchable
from forge.backend.cupy_modules import Modules, block_of, pointer
from forge.backend.cupy_steps import StepLog
from forge.backend.cupy_trace import Trace, place_of, substituted
from forge.backend.gpu import GPU

_MAX_PLANS = 4096
"""Plans that are kept, of a few kilobytes each. One more, and all are made again when they are needed."""
_ALIGNMENT = 512
_FIELDS: dict[type, Callable[[Any], tuple[Any, ...]] | None] = {}
"""What gives the fields of a record, by the classes of values that ops take; None where they are no records."""
_Call = tuple[Callable[..., Any], tuple[Any, ...] | None]
"""What queues a launch, and its arguments; None where they are the table's addresses."""
_Restore = Callable[[list[Any], list[Any]], Any]
"""What makes an op's result of its arrays and of new memory."""
_ndarray, _allocate = cp.ndarray, cp.cuda.alloc


class Plans:
    """The plans of one device."""

    def __init__(self, device: GPU, modules: Modules, stream: int) -> None:
        self._device, self._modules, self._stream = device, modules, stream
        self._tuning: object = None
        self._edits: object = None
        self._plans: dict[Hashable, Plan] = {}
        self.log: StepLog | None = None
        """Takes the launches of a step that is recorded."""
        self.collected: dict[sources.Variant, None] | None = None
        """Takes the variants of what would be launched: nothing is."""

    def launch(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Run an op within the device's context. Raises what its check raises."""
        if self._device.tuning is not self._tuning or edits.replaced() is not self._edits:
            self._tuning, self._edits = self._device.tuning, edits.replaced()
            self._plans.clear()
        key: list[Any] = [op]
        arrays: list[Any] = []
        _read(args, key, arrays)
        key += options.items()
        signature = tuple(key)
        try:
            plan = self._plans.get(signature)
        except TypeError:  # no argument of an op is a list, say
            op.check(args, dict(options))
            raise
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            op.check(args, dict(options))
            plan = self._plans[signature] = self._traced(op, args, options)
        if self.collected is not None:
            self.collected.update(dict.fromkeys(plan.variants))
            return plan.result(arrays)
        return plan.queue(arrays, self.log)

    def _traced(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Plan:
        trace = Trace(self._device)
        given: list[Any] = []

        def stand_in(array: Any) -> Any:
            given.append(trace.like(array))
            return given[-1]

        traced = [substituted(value, stand_in) for value in args]
        assert op.run_gpu is not None
        result = op.run_gpu(trace, *traced, **options)
        return Plan(trace, given, result, self._device, self._modules, self._stream)


def _read(values: Sequence[Any], key: list[Any], arrays: list[Any]) -> None:
    """Add to a key what values are beside the addresses of their arrays, and to arrays their arrays, in order."""
    for value in values:
        kind = type(value)
        if kind is _ndarray:
            key += value.shape, value.dtype.char
            if not value._c_contiguous:
                key.append("strided")
            arrays.append(value)
            continue
        if kind not in _FIELDS:
            _FIELDS[kind] = _fields_of(kind)
        if fields := _FIELDS[kind]:
            key.append(kind)
            _read(fields(value), key, arrays)
        else:
            key.append(value)


def _fields_of(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """What gives the parts of a record or a tuple; None for other classes."""
    if kind is tuple:
        return lambda value: (len(value), *value)
    if not dataclasses.is_dataclass(kind):
        return None
    names = [field.name for field in dataclasses.fields(kind)]
    return attrgetter(*names) if len(names) > 1 else lambda record: (getattr(record, names[0]),)


class Plan:
    """What an op launches for one signature. All launches read their arguments from one table."""

    def __init__(self, trace: Trace, given: list[Any], result: Any, device: GPU, modules: Modules, stream: int) -> None:
        """given: The arrays of the trace that stand for the op's arguments. They are its first ones."""
        self._device, sizes = device, trace.sizes
        returned: list[Any] = []
        _read((result,), [], returned)
        indices = dict.fromkeys(place_of(array.data.ptr)[0] for array in returned)
        shared = (trace.scratch_index, trace.counters_index)
        results = [index for index in indices if index >= len(given)]
        temporary = [index for index in range(len(given), len(sizes)) if index not in (*results, *shared, *trace.maps)]
        self._result_sizes = [sizes[index] for index in results]
        self._offsets: list[int] = []
        self._temporary_bytes = 0
        for index in temporary:
            self._offsets.append(self._temporary_bytes)
            self._temporary_bytes += -(-sizes[index] // _ALIGNMENT) * _ALIGNMENT
        self._scratch_bytes, self._num_counters = (sizes[index] if index >= 0 else 0 for index in shared)
        self._num_counters //= 4
        order = [*range(len(given)), *results, *temporary, *(index for index in shared if index >= 0), *trace.maps]
        self._slots = {(index, 0): slot for slot, index in enumerate(order)}
        self._maps: list[tuple[int, int, tuple[int, ...], int]] = []
        """Tensor maps: the slot of an array, how far from its beginning, the shape, and slots of a box."""
        for address, shape, box in trace.maps.values():
            index, offset = place_of(address)
            self._maps.append((self._slots[index, 0], offset, shape, box))
        self._derived: list[tuple[int, int]] = []
        """Addresses within arrays: the slot of the array, and how far from its beginning."""
        self._restore = self._restoring(result, {id(array): i for i, array in enumerate(given)}, results)
        self.variants = [launch[0].variant for launch in trace.launches if isinstance(launch[0], sources.Entry)]
        """Variants of kernels that are launched."""
        self._modules, self._stream = modules, stream
        self._prepare(trace.launches)
        self._pack = struct.Struct(f"{len(self._slots)}Q").pack_into

    def result(self, arrays: list[Any]) -> Any:
        """What `queue` gives, without a launch."""
        return self._restore(arrays, [_allocate(size) for size in self._result_sizes])

    def queue(self, arrays: list[Any], log: StepLog | None) -> Any:
        """Queue the launches for these arrays; the op's result. A log takes what queues them again."""
        addresses = [array.data.ptr for array in arrays]
        made = [_allocate(size) for size in self._result_sizes]
        addresses += [memory.ptr for memory in made]
        if self._temporary_bytes:  # it is free again behind the launches: the device works in order
            temporary = _allocate(self._temporary_bytes)
            start = temporary.ptr
            addresses += [start + offset for offset in self._offsets]
        if self._scratch_bytes:
            addresses.append(self._device.scratch((self._scratch_bytes,), np.uint8).data.ptr)
        if self._num_counters:
            addresses.append(self._device.counters(self._num_counters).data.ptr)
        for slot, offset, shape, box in self._maps:
            made_map = self._device.map_of(addresses[slot] + offset, shape, box)
            addresses.append(made_map.data.ptr)
            if log is not None:
                log.kept.append(made_map)
        for slot, offset in self._derived:
            addresses.append(addresses[slot] + offset)
        self._pack(self._table.data, 0, *addresses)
        if not self._calls:
            self._bind()
        for call, arguments in self._calls if log is None else self._logged(addresses, log):
            if arguments is None:
                call(addresses)
            else:
                call(*arguments)
        return self._restore(arrays, made)

    def _logged(self, addresses: list[int], log: StepLog) -> Sequence[_Call]:
        """The calls with a table of their own, which are added to the log."""
        table, products, places = self._table.copy(), iter(self._products), iter(self._places)
        log.kept.append(table)
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        for call, arguments in self._calls:
            if arguments is None:
                product, *slots = next(products)
                calls.append((product.queue, tuple(addresses[slot] for slot in slots)))
            else:
                own = next(places) + table.ctypes.data
                log.kept.append(own)
                calls.append((call, (*arguments[:-2], own.ctypes.data, 0)))
        log.calls += calls
        return calls

    def _slot(self, address: int) -> int:
        """Where the table holds an address of the trace."""
        place = place_of(address)
        if place not in self._slots:
            self._derived.append((self._slots[place[0], 0], place[1]))
            self._slots[place] = len(self._slots)
        return self._slots[place]

    def _prepare(self, launches: list[tuple[Any, ...]]) -> None:
        """Make the table."""
        numbers: list[Any] = []
        packed = []
        for launch in launches:
            if isinstance(launch[0], sources.Entry):
                slots: list[int] = []
                for value in launch[2]:
                    if value is None or isinstance(value, np.generic):
                        numbers.append(np.uint64(0) if value is None else value)
                        slots.append(-len(numbers))
                    else:
                        slots.append(self._slot(value.data.ptr))
                packed.append(slots)
            else:
                packed.append([self._slot(address) for address in launch[1:]])
        addresses = len(self._slots)
        self._table = table = np.zeros(addresses + len(numbers), np.uint64)
        for place, number in enumerate(numbers, addresses):
            table[place : place + 1].view(number.dtype)[0] = number
        self._calls: list[_Call] = []
        self._places: list[Any] = []
        """Where each kernel's arguments lie in the table, in bytes."""
        self._products: list[tuple[Any, ...]] = []
        """Products, with the slots of their matrices."""
        self._kernels: list[tuple[sources.Entry, tuple[int, ...]] | None] = []
        """In the order of the launches; None for a product."""
        for launch, slots in zip(launches, packed, strict=True):
            if isinstance(launch[0], sources.Entry):
                self._kernels.append((launch[0], launch[1]))
                self._places.append(np.array([8 * (n if n >= 0 else addresses - n - 1) for n in slots], np.uint64))
            else:
                self._kernels.append(None)
                self._products.append((launch[0], *slots))

    def _bind(self) -> None:
        """Make the calls that queue the launches, of kernels that are compiled by now or are compiled here."""
        self._kept = [own + self._table.ctypes.data for own in self._places]
        products, places = iter(self._products), iter(self._kept)
        calls: list[_Call] = []
        for kernel in self._kernels:
            if kernel is None:
                calls.append((_multiplying(*next(products)), None))
            else:
                entry, grid = kernel
                function, where = pointer(self._modules.function(entry)), next(places).ctypes.data
                calls.append((driver.launchKernel, (function, *grid, *block_of(entry), self._stream, where, 0)))
        self._calls = calls  # not before: a kernel may not compile

    def _restoring(
        self, result: Any, given: dict[int, int], results: list[int]
    ) -> Callable[[list[Any], list[Any]], Any]:
        """What makes the op's result of its arguments and new memory."""
        if isinstance(result, _ndarray):
            if id(result) in given:
                argument = given[id(result)]
                return lambda arrays, made: arrays[argument]
            index, offset = place_of(result.data.ptr)
            shape, dtype = result.shape, result.dtype
            if index in results:
                new = results.index(index)
                if offset == 0:
                    return lambda arrays, made: _ndarray(shape, dtype, made[new])
                return lambda arrays, made: _ndarray(shape, dtype, made[new] + offset)
            return lambda arrays, made: _ndarray(shape, dtype, arrays[index].data + offset)
        if isinstance(result, tuple):
            parts = [self._restoring(part, given, results) for part in result]
            return lambda arrays, made: tuple(part(arrays, made) for part in parts)
        if dataclasses.is_dataclass(result):
            kind: Any = type(result)
            fields = [getattr(result, field.name) for field in dataclasses.fields(result)]
            values = [self._restoring(value, given, results) for value in fields]
            return lambda arrays, made: kind(*(value(arrays, made) for value in values))
        return lambda arrays, made: result


def _multiplying(product: Any, x: int, weight: int, out: int) -> Callable[[list[int]], None]:
    return lambda addresses: product.queue(addresses[x], addresses[weight], addresses[out])
