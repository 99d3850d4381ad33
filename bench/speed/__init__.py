"""Speed and memory beside other libraries.

A benchmark is a module of its own; `python -m bench.speed.NAME` prints one table and writes
assets/bench/NAME.json through timing.py, and `python -m bench.speed.page` makes BENCHMARKS.md of
all those files. Their form:

    {"bench": "dpo",
     "title": "one line: what is measured, and how",
     "command": "python -m bench.speed.dpo",
     "machine": {...}, "versions": {"torch": "2.13.0", ...},   these four by timing.write_bench
     "date": "2026-01-31", "commit": "1a2b3c4",
     "rows": [ROW, ...],
     "notes": ["a paragraph of markdown", ...],                may be absent
     "pictures": ["growth.svg", ...]}                          beside the JSON; may be absent

    ROW = {"work": "DPO-LoRA step", "shape": "15M", "dtype": "bf16", "peer": "TRL + PEFT",
           "target": ["dpo-15m-bf16", ...],        keys of TARGETS in page.py; may be absent
           "ratio_cpu": [median, low, high],       peer's CPU time / own; None without a peer
           "ratio_wall": [median, low, high],      above 1: own is faster
           "ratio_memory": [median, low, high],    peer's peak / own; may be absent
           "own": {"cpu_s": [median, low, high], "wall_s": [...], "peak_mb": 880, ...},
           "peer_values": {...},                   the same names; {} without a peer
           "equal": "loss 0.69315 / 0.69315",      what was found equal before timing began
           "note": "why a row is short, what a peer lacks, where no figure could be had"}
"""
