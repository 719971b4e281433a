"""What a trial of a kernel has found, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Time:
    """An op at one size, with forge's kernel and with the new one."""

    workload: str
    old_us: float
    new_us: float
    num_bytes: int
    """Of all arrays that the op takes and gives, each once, whatever the kernel reads of them."""

    @property
    def ratio(self) -> float:
        """New time through old."""
        return self.new_us / self.old_us

    @property
    def old_gb_s(self) -> float:
        return self.num_bytes / self.old_us / 1e3

    @property
    def new_gb_s(self) -> float:
        return self.num_bytes / self.new_us / 1e3


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel's variant takes of a GPU, forge's and the new one, by the names of the GPU's vendor."""

    kernel: str
    target: str
    variant: str
    old: dict[str, int]
    new: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """What was verified and measured before a kernel came into use."""

    name: str
    device: str
    cases: int
    """Cases of ops that launch the kernel, all of which it passed."""
    worst_case: str
    share: float
    """Largest error of all cases, as a share of what is allowed."""
    max_abs: float
    """Largest absolute error of that case."""
    times: list[Time]
    not_timed: str
    """Why there are no times; "" where there are."""
    resources: list[Resources]
    not_shown: str
    """Why there are no resources; "" where there are."""

    @classmethod
    def made(cls, fields: dict[str, Any]) -> Self:
        """Of what `dataclasses.asdict` has made of a report."""
        times = [Time(**time) for time in fields["times"]]
        return cls(**{**fields, "times": times, "resources": [Resources(**each) for each in fields["resources"]]})

    def __repr__(self) -> str:
        cases = f"{self.cases} case{'s' * (self.cases != 1)}"
        lines = [
            f"{self.name} is replaced",
            f"verified   {cases} on {self.device}; largest error {self.max_abs:.2g}, "
            f"{self.share:.1%} of what is allowed ({self.worst_case})",
        ]
        if self.not_timed:
            lines.append(f"not timed  {self.not_timed}")
        else:
            rows = [
                (
                    *(time.workload, f"{time.old_us:.2f}", f"{time.new_us:.2f}", f"{time.ratio:.2f}"),
                    *(f"{time.old_gb_s:.0f}", f"{time.new_gb_s:.0f}"),
                )
                for time in self.times
            ]
            lines += _table(("time", "old us", "new us", "new/old", "old GB/s", "new GB/s"), rows)
        if self.not_shown:
            lines.append(f"no registers  {self.not_shown}")
        for each in self.resources:
            shown = [name for name in each.new if each.old.get(name) or each.new[name]]
            lines += ["", f"{each.kernel} on {each.target}, {each.variant}"]
            lines += _table(("", "old", "new"), [(name, str(each.old[name]), str(each.new[name])) for name in shown])
        return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    ]
