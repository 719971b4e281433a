"""Op: one declaration of a kernel's arguments, its NumPy reference, its cases, and the bytes it moves.

Arguments are written as data, ``"x:f32[T,E] weight:f32[E] eps:f32 -> y:act[T,E]"``:

- ``name:dtype[dims]`` is an array, without dims a scalar. Dims are the shape letters of DESIGN.md, products of them
  (``2*F``), or numbers; the same letter is the same size in all arguments.
- dtypes: ``f32 i32 u32 u64``, and ``act``, the backend's precision of matrix inputs (float32 on NumPy, float16 on a
  GPU); ``weight`` is a matrix in act, a QuantTensor or a Stack of them; the name of a choice between dtypes.
- ``&`` before a name: written in place. ``?`` after a name: None is allowed. ``name=a|b``: a compile-time choice,
  passed by keyword.
- After the arrow: what the op returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import backend_of

Array = npt.NDArray[Any]
Arrays = tuple[Any, ...]
REGISTRY: dict[str, Op] = {}

_ARG = re.compile(r"(?P<inout>&)?(?P<name>\w+)(?P<optional>\?)?:(?P<dtype>\w+)(?:\[(?P<dims>[^\]]+)\])?$")
_CHOICE = re.compile(r"(?P<name>\w+)=(?P<choices>\w+(?:\|\w+)+)$")
_DTYPES = {
    "f32": (np.float32, np.float64),  # float64 only in references that certify float32
    "act": (np.float16, np.float32, np.float64),
    "i32": (np.int32,),
    "u32": (np.uint32,),
    "u64": (np.uint64,),
}


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument of an op: an array if it has dims, else a scalar."""

    name: str
    dtype: str
    dims: tuple[str, ...] = ()
    inout: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of an op at one set of sizes; `expected` holds the results, `written` what is written in place, by hand.

    `make` takes a random generator and returns the positional arguments, floats in float32.
    """

    name: str
    make: Callable[[np.random.Generator], Arrays]
    options: dict[str, Any] = field(default_factory=dict)
    expected: tuple[Any, ...] | None = None
    written: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """A declared op. Calling it runs it where its first argument lives."""

    name: str
    args: tuple[Arg, ...]
    choices: dict[str, tuple[str, ...]]
    returns: tuple[Arg, ...]
    reference: Callable[..., Any]
    """Plain NumPy, also in float64; simple enough to be believed."""
    cpu: Callable[..., Any] | None
    """A faster NumPy implementation, tested against the reference; None = the reference is fast enough."""
    gpu: Callable[..., Any] | None
    """Takes the device (`backend.gpu.GPU`), then the arguments: allocates the results and launches the kernels."""
    cases: Sequence[Case]
    rtol: float
    atol: float
    gpu_rtol: float
    gpu_atol: float
    gpu_slack: Callable[..., Array] | None
    """From exact inputs, what float results may be off by besides, because a GPU takes float16 subnormals for zeros."""
    bytes_moved: Callable[..., int] | None
    """Least bytes read and written, from the arguments of a call."""

    @property
    def numpy(self) -> Callable[..., Any]:
        return self.cpu or self.reference

    def __call__(self, *args: Any, **options: Any) -> Any:
        return backend_of(args[0]).launch(self, args, options)

    def check(self, args: Sequence[Any], options: dict[str, Any], results: Sequence[Any] = ()) -> dict[str, int]:
        """The size of each shape letter; raises TypeError or ValueError where a call does not fit the declaration."""
        if len(args) != len(self.args):
            raise TypeError(f"{self.name} takes {len(self.args)} arguments, not {len(args)}")
        for name, choices in self.choices.items():
            if options.get(name) not in choices:
                raise ValueError(f"{self.name}: {name} must be one of {choices}, not {options.get(name)!r}")
        sizes: dict[str, int] = {}
        declared = [*zip(self.args, args, strict=True), *zip(self.returns, results, strict=False)]
        for arg, value in declared:
            self._bind(arg, value, sizes, options)
        for arg, value in declared:
            if value is not None and arg.dims:
                expected = tuple(_evaluate(dim, sizes) for dim in arg.dims)
                if any(size not in (None, found) for size, found in zip(expected, value.shape, strict=True)):
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
        elif not isinstance(value, int | float | np.number):
            raise TypeError(f"{self.name}: {arg.name} must be a number, not {type(value).__name__}")


def op(
    args: str,
    *,
    cases: Sequence[Case],
    cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    gpu_rtol: float = 2e-3,
    gpu_atol: float = 2e-3,
    gpu_slack: Callable[..., Array] | None = None,
    bytes_moved: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op: a decorator of its reference, which names it.

    Tolerances are those of float32 against float64; gpu_rtol, gpu_atol and gpu_slack are those of a kernel against
    float64 of the same float16 inputs.
    """
    takes, _, gives = args.partition("->")
    parsed = list(_parse(takes))
    choices = {name: found for name, found in parsed if isinstance(found, tuple)}
    positional = tuple(found for _, found in parsed if isinstance(found, Arg))
    returns = tuple(found for _, found in _parse(gives) if isinstance(found, Arg))

    def declare(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        if name in REGISTRY:
            raise ValueError(f"op {name} is declared twice")
        tolerances = (rtol, atol, gpu_rtol, gpu_atol, gpu_slack)
        REGISTRY[name] = Op(name, positional, choices, returns, reference, cpu, gpu, cases, *tolerances, bytes_moved)
        return REGISTRY[name]

    return declare


def _parse(text: str) -> Iterator[tuple[str, Arg | tuple[str, ...]]]:
    for token in text.split():
        if choice := _CHOICE.match(token):
            yield choice["name"], tuple(choice["choices"].split("|"))
        elif arg := _ARG.match(token):
            dims = tuple(arg["dims"].split(",")) if arg["dims"] else ()
            yield arg["name"], Arg(arg["name"], arg["dtype"], dims, bool(arg["inout"]), bool(arg["optional"]))
        else:
            raise ValueError(f"not an argument declaration: {token!r}")


def _evaluate(dim: str, sizes: dict[str, int]) -> int | None:
    """A dimension such as ``T``, ``2*F`` or ``H*D+2*G*D``; None if a letter of it is not known without the results."""
    if dim in sizes:
        return sizes[dim]
    if not set(re.findall(r"[A-Za-z_]\w*", dim)) <= sizes.keys():
        return None
    total = 0
    for term in dim.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdecimal() else sizes[factor]
        total += product
    return total
