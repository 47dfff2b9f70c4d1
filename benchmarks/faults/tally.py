"""What was injected, and what became of it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One fault that was injected.

    Attributes:
        kind: its row in the table.
        where: what it hit, for whoever looks into it.
        lost: what was lost by it, or done wrong; empty if all survived.
    """

    kind: str
    where: str
    lost: str = ""

    def and_lost(self, more: Iterable[str]) -> "Fault":
        """The same with more that was lost."""
        told = [self.lost, *more] if self.lost else more
        return replace(self, lost="; ".join(told))


def table(faults: Iterable[Fault]) -> str:
    """Faults injected, survived and lost, by kind, as Markdown."""
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
