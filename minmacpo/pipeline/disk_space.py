"""How much disk a run will take, told before it starts: an estimate by the kinds of its stages."""

import json
from collections import Counter
from collections.abc import Iterable

from minmacpo.config.schema import Config
from minmacpo.config.validate import parse_model_size
from minmacpo.data.readers import find_files
from minmacpo.runtime.hub import local_folder

BYTES_PER_NUMBER = 4  # everything that is stored is in fp32
BYTES_PER_TOKEN = 4
LOGS_AND_REPORT = 20_000_000
GZIP_RATIO = 4  # text that gzip has packed
PACKED_ENDINGS = (".gz", ".parquet", ".pq")


def disk_need(config: Config, kinds: Iterable[str]) -> int:
    """Bytes that stages of these kinds write, about: weights by shape, text by rows and length.

    Args:
        kinds: the kind of every stage that is still to be computed, such as "sft/1".
    """
    # --- How many stages of each kind, and how large their largest file may be
    stages = Counter(kind.partition("/")[0] for kind in kinds)
    base, adapter = largest_weights(config)
    corpus, texts = largest_texts(config)
    adapters = stages["sft"] + stages["prefer"]
    text_files = stages["slices"] + stages["sample"] + stages["pairs"]

    # --- The state of a training holds the values and two moments; the old state stays until the
    #     new one is whole
    trained = 0
    if stages["pretrain"]:
        trained = base
    elif adapters:
        trained = adapter
    training_state = 2 * 3 * trained

    # --- All of it together
    numbers = stages["pretrain"] * base + adapters * adapter + training_state
    text_bytes = stages["corpus"] * corpus + text_files * texts
    number_bytes = BYTES_PER_NUMBER * numbers
    return round(number_bytes + text_bytes) + LOGS_AND_REPORT


def largest_weights(config: Config) -> tuple[int, int]:
    """Numbers in the largest base that is made here, and in the largest adapter of any base."""
    model = config.model
    base = 0
    layer_sizes = []  # for each base, the widths that its adapters have by rank and linear

    # --- Bases that may be made here
    for text in (model.strong, *model.weak):
        width, layers, _, mlp = parse_model_size(text)
        embeddings = 2 * model.vocab * width
        layer = width * (4 * width + 3 * mlp)  # four linears of attention, three of the MLP
        base = max(base, embeddings + layers * layer)
        layer_sizes.append(layers * (width + mlp))

    # --- Bases that are given
    for folder in (model.student, *model.teachers):
        if folder:
            given = json.loads((local_folder(folder) / "config.json").read_text())
            width = given["hidden_size"]
            mlp = given["intermediate_size"]
            layer_sizes.append(given["num_hidden_layers"] * (width + mlp))

    adapter = max(layer_sizes) * config.lora.r * len(config.lora.targets)
    return base, adapter


def largest_texts(config: Config) -> tuple[float, float]:
    """Bytes of the largest corpus to pre-train on, and of the largest file of answers or pairs."""
    data = config.data
    samples = config.eval.samples
    if data.path is None:
        world = config.world
        pretrain = config.pretrain
        documents = pretrain.batch * max(pretrain.strong_steps, pretrain.weak_steps)
        answers = max(world.d1, world.d2, world.test * samples)
        row_bytes = BYTES_PER_TOKEN * data.max_length
        return row_bytes * documents, row_bytes * answers

    # Of the user's files the first is divided into all parts, others are parts by themselves
    size, *other_sizes = [text_bytes(path) for path in data.files.values()]
    d0, d1, d2, test = data.shares
    answers = size * max(d1, d2, test * samples)
    for other in other_sizes:
        answers = max(answers, other * samples)
    return size * d0, answers


def text_bytes(path: str) -> int:
    """Bytes of text in the files of a data path, packed ones as if they were not."""
    total = 0
    for file in find_files(path):
        size = file.stat().st_size
        if file.suffix in PACKED_ENDINGS:
            size *= GZIP_RATIO
        total += size
    return total
