"""Op: one declaration of an operation's arguments and its NumPy reference, to which implementations attach.

A file of ops reads top-down: the declaration with its reference comes first, then what computes the same faster::

    @op("x:f32[T,F] -> y:act[T,F]")
    def gelu(x):  # the reference: plain NumPy, also in float64, simple enough to be believed

    @gelu.cpu
    def _gelu_cpu(x):  # a faster NumPy implementation; without one the reference runs

    @gelu.gpu
    def _gelu_gpu(device, x):  # allocates the results and launches the kernels

The cases that check all three are in `forge/devtools/cases/`, in the file of the same name.

Arguments are written as data:

- ``name:dtype[dims]`` is an array, without dims a scalar. Dims are the shape letters of CONTRIBUTING.md, products
  of them (``2*F``), or numbers; the same letter is the same size in all arguments.
- dtypes: ``f32 i32 u32 u64 u8``, and ``act``, the backend's precision of matrix inputs (float32 on NumPy, float16 on a
  GPU); ``weight`` is a matrix in act, a QuantTensor or a Stack of them; the name of a choice between dtypes.
- ``name:Record`` is a record class, whose fields `record` declares in the same language. They are checked like
  arguments of their own. ``name:dtype[dims]|Record`` is an array or such a record.
- ``&`` before a name: written in place, of a record all arrays. ``?`` after a name: None is allowed.
  ``name=a|b``: a compile-time choice, passed by keyword.
- After the arrow: what the op returns. ``y:f32[M,N] if glu=none else y:act[M,N/2]``: the result depends on a choice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from forge.backend import backend_of

Array = npt.NDArray[Any]
Arrays = tuple[Any, ...]
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

REGISTRY: dict[str, Op] = {}
_RECORDS: dict[str, tuple[type, tuple[Arg, ...]]] = {}

_ARG = re.compile(
    r"(?P<inout>&)?(?P<name>\w+)(?P<optional>\?)?:(?P<dtype>\w+)(?:\[(?P<dims>[^\]]+)\])?(?:\|(?P<record>\w+))?$"
)
_CHOICE = re.compile(r"(?P<name>\w+)=(?P<choices>\w+(?:\|\w+)+)$")
_NO_NAMES: dict[str, Any] = {"__builtins__": {}}
_DTYPES = {
    "f32": (np.float32, np.float64),  # float64 only in references that certify float32
    "act": (np.float16, np.float32, np.float64),
    "i32": (np.int32,),
    "u32": (np.uint32,),
    "u64": (np.uint64,),
    "u8": (np.uint8,),
}


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument of an op: an array if it has dims, a record if it has fields, either with both; else a scalar."""

    name: str
    dtype: str
    dims: tuple[str, ...] = ()
    inout: bool = False
    optional: bool = False
    record: str = ""
    fields: tuple[Arg, ...] = ()

    def is_record(self, value: Any) -> bool:
        return bool(self.fields) and isinstance(value, _RECORDS[self.record][0])


@dataclass(slots=True, eq=False)
class Op:
    """A declared op. Calling it runs it where its first argument lives."""

    name: str
    args: tuple[Arg, ...]
    choices: dict[str, tuple[str, ...]]
    returns: tuple[Arg, ...]
    """What it returns; with `returns_else`, for one value of a choice."""
    returns_else: tuple[str, str, tuple[Arg, ...]] | None
    """A choice, its value for `returns`, and what the op returns for its others."""
    reference: Callable[..., Any]
    """Plain NumPy, also in float64; simple enough to be believed."""
    run_cpu: Callable[..., Any]
    """What runs on NumPy arrays: the function that `cpu` attached, or the reference."""
    run_gpu: Callable[..., Any] | None
    """What `gpu` attached. It takes the device (`backend.gpu.GPU`), then the arguments, and launches the kernels."""
    rtol: float
    atol: float
    gpu_rtol: float
    gpu_atol: float
    gpu_slack: Callable[..., Array] | None
    """From exact inputs, what results of its shape may be off by besides: GPUs may take subnormals for zeros."""

    def cpu(self, function: F) -> F:
        """Attach a NumPy implementation that is faster than the reference: a decorator."""
        if self.run_cpu is not self.reference:
            raise ValueError(f"op {self.name} has two implementations for the CPU")
        self.run_cpu = function
        return function

    def gpu(self, function: F) -> F:
        """Attach the function that launches the op's kernels: a decorator."""
        if self.run_gpu is not None:
            raise ValueError(f"op {self.name} has two implementations for GPUs")
        self.run_gpu = function
        return function

    def slack(self, function: F) -> F:
        """Attach what GPUs' results may be off by beside the tolerances: a decorator."""
        self.gpu_slack = function
        return function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return backend_of(args[0]).launch(self, args, options)

    def flat(self, args: Sequence[Any]) -> list[tuple[Arg, Any]]:
        """Declaration and value of each argument, of a record those of each field."""
        pairs: list[tuple[Arg, Any]] = []
        for arg, value in zip(self.args, args, strict=True):
            fields = arg.fields if arg.is_record(value) else ()
            pairs += [(each, getattr(value, each.name)) for each in fields] or [(arg, value)]
        return pairs

    def map(self, function: Callable[[Arg, Any], Any], args: Sequence[Any]) -> Arrays:
        """The arguments with `function(declaration, value)` for each value; records are made anew."""
        return tuple(
            dataclasses.replace(value, **{each.name: function(each, getattr(value, each.name)) for each in arg.fields})
            if arg.is_record(value)
            else function(arg, value)
            for arg, value in zip(self.args, args, strict=True)
        )

    def written(self, args: Sequence[Any]) -> list[Any]:
        """The arrays among the arguments that the op writes in place."""
        return [value for arg, value in self.flat(args) if arg.inout and value is not None]

    def results(self, options: dict[str, Any]) -> tuple[Arg, ...]:
        if self.returns_else is None or options.get(self.returns_else[0]) == self.returns_else[1]:
            return self.returns
        return self.returns_else[2]

    def check(self, args: Sequence[Any], options: dict[str, Any], results: Sequence[Any] = ()) -> dict[str, int]:
        """The size of each shape letter; raises TypeError or ValueError where a call does not fit the declaration."""
        if len(args) != len(self.args):
            raise TypeError(f"{self.name} takes {len(self.args)} arguments, not {len(args)}")
        for name, choices in self.choices.items():
            if options.get(name) not in choices:
                raise ValueError(f"{self.name}: {name} must be one of {choices}, not {options.get(name)!r}")
        sizes: dict[str, int] = {}
        declared = [*self.flat(args), *zip(self.results(options), results, strict=False)]
        for arg, value in declared:
            self._bind(arg, value, sizes, options)
        for arg, value in declared:
            if value is not None and arg.dims:
                for dim, found in zip(arg.dims, value.shape, strict=True):
                    size = sizes[dim] if dim in sizes else _evaluate(dim, sizes)
                    if size is not None and size != found:
                        expected = tuple(_evaluate(dim, sizes) for dim in arg.dims)
                        raise ValueError(f"{self.name}: {arg.name} has shape {value.shape}, not {expected}")
        return sizes

    def _bind(self, arg: Arg, value: Any, sizes: dict[str, int], options: dict[str, Any]) -> None:
        if value is None:
            if not arg.optional:
                raise TypeError(f"{self.name}: {arg.name} is required")
        elif arg.dims:
            if not hasattr(value, "shape") or len(value.shape) != len(arg.dims):
                raise ValueError(f"{self.name}: {arg.name} must have dims [{','.join(arg.dims)}]")
            dtype = options.get(arg.dtype, arg.dtype)
            if dtype != "weight" and value.dtype not in _DTYPES[dtype]:
                raise TypeError(f"{self.name}: {arg.name} must be {dtype}, not {value.dtype}")
            for dim, size in zip(arg.dims, value.shape, strict=True):
                if dim.isidentifier():
                    sizes.setdefault(dim, size)
        elif arg.fields:
            raise TypeError(f"{self.name}: {arg.name} must be {arg.record}, not {type(value).__name__}")
        elif not isinstance(value, int | float | np.number):
            raise TypeError(f"{self.name}: {arg.name} must be a number, not {type(value).__name__}")


def op(
    args: str,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    gpu_rtol: float = 2e-3,
    gpu_atol: float = 2e-3,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op: a decorator of its reference, which names it.

    rtol and atol bound float32 against float64, gpu_rtol and gpu_atol a kernel against float64 of the same inputs.
    """
    takes, _, gives = args.partition("->")
    gives, _, other = gives.partition(" else ")
    gives, _, condition = gives.partition(" if ")
    positional, choices = _parse(takes)
    returns, _ = _parse(gives)
    choice, _, value = condition.partition("=")
    returns_else = (choice, value, _parse(other)[0]) if condition else None

    def declare(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        if name in REGISTRY:
            raise ValueError(f"op {name} is declared twice")
        declared = name, positional, choices, returns, returns_else, reference, reference, None
        REGISTRY[name] = Op(*declared, rtol, atol, gpu_rtol, gpu_atol, None)
        return REGISTRY[name]

    return declare


def record(fields: str) -> Callable[[type[T]], type[T]]:
    """Declare a record of arguments that go together: a decorator of a frozen dataclass with these fields, in order."""

    def declare(cls: type[T]) -> type[T]:
        declared, _ = _parse(fields)
        names = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if names != [arg.name for arg in declared]:
            raise ValueError(f"record {cls.__name__} has the fields {names}, and others are declared")
        _RECORDS[cls.__name__] = cls, declared
        return cls

    return declare


def _parse(text: str) -> tuple[tuple[Arg, ...], dict[str, tuple[str, ...]]]:
    """The arguments, and the choices by name."""
    args: list[Arg] = []
    choices: dict[str, tuple[str, ...]] = {}
    for token in text.split():
        if choice := _CHOICE.match(token):
            choices[choice["name"]] = tuple(choice["choices"].split("|"))
        elif arg := _ARG.match(token):
            dims, inout = tuple(arg["dims"].split(",")) if arg["dims"] else (), bool(arg["inout"])
            record = arg["record"] or (arg["dtype"] if arg["dtype"] in _RECORDS else "")
            fields = tuple(
                dataclasses.replace(each, inout=each.inout or (inout and bool(each.dims)))
                for each in (_RECORDS[record][1] if record else ())
            )
            args.append(Arg(arg["name"], arg["dtype"], dims, inout, bool(arg["optional"]), record, fields))
        else:
            raise ValueError(f"not an argument declaration: {token!r}")
    return tuple(args), choices


@cache
def _compiled(dim: str) -> tuple[CodeType, int]:
    """A dimension such as ``T``, ``N/2`` or ``H*D+2*G*D``: the expression before the slash, and the divisor."""
    whole, _, divisor = dim.partition("/")
    return compile(whole, "dimension", "eval"), int(divisor or 1)


def _evaluate(dim: str, sizes: dict[str, int]) -> int | None:
    """The size of a dimension; None if a letter of it is not known without the results."""
    whole, divisor = _compiled(dim)
    if any(letter not in sizes for letter in whole.co_names):
        return None
    total: int = eval(whole, _NO_NAMES, sizes)
    if total % divisor:
        raise ValueError(f"{dim} is not a whole number for {dim.partition('/')[0]} = {total}")
    return total // divisor
