"""Measurements: experiments of the method (results.py and its kin), and speed and memory against other libraries.

A speed benchmark is a module of its own; `python -m bench.NAME` prints one table and writes assets/bench/NAME.json
through measure.py, and `python -m bench.page` makes BENCHMARKS.md of all those files. Their form:

    {"bench": "dpo", "title": "one line: what is measured, and how", "command": "python -m bench.dpo",
     "machine": {...}, "versions": {"torch": "2.13.0", ...}, "date": "2026-01-31", "commit": "1a2b3c4",   (all by measure.write)
     "rows": [ROW, ...],
     "notes": ["a paragraph of markdown", ...],          may be absent
     "pictures": ["growth.svg", ...]}                    beside the JSON file; may be absent

    ROW = {"work": "DPO-LoRA step", "shape": "15M", "dtype": "bf16", "peer": "TRL + PEFT",
           "target": ["dpo-15m-bf16", ...],              keys of TARGETS in page.py that this row answers; may be absent
           "ratio_cpu": [median, low, high],             peer's CPU time / own; above 1: own is faster. None: no peer
           "ratio_wall": [median, low, high],
           "ratio_memory": [median, low, high],          peer's peak / own; may be absent
           "own": {"cpu_s": [median, low, high], "wall_s": [...], "peak_mb": 880, ...},
           "peer_values": {...},                         the same names; {} where there is no peer
           "equal": "loss 0.69315 / 0.69315",            what was found equal on both sides before anything was timed
           "note": "why a row is short, what a peer lacks, where no figure could be had"}
"""
