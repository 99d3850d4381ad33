"""How many bytes of tensors live at a time: the oracle of what is said about memory."""

import random
import weakref

import torch
from conftest import config_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minmacpo.core.model_config import ModelConfig


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as somebody holds them."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes: dict[int, int] = {}  # by the address of the storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = set()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                inputs.add(leaf.untyped_storage()._cdata)
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
                continue
            storage = leaf.untyped_storage()
            address = storage._cdata
            if address in inputs or address in self.sizes:
                continue
            self.sizes[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, address)
        return out

    def forget(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def random_shape(rng: random.Random) -> ModelConfig:
    """A model of some odd shape."""
    head_dim = rng.choice([16, 32])
    kv_heads = rng.choice([1, 2, 4])
    return config_of(
        vocab_size=rng.choice([500, 4000, 8000]),
        hidden_size=rng.choice([64, 192]),
        intermediate_size=rng.choice([160, 400]),
        num_hidden_layers=rng.choice([4, 8]),
        head_dim=head_dim,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * rng.choice([1, 2]),
        max_position_embeddings=512,
    )
