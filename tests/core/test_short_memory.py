"""Memory that is too short: training and scoring go on in halves, to the same results."""

import contextlib

import pytest
import torch
from conftest import random_model
from test_packing import rows_of, worst
from test_trainer import hooks_of, slotted  # noqa: F401  (a fixture)
from test_trainer import pairs as pair_units

from minmacpo import UserError
from minmacpo.core.batching import MemoryLimit, split_to_fit
from minmacpo.core.losses import PreferenceLoss
from minmacpo.core.scoring import score
from minmacpo.core.trainer import OptimizerConfig, train, train_step
from minmacpo.runtime import progress


def with_short_memory(model, max_tokens: int):
    """The model, in whose forward pass there is no room for more than so many padded tokens."""
    forward = model.forward

    def short_forward(tokens, **more):
        if tokens.numel() > max_tokens:
            # A GPU's error, or that of a CPU's allocator
            if tokens.numel() % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(tokens, **more)

    model.forward = short_forward
    return model


# ---- the limit ------------------------------------------------------------------------------


def halving(memory_for: int, size: int, smallest: int = 1) -> tuple[MemoryLimit, list[int]]:
    """A limit that has been used once where memory suffices for so much, and what was tried."""
    tried = []

    def compute(limit: int) -> None:
        tried.append(limit)
        if limit > memory_for:
            raise torch.OutOfMemoryError("CUDA out of memory")

    memory = MemoryLimit(on_halving=lambda limit: None, failure=lambda limit: UserError("too much"))
    memory.run(compute, size, smallest)
    return memory, tried


def test_what_does_not_fit_is_halved_until_it_does():
    assert halving(memory_for=30, size=100)[1] == [100, 50, 25]
    assert halving(memory_for=100, size=100)[1] == [100]
    assert halving(memory_for=40, size=100, smallest=40)[1] == [100, 50, 40]


def test_the_limit_is_remembered_but_nothing_larger_than_the_work_is_tried():
    memory, _ = halving(memory_for=30, size=100)
    assert memory.limit == 25
    assert memory.run(lambda limit: limit, size=90) == 25
    assert memory.run(lambda limit: limit, size=7) == 7


def test_the_smallest_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="too much"):
        halving(memory_for=3, size=100, smallest=4)


def test_groups_are_halved_until_they_fit():
    def padded_size(group: list[int]) -> int:
        return 10 * len(group)

    assert split_to_fit([[1, 2, 3], [4]], padded_size, 30) == [[1, 2, 3], [4]]
    assert split_to_fit([[1, 2, 3], [4]], padded_size, 20) == [[1], [2, 3], [4]]
    assert split_to_fit([[1, 2, 3], [4]], padded_size, 1) == [[1], [2], [3], [4]]


# ---- training -------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_is_done_in_halves_with_the_same_result(hooks_of, seed):  # noqa: F811
    units = pair_units(seed, 12)
    results = []
    logs = []
    for max_tokens in (10**9, 200):
        model, params = slotted(seed)
        lines = []
        hooks = hooks_of(f"run{max_tokens}", log=lines.append)
        train(
            with_short_memory(model, max_tokens),
            params,
            units,
            PreferenceLoss(0.2, 0.3),
            OptimizerConfig(1e-2, 4, 12),
            hooks,
        )
        results.append([param.detach().clone() for param in params])
        logs.append(lines)

    whole, halves = results
    assert worst(halves, whole) <= 1e-3
    assert logs[0] == []
    assert 1 <= len(logs[1]) <= 4, "later steps start with what fitted"
    assert all(line.startswith("out of memory: the step is done again") for line in logs[1])


class Killed(Exception):
    pass


def test_a_training_that_was_halved_goes_on_to_the_same_bits(hooks_of, seed):  # noqa: F811
    def trained(hooks) -> list[torch.Tensor]:
        model, params = slotted(seed)
        train(
            with_short_memory(model, 200),
            params,
            pair_units(seed, 12),
            PreferenceLoss(0.2, 0.3),
            OptimizerConfig(1e-2, 6, 12),
            hooks,
        )
        return [param.detach().clone() for param in params]

    def killed_later():
        """Asked after every step: a kill after the fourth, two steps after a state was saved."""
        asked.append(1)
        if len(asked) == 3:
            raise Killed
        return False

    whole = trained(hooks_of("whole"))
    lines = []
    asked = []
    stopped = hooks_of("stopped", save_every=2, log=lines.append, should_stop=killed_later)
    with contextlib.suppress(Killed):
        trained(stopped)
    assert any("out of memory" in line for line in lines)
    lines.clear()

    resumed = trained(stopped)

    assert all(map(torch.equal, whole, resumed))
    assert lines == ["resumed at step 4"], "nothing is tried again that did not fit"


def test_only_passes_are_done_again(seed):
    """What comes after them is done by all ranks together, once a step."""
    model, params = slotted(seed)
    optimizer = torch.optim.SGD(params, 1e-2)

    def failing_step():
        raise torch.OutOfMemoryError("out of memory")

    optimizer.step = failing_step
    memory = MemoryLimit(on_halving=pytest.fail, failure=pytest.fail)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(
            model,
            params,
            pair_units(seed, 4),
            [[0, 1, 2, 3]],
            PreferenceLoss(0.2, 0.3),
            optimizer,
            memory=memory,
        )


def test_a_step_without_a_limit_fails_at_once(seed):
    model, params = slotted(seed)
    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match="memory"):
        train_step(
            with_short_memory(model, 3),
            params,
            pair_units(seed, 4),
            [[0, 1, 2, 3]],
            PreferenceLoss(0.2, 0.3),
            torch.optim.SGD(params, 1e-2),
        )


def test_a_training_that_never_fits_is_one_sentence(hooks_of, seed):  # noqa: F811
    model, params = slotted(seed)
    with pytest.raises(UserError, match=r"one row or pair at a time; lower data\.max_length"):
        train(
            with_short_memory(model, 3),
            params,
            pair_units(seed, 4),
            PreferenceLoss(0.2, 0.3),
            OptimizerConfig(1e-2, 2, 4),
            hooks_of(),
        )


# ---- scoring --------------------------------------------------------------------------------


def test_scoring_goes_on_with_half_the_budget(seed):
    model = random_model(seed)
    rows = rows_of(seed, 30)
    lines = []
    wanted = score(model, rows, 10**6)

    scores = score(with_short_memory(model, 150), rows, 600, log=lines.append)

    assert scores == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert 1 <= len(lines) <= 4
    assert all(line.startswith("out of memory: from here at most ") for line in lines)


def test_a_text_that_never_fits_is_one_sentence(seed):
    model = with_short_memory(random_model(seed), 3)
    with pytest.raises(UserError, match="too long to be scored here"):
        score(model, rows_of(seed, 3), 100, log=lambda line: None)


# ---- anywhere else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_is_short_anywhere_else_is_one_sentence(error, capsys):
    def fails(argv):
        raise error

    assert progress.run_main(fails) == 2
    assert capsys.readouterr().err == f"error: out of memory; {progress.RESUMES}\n"


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "unsupported: refers to a single memory location",
    ],
)
def test_an_error_that_speaks_of_memory_is_not_hidden(message):
    def fails(argv):
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        progress.run_main(fails)
