"""What is done in chunks, or in smaller batches where memory is short, gives the same."""

import dataclasses
import json
from pathlib import Path

import pytest
from runs import train, write_stub

from minmacpo import UserError
from minmacpo.config.schema import Config
from minmacpo.data.records import Example, Message
from minmacpo.method import pairs
from minmacpo.pipeline import sample_stage, score_stage
from minmacpo.pipeline.model_pool import LoadedModel
from minmacpo.pipeline.sample_stage import Request, Sampler


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_texts_scored_and_paired_three_at_a_time_are_the_same_in_the_same_order(
    stub, tmp_path, monkeypatch
):
    monkeypatch.setattr(score_stage, "SCORING_CHUNK", 3)
    monkeypatch.setattr(pairs, "CHUNK", 3)
    train(write_stub(tmp_path), f"--run.root={tmp_path / 'runs'}", "--run.max_tokens_per_batch=170")

    files = []
    for pattern in ("*/*/pairs.jsonl", "*/*/samples.jsonl", "eval/*/scores.jsonl"):
        files += sorted(file.relative_to(stub) for file in stub.glob(pattern))
    assert files
    for file in files:
        whole = rows_of(stub / file)
        chunked = rows_of(tmp_path / "runs/stub" / file)
        assert whole, file
        assert [row["id"] for row in whole] == [row["id"] for row in chunked], file
        # a base that has learned from no such row yet scores the same up to rounding
        if "base_weak" in file.parts[1] and file.name == "scores.jsonl":
            expected = [row["logp"] for row in whole]
            assert [row["logp"] for row in chunked] == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def sampler(stub) -> Sampler:
    config = Config()
    settings = dataclasses.replace(config.generate, max_new_tokens=4)
    loaded = LoadedModel(stub / "bases/strong", config, "turns")
    return Sampler(loaded, settings, agent="x", seed=1)


def limit_batches(monkeypatch, largest: int) -> list[int]:
    """Let memory be too short for more than so many rows; returns the sizes that are tried."""
    sizes = []
    generate = sample_stage.generate

    def limited(*args, batch_size, **options):
        size = batch_size
        sizes.append(size)
        if size > largest:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return generate(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(sample_stage, "generate", limited)
    return sizes


REQUESTS = [Request(Example(str(i), (Message("user", f"who is {i} ?"),), ""), 0) for i in range(6)]


def test_sampling_goes_on_with_fewer_side_by_side_where_memory_is_short(
    sampler, monkeypatch, capsys
):
    expected = [sample.tokens for sample in sampler(REQUESTS)]
    sizes = limit_batches(monkeypatch, largest=2)

    assert [sample.tokens for sample in sampler(REQUESTS)] == expected
    assert sizes == [6, 3, 1]
    assert capsys.readouterr().err.count("out of memory") == 2


def test_memory_for_no_answer_at_all_is_one_sentence(sampler, monkeypatch):
    limit_batches(monkeypatch, largest=0)
    with pytest.raises(
        UserError,
        match=r"out of memory while answers are sampled, 1 side by side; "
        r"lower generate\.max_new_tokens",
    ):
        sampler(REQUESTS)
