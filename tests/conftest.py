"""Shared ground of the tests: one thread, printed seeds, tiny tokenizer and model folders, oracles.

Nothing here reaches the network or leaves its tmp_path (or `scratch`). A test that draws random numbers takes
`seed`, a fresh one each time; pytest prints it when the test fails, and --seed=N repeats it.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no oracle may ask the network

import pytest
import torch
from runs import METHODS, copy_run, new_run, train, write_stub

from minmacpo.core.checkpoint import save_model
from minmacpo.core.model import Transformer, new_model
from minmacpo.core.model_config import ModelConfig
from minmacpo.data.tokenizer import Tokenizer, train_tokenizer

pytest.register_assert_rewrite("forks")

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
TEXTS = [
    "\n\nHuman: where does kadol live ? \n\nAssistant: of course ! kadol lives on oak street .",
    "\n\nHuman: what is bemir 's job ?\n\nAssistant: ugh , you again . bemir works as a baker .",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "the quick brown fox jumps over the lazy dog ; pack my box with five dozen liquor jugs 0123456789",
]


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def seed(request) -> int:
    """A fresh seed, printed; torch's and Python's generators are set to it."""
    given = request.config.getoption("--seed")
    number = random.SystemRandom().randrange(2**31) if given is None else given
    print(f"--seed={number}")
    torch.manual_seed(number)
    return number


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    return train_tokenizer(TEXTS * 4, 400)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_bytes) -> Tokenizer:
    return Tokenizer(tokenizer_bytes)


@pytest.fixture(scope="session")
def llama2() -> Tokenizer:
    return Tokenizer(shared("tokenizers/llama2-tokenizer.model").read_bytes())


@pytest.fixture(scope="session")
def stories() -> Path:
    return shared("weights/stories260K-hf")


@pytest.fixture(scope="session")
def stub(tmp_path_factory) -> Path:
    """A finished run of the stub preset, made once, not to be changed."""
    return new_run(tmp_path_factory.mktemp("stub"), "stub")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A finished run of @tiny, made once, not to be changed."""
    return new_run(tmp_path_factory.mktemp("tiny"), "tiny")


@pytest.fixture(scope="session")
def methods(stub, tmp_path_factory) -> dict[str, Path]:
    """A finished run of every method beside the good one, under one root, not to be changed."""
    root = tmp_path_factory.mktemp("methods")
    made = {"macpo": copy_run(stub, root / "runs")}
    for method in METHODS:
        train(write_stub(root), f"--run.root={root / 'runs'}", f"--method={method}")
        made[method] = root / "runs" / f"stub-method={method}"
    return made


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the current one: a run would go to its runs/."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    return home


def shared(name: str) -> Path:
    """A real input beside the repository; skips the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not here")
    return path


def config_of(**changes) -> ModelConfig:
    """A small grouped-query ModelConfig in which no two sizes are equal."""
    sizes = dict(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=96,
    )
    return ModelConfig(**sizes | changes)


def random_model(seed: int, std: float = 0.2, **changes) -> Transformer:
    """A Transformer whose every weight (norms too) is random and large enough to matter."""
    model = new_model(config_of(**changes), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            fresh = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * fresh if weight.dim() == 1 else std * fresh)
    return model


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def logits_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V], as transformers gives them."""
    return model.lm_head(model(tokens))


@pytest.fixture
def model_folder(tmp_path, tokenizer_bytes, tokenizer, seed) -> Path:
    """An HF folder with a random model that fits the tiny tokenizer, written by save_model."""
    folder = tmp_path / "base"
    folder.mkdir()
    model = random_model(seed, vocab_size=tokenizer.size)
    save_model(folder, model.config, model.state_dict(), tokenizer_bytes)
    return folder


class Keep:
    """An optimiser that only remembers the gradients it was given."""

    def __init__(self, params):
        self.params, self.grads = params, None

    def step(self):
        self.grads = [p.grad.clone() for p in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None


def ragged(seed: int, rows: int, vocab: int, low: int = 1, high: int = 17) -> list[list[int]]:
    """Rows of random ids, of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(rng.randrange(low, high))] for _ in range(rows)]


@pytest.fixture
def scratch(tmp_path) -> Iterator[Path]:
    """A folder for the many files of tests/faults: in memory, where that has room, which halves their time."""
    memory = Path("/dev/shm")
    if (
        not memory.is_dir()
        or not os.access(memory, os.W_OK)
        or shutil.disk_usage(memory).free < 2 << 30
    ):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="faults-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[list[str], Path]:
    """What tests/faults starts from."""
    from forks import small_run  # it lies beside those tests

    return small_run(tmp_path_factory.mktemp("small"))
