"""Does stage 1 cost memory or disk per slot? Distils one slot alone, then all slots in one pass, and compares.

    python benchmarks/distill_memory.py

Prints whether the slot's weights are identical bit for bit, the peak of memory of both runs with the part that
weights and optimizer state explain, and the bytes written to disk. Writes benchmarks/distill_memory.json.
Peaks are the allocator's: on a CPU through torch.profiler, on a GPU through torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

from grafting import DistillConfig, GraftPlan, distill, graft, load_host
from grafting.config import DataConfig
from grafting.data import Data, load_data
from grafting.experiment import environment
from grafting.hosts.base import Host

WRITTEN: list[str] = []


def note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: remember every file that Python opens for writing."""
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        WRITTEN.append(arguments[0])


def distilled(host: Host, data: Data, slots: list[str], operator: str, config: DistillConfig) -> tuple[Host, int]:
    """A hybrid distilled at `slots`, and the peak of bytes allocated above what was there before."""
    kind = slots[0].split(".")[0]
    group = {
        "slots": {"kind": kind, "indices": [int(slot.split(".")[1]) for slot in slots]},
        "operator": operator,
    }
    hybrid = graft(host, GraftPlan.from_config([group], host))
    hybrid.to(host.device)
    gc.collect()
    if host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        distill(host, hybrid, data, config)
        return hybrid, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        distill(host, hybrid, data, config)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocated = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return hybrid, peak


def state_bytes(hybrid: Host, slots: list[str]) -> int:
    """What stage 1 keeps for these operators: Adam's two moments and the last good copy of the weights.

    (The weights themselves belong to the hybrid, which exists before.)
    """
    weights = (p for slot in slots for p in hybrid.operator(slot).state_dict().values())
    return sum(3 * weight.numel() * weight.element_size() for weight in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="embedded:digits-dit")
    parser.add_argument("--operator", default="hyena_x")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()

    host = load_host(arguments.host)
    host.to(Accelerator().device)
    data = load_data(DataConfig(source="embedded:digits"), host)
    config = DistillConfig(steps=arguments.steps, batch_size=arguments.batch_size)
    slots = [name for name, slot in host.slots.items() if slot.kind == "mixer"]
    one = slots[len(slots) // 2]

    distilled(host, data, [one], arguments.operator, config.model_copy(update={"steps": 1}))  # warms caches
    sys.addaudithook(note_writes)
    alone, peak_alone = distilled(host, data, [one], arguments.operator, config)
    together, peak_together = distilled(host, data, slots, arguments.operator, config)
    written = [path for path in WRITTEN if not path.endswith("trace.json") and path != os.devnull]

    a, b = (h.operator(one).state_dict() for h in (alone, together))
    explained = state_bytes(together, [slot for slot in slots if slot != one])
    result = {
        "command": "python benchmarks/distill_memory.py",
        "arguments": vars(arguments),
        "environment": environment(),
        "slots": len(slots),
        "identical_weights": all(torch.equal(a[key], b[key]) for key in a),
        "peak_bytes_one_slot": peak_alone,
        "peak_bytes_all_slots": peak_together,
        "operators_state_bytes": explained,
        "unexplained_bytes": peak_together - peak_alone - explained,
        "files_written": written,
        "bytes_written": sum(os.path.getsize(path) for path in written if os.path.exists(path)),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    mib = 2**20
    print(f"{arguments.operator} in {one} alone and in all {len(slots)} slots, batch {arguments.batch_size}")
    print(f"weights of {one} identical: {result['identical_weights']}")
    print(f"peak memory, one slot:  {peak_alone / mib:8.2f} MiB")
    print(f"peak memory, all slots: {peak_together / mib:8.2f} MiB")
    print(f"  of the difference, optimizer state and last good weights: {explained / mib:.2f} MiB,")
    print(f"  unexplained: {result['unexplained_bytes'] / mib:+.2f} MiB")
    print(f"files written: {len(written)}, {result['bytes_written']} bytes")


if __name__ == "__main__":
    main()
