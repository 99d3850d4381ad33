"""Sampling: prompts are read in one prefill, then decoded side by side on a static cache.

What a row samples depends on its own seed alone, whatever rows lie beside it: uniform numbers, one
per new token, become tokens by the inverse of the cumulative distribution. When a row ends, the
next prompt gets its place (continuous batching).

Shapes: B rows decoded side by side, b of them or b distinct prompts read at a time, N prompts in
all, T tokens of a prompt, C hidden size, V vocabulary, of which n tokens may be drawn.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmacpo.core.model import CACHE_ALIGN, KVCache, Transformer
from minmacpo.core.prepack import can_prepack, prepack
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed, weights_are_sharded

# Contrastive decoding may choose tokens with this fraction of the likeliest one's probability
PLAUSIBLE = 0.1

# Decode steps between two looks at which rows have ended; a look makes the CPU wait for the GPU
LOOK_EVERY = 8

# Prompt tokens that a prepacked model in fp32 reads at a time, so as to stay in a CPU's cache
PREFILL_TOKENS = 1024

# Attention reads the cache up to the last position in use, rounded up to a multiple of this
CACHE_STEP = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    max_new_tokens: int = 512


# --- From logits to a token


def logits_to_probs(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, n) and their token ids (B, n), None for all tokens in order; of (B, V).

    Temperature, top-k, then top-p on what is left: the smallest set of likeliest tokens whose
    probabilities reach it.
    """
    # --- The tokens that may be drawn, likeliest first where their order matters
    logits = logits.float()
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)  # (B, n)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)

    # --- Their probabilities
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        likelier = probs.cumsum(-1) - probs  # the probability of all likelier tokens
        probs = probs.masked_fill(likelier >= top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def sample_from_probs(probs: Tensor, ids: Tensor | None, uniform: Tensor) -> Tensor:
    """(B,) token ids where the cumulative sum of probs (B, n) passes uniform (B,) in [0, 1)."""
    cumulative = probs.cumsum(-1)  # (B, n)
    total = cumulative[:, -1:]  # 1 but for rounding
    threshold = uniform[:, None] * total  # (B, 1)
    index = (cumulative <= threshold).sum(-1, keepdim=True)  # (B, 1): tokens that are passed by

    # Rounding may lead past the last token that has a probability
    if ids is None:
        index = index.clamp(max=probs.shape[-1] - 1)
        return index[:, 0]
    last_possible = (probs > 0).sum(-1, keepdim=True) - 1  # probs are in descending order
    index = index.clamp(max=last_possible)
    return ids.gather(-1, index)[:, 0]


def contrast(logits: Tensor, amateur_logits: Tensor) -> Tensor:
    """(B, V) logits that favour what `logits` finds likelier than the amateur model does.

    The log-probabilities plus their difference to the amateur's (O'Brien and Lewis 2023 with
    beta = 1), among the tokens that have PLAUSIBLE of the likeliest one's probability (the
    constraint of Li et al. 2023).
    """
    logps = logits.float().log_softmax(-1)
    amateur_logps = amateur_logits.float().log_softmax(-1)
    contrasted = 2 * logps - amateur_logps
    least_plausible = logps.amax(-1, keepdim=True) + math.log(PLAUSIBLE)  # (B, 1)
    return contrasted.masked_fill(logps < least_plausible, -math.inf)


def pick_token(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token (B,) drawn from logits (B, V), and its log-probability (B,) at temperature 1."""
    logits = logits.float()
    if params.temperature == 0:
        token = logits.argmax(-1)
    else:
        probs, ids = logits_to_probs(logits, params.temperature, params.top_k, params.top_p)
        token = sample_from_probs(probs, ids, uniform)
    logps = logits.log_softmax(-1)  # (B, V)
    logp = logps.gather(-1, token[:, None])  # (B, 1)
    return token, logp[:, 0]


def uniform_noise(seeds: Sequence[int], steps: int) -> np.ndarray:
    """(N, steps) numbers in [0, 1), row i from seeds[i] alone (Philox, 63-bit key)."""
    rows = []
    for seed in seeds:
        generator = np.random.Generator(np.random.Philox(seed))
        rows.append(generator.random(steps, np.float32))
    return np.stack(rows)


# --- Prefill


def prefill_logits(model: Transformer, tokens: Tensor, last: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) after position last (B,) of tokens (B, T); writes their cache."""
    rows_at_once = len(tokens)
    if model.transposed_cache:
        padding = -tokens.shape[1] % CACHE_ALIGN
        tokens = F.pad(tokens, (0, padding))
        rows_at_once = max(1, PREFILL_TOKENS // tokens.shape[1])

    logits = []
    token_parts = tokens.split(rows_at_once)
    last_parts = last.split(rows_at_once)
    cache_parts = cache.split_rows(rows_at_once)
    for part, part_last, part_cache in zip(token_parts, last_parts, cache_parts, strict=True):
        hidden = model(part, cache=part_cache)  # (b, T, C)
        rows = torch.arange(len(part), device=part.device)
        logits.append(model.lm_head(hidden[rows, part_last]))  # (b, V)
    return torch.cat(logits)


def prefill(
    models: Sequence[Transformer], prompts: Sequence[Sequence[int]], extra_length: int
) -> tuple[list[Tensor], list[KVCache]]:
    """Of every model the logits (B, V) of the first new token, and the prompts' cache.

    A prompt that several rows share is read once.

    Args:
        prompts: B of them.
        extra_length: positions that the caches have beyond the longest prompt.
    """
    # --- The b distinct prompts, and which of them every row has
    number_of: dict[tuple[int, ...], int] = {}  # in the order of appearance
    row_numbers = []
    for prompt in prompts:
        number = number_of.setdefault(tuple(prompt), len(number_of))
        row_numbers.append(number)

    # --- Read them
    device = next(models[0].parameters()).device
    distinct = [torch.tensor(prompt) for prompt in number_of]
    tokens = pad_sequence(distinct, batch_first=True).to(device)  # (b, T)
    last = torch.tensor([len(prompt) - 1 for prompt in distinct], device=device)  # (b,)
    logits = []
    caches = []
    for model in models:
        cache = model.new_cache(len(tokens), tokens.shape[1] + extra_length)
        logits.append(prefill_logits(model, tokens, last, cache))
        caches.append(cache)

    # --- Every row gets a copy of its prompt's
    if len(distinct) < len(prompts):
        rows = torch.tensor(row_numbers, device=device)  # (B,)
        logits = [of_model[rows] for of_model in logits]
        caches = [cache.select_rows(rows) for cache in caches]
    return logits, caches


# --- One step of decoding


class Decoder:
    """The models with their caches, and one step of decoding.

    On a GPU the kernels of a step are captured in a CUDA graph for as many steps as the shapes
    stay, and replayed, which spares a launch of each.
    """

    captures = True  # until capturing has failed in this process

    def __init__(self, models: Sequence[Transformer], caches: list[KVCache]):
        self.models = models
        self.caches = caches
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_length = 0  # of the cache that the captured step reads
        # What is fetched from other ranks cannot be captured
        self.can_capture = not any(map(weights_are_sharded, models))

    def select_rows(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.caches = [cache.select_rows(rows) for cache in self.caches]
        self.graph = None

    def prefill_rows(
        self, rows: Tensor, prompts: Sequence[Sequence[int]], logits: Sequence[Tensor]
    ) -> None:
        """Read new prompts into these rows of the caches and of every model's logits (B, V)."""
        new_logits, new_caches = prefill(self.models, prompts, extra_length=0)
        for number in range(len(self.models)):
            self.caches[number].write_rows(rows, new_caches[number])
            logits[number][rows] = new_logits[number]

    def step(self, token: Tensor, positions: Tensor, max_position: int) -> list[Tensor]:
        """Every model's logits (B, V) after token (B,) at positions (B,) up to max_position."""
        length = CACHE_STEP * (max_position // CACHE_STEP + 1)
        length = min(length, self.caches[0].length)
        may_capture = token.device.type == "cuda" and Decoder.captures and self.can_capture
        if not may_capture:
            return self.forward(token, positions, length)
        is_captured = self.graph is not None and self.graph_length == length
        if not is_captured and not self.capture(token, positions, length):
            return self.forward(token, positions, length)

        # A replay reads its inputs where they were when it was captured
        self.graph_token.copy_(token)
        self.graph_positions.copy_(positions)
        self.graph.replay()
        return self.graph_logits

    def forward(self, token: Tensor, positions: Tensor, length: int) -> list[Tensor]:
        """The step itself; it reads the first `length` positions of the caches."""
        logits = []
        for model, cache in zip(self.models, self.caches, strict=True):
            hidden = model(token[:, None], positions=positions, cache=cache.first(length))
            logits.append(model.lm_head(hidden[:, 0]))  # (B, 1, C) -> (B, V)
        return logits

    def idle_pass(self) -> None:
        """A pass of which nothing is used: other ranks need this one's part of the weights."""
        for model in self.models:
            model(torch.zeros(1, 1, dtype=torch.long, device=model.lm_head.weight.device))

    def capture(self, token: Tensor, positions: Tensor, length: int) -> bool:
        """Capture a step of these shapes; False where that cannot be done, which is said once."""
        self.graph = None
        self.graph_length = length
        self.graph_token = token.clone()
        self.graph_positions = positions.clone()
        # Kernels load, and libraries choose among theirs, before anything is captured
        self.forward(self.graph_token, self.graph_positions, length)
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            # torch.cuda.graph leaves its own stream in use if it fails: the outer one puts it right
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.graph_logits = self.forward(self.graph_token, self.graph_positions, length)
        except torch.OutOfMemoryError:  # with fewer rows it may work
            raise
        except RuntimeError as error:
            Decoder.captures = False
            reason = str(error).splitlines()[0]
            print(
                f"WARNING: decoding is not captured as a CUDA graph ({reason}); it goes on "
                "without, slower",
                file=sys.stderr,
            )
            return False
        self.graph = graph
        return True


# --- Which prompt is decoded in which row


class Scheduler:
    """Which of N prompts are decoded in the B rows, which wait, and what all have sampled so far.

    Of a row: `prompt` (B,) is the number of the prompt that is decoded there, `num_generated` (B,)
    how many tokens it has, `running` (B,) whether it goes on. The CPU waits for a GPU only in
    `should_look` and `replace_finished`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        stop_token_ids: set[int],
        batch_size: int,
        device: torch.device,
    ):
        count = len(prompts)
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = torch.tensor(sorted(stop_token_ids), device=device)
        self.waiting = deque(range(batch_size, count))
        self.steps = 0
        # Steps after which all rows that began together have ended
        self.end_steps = {max_new_tokens}

        # Of all prompts; a row that has ended goes on for a while, and writes past its end
        length = max_new_tokens + 1
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.uniform = torch.from_numpy(uniform_noise(seeds, length)).to(device)  # (N, length)
        self.tokens = torch.zeros(count, length, dtype=torch.long, device=device)
        self.logps = torch.zeros(count, device=device)
        self.token_counts = torch.zeros(count, dtype=torch.long, device=device)

        # Of the rows
        self.prompt = torch.arange(batch_size, device=device)
        self.num_generated = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.running = torch.ones(batch_size, dtype=torch.bool, device=device)

    def next_uniform(self) -> Tensor:
        """(B,): the number that every row's next token is drawn with."""
        return self.uniform[self.prompt, self.num_generated]

    def append(self, token: Tensor, logp: Tensor) -> None:
        """Take every row's next token (B,) and its log-probability (B,)."""
        self.tokens[self.prompt, self.num_generated] = token
        self.logps[self.prompt] += torch.where(self.running, logp, 0)
        self.token_counts[self.prompt] += self.running
        self.num_generated = self.num_generated + self.running
        has_room = self.num_generated < self.max_new_tokens
        is_stopped = torch.isin(token, self.stop_token_ids)
        self.running = self.running & has_room & ~is_stopped
        self.steps += 1

    def positions(self) -> Tensor:
        """(B,): the position of every row's newest token."""
        return self.prompt_lengths[self.prompt] + self.num_generated - 1

    def should_look(self) -> bool:
        """Whether it is time to see which rows have ended, and some have."""
        if self.steps not in self.end_steps and self.steps % LOOK_EVERY != 0:
            return False
        return not self.running.all()

    def replace_finished(self) -> tuple[Tensor | None, list[int]]:
        """Give up rows that have ended, but for those that waiting prompts are to get.

        Returns:
            The rows to go on with (None: all), and the prompts that `admit` is to be called with.
        """
        kept = []
        admitted = []
        is_running = self.running.tolist()
        for row in range(len(is_running)):
            if is_running[row]:
                kept.append(row)
            elif self.waiting:
                kept.append(row)
                admitted.append(self.waiting.popleft())
        if len(kept) == len(is_running):
            return None, admitted

        rows = torch.tensor(kept, dtype=torch.long, device=self.prompt.device)
        self.prompt = self.prompt[rows]
        self.num_generated = self.num_generated[rows]
        self.running = self.running[rows]
        return rows, admitted

    def admit(self, admitted: list[int]) -> Tensor:
        """Give the rows that have ended to these prompts; returns the rows."""
        rows = (~self.running).nonzero()[:, 0]
        self.prompt[rows] = torch.tensor(admitted, device=rows.device)
        self.num_generated[rows] = 0
        self.running[rows] = True
        self.end_steps.add(self.steps + self.max_new_tokens)
        return rows

    def results(self) -> tuple[list[list[int]], list[float]]:
        """Tokens and log-probabilities of all prompts."""
        tokens = []
        counts = self.token_counts.tolist()
        for row, count in zip(self.tokens.tolist(), counts, strict=True):
            tokens.append(row[:count])
        return tokens, self.logps.tolist()


# --- Sampling


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    params: SamplingParams,
    stop_token_ids: set[int],
    *,
    amateur: Transformer | None = None,
    on_token: Callable[[list[int]], None] | None = None,
    batch_size: int | None = None,
    dist: Distributed = SINGLE_PROCESS,
) -> tuple[list[list[int]], list[float]]:
    """New tokens and their summed log-probability for every prompt.

    An answer ends with one of the stop tokens, which is kept, or after params.max_new_tokens.

    Args:
        seeds: one for every prompt; what it samples depends on nothing else.
        amateur: a second model of the same tokens, away from which is decoded (`contrast`); the
            log-probabilities are then those of the contrast.
        on_token: gets the newest token of every row, step by step; what it raises ends it all.
        batch_size: prompts decoded side by side, None for all; the next gets a row that has ended.
        dist: the ranks; where they share a model's weights all call this together, each with its
            own prompts, and make the same passes until all have finished.
    """
    if weights_are_sharded(model) and not dist.is_sharded:
        raise ValueError("other ranks have a part of this model's weights: pass `dist`")
    device = next(model.parameters()).device
    if batch_size is None:
        batch_size = len(prompts)
    batch_size = min(batch_size, len(prompts))
    scheduler = Scheduler(
        prompts=prompts,
        seeds=seeds,
        max_new_tokens=params.max_new_tokens,
        stop_token_ids=stop_token_ids,
        batch_size=batch_size,
        device=device,
    )

    models = [model] if amateur is None else [model, amateur]
    decoder, logits = start_decoding(models, prompts, batch_size, params.max_new_tokens)

    # --- Token by token, until no row is left
    longest = max(map(len, prompts))
    while len(scheduler.prompt):
        next_logits = logits[0]
        if amateur is not None:
            next_logits = contrast(*logits)
        token, logp = pick_token(next_logits, params, scheduler.next_uniform())
        if on_token:
            on_token(token.tolist())
        scheduler.append(token, logp)

        admitted = []
        if scheduler.should_look():
            rows, admitted = scheduler.replace_finished()
            if rows is not None:
                token = token[rows]
                decoder.select_rows(rows)
            if not len(scheduler.prompt):
                break

        # Rows of admitted prompts are decoded in vain once more: so the shapes stay
        any_admits = any_rank_prefills(dist, bool(admitted))
        # No row is further than this; to know the furthest one exactly, a GPU would be waited for
        furthest = longest + min(scheduler.steps, params.max_new_tokens) - 1
        logits = decoder.step(token, scheduler.positions(), furthest)
        if admitted:
            rows = scheduler.admit(admitted)
            decoder.prefill_rows(rows, [prompts[number] for number in admitted], logits)
        elif any_admits:
            decoder.idle_pass()

    if dist.is_sharded:
        follow_until_all_finish(decoder, dist)
    return scheduler.results()


def start_decoding(
    models: Sequence[Transformer],
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
) -> tuple[Decoder, list[Tensor]]:
    """A decoder that has read the first `batch_size` prompts, and every model's logits (B, V).

    The caches belong to the decoder alone: a second reference would keep them in memory beside
    those that `select_rows` makes of them.
    """
    # Packed once for the whole batch, and only where that pays
    packed = []
    for model in models:
        packed.append(prepack(model, batch_size) if can_prepack(model) else model)

    # The caches must have room for longer prompts that come later, too
    first_prompts = prompts[:batch_size]
    missing = max(map(len, prompts)) - max(map(len, first_prompts))
    logits, caches = prefill(packed, first_prompts, extra_length=missing + max_new_tokens)
    return Decoder(packed, caches), logits


# What a rank tells the others before every step, where they share the weights of models
FINISHED, DECODES, DECODES_AND_PREFILLS = range(3)


def any_rank_prefills(dist: Distributed, prefills: bool) -> bool:
    """Whether a prompt is read in this step: by this rank or, of a sharded model, by any."""
    if not dist.is_sharded:
        return prefills
    own = DECODES_AND_PREFILLS if prefills else DECODES
    return dist.all_reduce_max(own) == DECODES_AND_PREFILLS


def follow_until_all_finish(decoder: Decoder, dist: Distributed) -> None:
    """Make the passes that other ranks make, until none of them has a row left."""
    while (others := dist.all_reduce_max(FINISHED)) != FINISHED:
        decoder.idle_pass()
        if others == DECODES_AND_PREFILLS:
            decoder.idle_pass()
