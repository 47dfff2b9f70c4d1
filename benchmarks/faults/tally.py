"""Injected faults and their outcomes."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One injected fault.

    Attributes:
        kind: Kind of the fault, its row in the table.
        where: Description of the run and the place.
        lost: Description of what was lost or wrong; empty if the run survived.
    """

    kind: str
    where: str
    lost: str = ""

    def and_lost(self, more: Iterable[str]) -> "Fault":
        """Return a copy with further losses."""
        losses = [self.lost, *more] if self.lost else more
        return replace(self, lost="; ".join(losses))


def table(faults: Iterable[Fault]) -> str:
    """Format the numbers of injected, survived and lost faults per kind, as Markdown."""
    counts: dict[str, list[int]] = {}
    for fault in faults:
        row = counts.setdefault(fault.kind, [0, 0])
        row[bool(fault.lost)] += 1
    counts["**all**"] = [sum(row[i] for row in counts.values()) for i in range(2)]
    lines = ["| fault | injected | survived | lost |", "|---|---:|---:|---:|"]
    for kind, (survived, lost) in counts.items():
        lines.append(f"| {kind} | {survived + lost} | {survived} | {lost} |")
    return "\n".join(lines)


def save(faults: Iterable[Fault], path: Path) -> None:
    """Write every fault to a JSON file."""
    path.write_text(json.dumps([asdict(fault) for fault in faults], indent=1) + "\n")
