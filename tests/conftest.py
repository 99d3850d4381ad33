"""Shared ground of the tests: one thread, printed seeds, tiny models, and finished runs to read.

Nothing here reaches the network or leaves its tmp_path (or `scratch`). A test that draws random
numbers takes `seed`, a fresh one each time; pytest prints it when the test fails, and --seed=N
repeats it.
"""

import fcntl
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
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
    "the quick brown fox jumps over the lazy dog ; "
    "pack my box with five dozen liquor jugs 0123456789",
]


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def seed(request) -> int:
    """A fresh seed, printed; torch's and Python's generators are set to it."""
    number = request.config.getoption("--seed")
    if number is None:
        number = random.SystemRandom().randrange(2**31)
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


# ---- finished runs, made once and not to be changed -------------------------------------------


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that is filled once for all processes of a test session, copied for this one."""
    processes = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        processes = processes.parent  # the folder that holds those of all workers

    def fill_or_copy(name: str, fill: Callable[[Path], object]) -> Path:
        original = processes / "made_once" / name
        original.parent.mkdir(exist_ok=True)
        with open(original.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not original.exists():
                unfinished = original.with_suffix(".unfinished")
                fill(unfinished)
                unfinished.rename(original)

        # Each process reads its own copy: programs under test lock the folder of a run
        return shutil.copytree(original, tmp_path_factory.mktemp(name) / name)

    return fill_or_copy


@pytest.fixture(scope="session")
def stub(made_once) -> Path:
    """A finished run of the stub preset."""
    return made_once("stub", lambda folder: new_run(folder, "stub")) / "runs/stub"


@pytest.fixture(scope="session")
def tiny(made_once) -> Path:
    """A finished run of @tiny."""
    return made_once("tiny", lambda folder: new_run(folder, "tiny")) / "runs/tiny"


@pytest.fixture(scope="session")
def methods(made_once, stub) -> dict[str, Path]:
    """A finished run of every method beside the stub, under one root."""

    def run_all(folder: Path) -> None:
        copy_run(stub, folder / "runs")
        for method in METHODS:
            train(write_stub(folder), f"--run.root={folder / 'runs'}", f"--method={method}")

    runs = made_once("methods", run_all) / "runs"
    finished = {"macpo": runs / "stub"}
    for method in METHODS:
        finished[method] = runs / f"stub-method={method}"
    return finished


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
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 96,
    }
    return ModelConfig(**sizes | changes)


def random_model(seed: int, std: float = 0.2, **changes) -> Transformer:
    """A Transformer whose every weight (norms too) is random and large enough to matter."""
    model = new_model(config_of(**changes), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:  # of a norm
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(std * noise)
    return model


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def kept_bytes(compute: Callable[[], torch.Tensor]) -> int:
    """Bytes of all tensors that autograd keeps of a pass; a tensor that is kept twice counts once.

    Parameters do not count.
    """
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = compute()
    del result  # lives until here, so that no kept tensor's memory is used again
    return sum(kept.values())


def logits_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V), as transformers gives them."""
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
        self.params = params
        self.grads = None

    def step(self):
        self.grads = [param.grad.clone() for param in self.params]

    def zero_grad(self):
        for param in self.params:
            param.grad = None


def ragged(seed: int, rows: int, vocab: int, low: int = 1, high: int = 17) -> list[list[int]]:
    """Rows of random ids, of different lengths."""
    rng = random.Random(seed)
    result = []
    for _ in range(rows):
        length = rng.randrange(low, high)
        result.append([rng.randrange(3, vocab) for _ in range(length)])
    return result


@pytest.fixture
def scratch(tmp_path) -> Iterator[Path]:
    """A folder for the many files of tests/faults; in memory where that has room: twice as fast."""
    memory = Path("/dev/shm")
    writable = memory.is_dir() and os.access(memory, os.W_OK)
    if not writable or shutil.disk_usage(memory).free < 2 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="faults-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tuple[list[str], Path]:
    """What tests/faults starts from."""
    from forks import small_run  # it lies beside those tests

    return small_run(tmp_path_factory.mktemp("small"))
