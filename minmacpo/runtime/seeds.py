"""Every random number of a run is derived from its one seed."""

import hashlib


def derive_seed(seed: int, *seed_key) -> int:
    """63 bits that depend on a seed and on a key such as ("round1", "student", "sft")."""
    digest = hashlib.sha256(repr((seed, *seed_key)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
