"""Sampling: ragged right-padded prompts, one prefill, then batched decoding on a static cache.

What a row samples depends on its own seed alone: uniform numbers, one per new token, become tokens by the
inverse of the cumulative distribution, whatever rows lie beside it.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmacpo.config.schema import Generate
from minmacpo.core.model import CACHE_ALIGN, KVCache, Transformer
from minmacpo.core.prepack import can_prepack, is_sharded, prepack

PLAUSIBLE = 0.1  # of the likeliest token's probability: what contrastive decoding may choose


LOOK_EVERY = 8  # decode steps between two looks at which rows have ended


AT_ONCE = 1024  # tokens of the prompts that a packed twin in fp32 reads at once: what it computes with stays in a CPU's cache


ROOM = 64  # attention reads the cache up to the last place in use, rounded up to a multiple of this


def logits_to_probs(
    logits: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor | None]:
    """(probabilities [B, n], their token ids [B, n]; None: all tokens in order) of logits [B, V].
    Temperature, top-k, then top-p on what is left: the smallest set of likeliest tokens that reaches it."""
    logits, ids = logits.float(), None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def draw(probs: Tensor, ids: Tensor | None, uniform: Tensor) -> Tensor:
    """Token ids [B] where the cumulative sum of probs [B, n] passes uniform [B] in [0, 1)."""
    total = probs.cumsum(-1)
    last = probs.shape[-1] - 1 if ids is None else (probs > 0).sum(-1, keepdim=True) - 1
    index = (total <= uniform[:, None] * total[:, -1:]).sum(-1, keepdim=True).clamp(max=last)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def contrast(logits: Tensor, against: Tensor) -> Tensor:
    """Logits [B, V] that favour what `logits` finds likelier than `against` does: their log-probabilities plus
    the difference, among the tokens that have a tenth of the likeliest one's probability (contrastive decoding in the
    form of O'Brien and Lewis 2023 with β = 1; the plausibility constraint is that of Li et al. 2023)."""
    logps = logits.float().log_softmax(-1)
    moved = 2 * logps - against.float().log_softmax(-1)
    return moved.masked_fill(logps < logps.amax(-1, keepdim=True) + math.log(PLAUSIBLE), -math.inf)


def pick(logits: Tensor, settings: Generate, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(token [B], its log-probability [B] at temperature 1) of logits [B, V]."""
    logits = logits.float()
    if settings.temperature == 0:
        token = logits.argmax(-1)
    else:
        token = draw(
            *logits_to_probs(logits, settings.temperature, settings.top_k, settings.top_p), uniform
        )
    return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]


def noise(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Uniform numbers [rows, steps] in [0, 1), row i from seeds[i] alone (Philox, 63-bit key)."""
    return np.stack(
        [np.random.Generator(np.random.Philox(seed)).random(steps, np.float32) for seed in seeds]
    )


def read(model: Transformer, tokens: Tensor, last: Tensor, cache: KVCache) -> Tensor:
    """Logits [B, V] after place last [B] of tokens [B, T], whose cache is written; a packed twin in fp32 reads a few rows at a time."""
    size = len(tokens)
    if model.transposed_cache:
        tokens = F.pad(tokens, (0, -tokens.shape[1] % CACHE_ALIGN))
        size = max(1, AT_ONCE // tokens.shape[1])
    parts = zip(tokens.split(size), last.split(size), cache.split_rows(size), strict=True)
    return torch.cat(
        [
            model.lm_head(model(part, cache=mine)[torch.arange(len(at), device=at.device), at])
            for part, at, mine in parts
        ]
    )


def prefill(
    models: Sequence[Transformer], prompts: Sequence[Sequence[int]], room: int
) -> tuple[list[Tensor], list[KVCache]]:
    """(logits [B, V] of the first new token, cache with `room` more places) of every model. A prompt that several rows
    share is read once."""
    places: dict[tuple[int, ...], int] = {}
    which = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    device = next(models[0].parameters()).device
    tokens = pad_sequence([torch.tensor(prompt) for prompt in places], batch_first=True).to(device)
    last = torch.tensor([len(prompt) - 1 for prompt in places], device=device)
    caches = [m.new_cache(len(places), tokens.shape[1] + room) for m in models]
    logits = [read(m, tokens, last, c) for m, c in zip(models, caches, strict=True)]
    if len(places) < len(prompts):
        chosen = torch.tensor(which, device=device)
        logits, caches = (
            [each[chosen] for each in logits],
            [cache.select_rows(chosen) for cache in caches],
        )
    return logits, caches


class Decoder:
    """One step of decoding: the next tokens' logits. On a GPU its kernels are captured once for as many steps as the shapes
    stay, and replayed, which spares a launch each."""

    captures = True  # until it fails, in this process

    def __init__(self, models: Sequence[Transformer], caches: Sequence[KVCache]):
        self.models, self.caches, self.shape, self.graph = models, caches, None, None
        self.whole = not any(
            map(is_sharded, models)
        )  # what is fetched from other ranks is not captured

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.caches = [cache.select_rows(rows) for cache in self.caches]
        self.graph = None

    def admit(
        self, places: Tensor, prompts: Sequence[Sequence[int]], logits: Sequence[Tensor]
    ) -> None:
        """Read new prompts into these places of the caches, and put their logits there."""
        for cache, mine, new, found in zip(
            self.caches, logits, *reversed(prefill(self.models, prompts, 0)), strict=True
        ):
            cache.write_rows(places, new)
            mine[places] = found

    def run(self, token: Tensor, where: Tensor, used: int) -> list[Tensor]:
        """Logits [B, V] of each model after token [B] at position where [B]; places from `used` on are not read."""
        return [
            m.lm_head(m(token[:, None], positions=where, cache=c.first(used))[:, 0])
            for m, c in zip(self.models, self.caches, strict=True)
        ]

    def capture(self, token: Tensor, where: Tensor, used: int) -> bool:
        """Capture a step at these shapes; False, once said and never tried again, where that cannot be done."""
        self.inputs, self.shape, self.graph = (token.clone(), where.clone()), used, None
        self.run(
            *self.inputs, used
        )  # kernels load, and libraries choose, before anything is captured
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph),
            ):  # which leaves its stream in use if it fails
                self.logits = self.run(*self.inputs, used)
        except torch.OutOfMemoryError:  # fewer rows may do
            raise
        except RuntimeError as error:
            Decoder.captures = False
            print(
                f"WARNING: decoding is not captured as a CUDA graph ({str(error).splitlines()[0]}); it goes on without, slower",
                file=sys.stderr,
            )
            return False
        self.graph = graph
        return True

    def __call__(self, token: Tensor, where: Tensor, furthest: int) -> list[Tensor]:
        """`run`, where no position is beyond `furthest`."""
        used = min(ROOM * (furthest // ROOM + 1), self.caches[0].length)
        if token.device.type != "cuda" or not (Decoder.captures and self.whole):
            return self.run(token, where, used)
        if (self.graph is None or self.shape != used) and not self.capture(token, where, used):
            return self.run(token, where, used)
        for mine, given in zip(self.inputs, (token, where), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.logits


class Board:
    """The rows that are decoded side by side: whose prompt each is (`row`), how many new tokens it has (`at`), whether it goes
    on (`running`), all [places]; the prompts that wait; after which steps rows that began together have all ended (`ends`); and
    what all rows have so far."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], most: int, places: int, device
    ):
        rows = len(prompts)
        self.most, self.waiting, self.step, self.ends = most, deque(range(places, rows)), 0, {most}
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.uniform = torch.from_numpy(noise(seeds, most + 1)).to(
            device
        )  # a row that has ended goes on for a while, unread
        self.out = torch.zeros(rows, most + 1, dtype=torch.long, device=device)
        self.logps, self.counts = (
            torch.zeros(rows, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
        )
        self.row = torch.arange(places, device=device)
        self.at = torch.zeros(places, dtype=torch.long, device=device)
        self.running = torch.ones(places, dtype=torch.bool, device=device)

    def write(self, token: Tensor, logp: Tensor, stop: Tensor) -> None:
        """The next token [places] of every row, and its log-probability."""
        self.out[self.row, self.at] = token
        self.logps[self.row] += torch.where(self.running, logp, 0)
        self.counts[self.row] += self.running
        self.at = self.at + self.running
        self.running = self.running & ~torch.isin(token, stop) & (self.at < self.most)
        self.step += 1

    def clear(self) -> tuple[Tensor | None, list[int]]:
        """(the places to go on with, None: all; the prompts that get the places of rows that have ended); the rest are given up."""
        running = self.running.tolist()
        over = [place for place, goes in enumerate(running) if not goes]
        fresh = [self.waiting.popleft() for _ in over[: len(self.waiting)]]
        if len(fresh) == len(over):
            return None, fresh
        given = {*over[: len(fresh)]}
        keep = torch.tensor(
            [i for i, goes in enumerate(running) if goes or i in given],
            dtype=torch.long,
            device=self.row.device,
        )
        self.row, self.at, self.running = self.row[keep], self.at[keep], self.running[keep]
        return keep, fresh

    def admit(self, fresh: list[int]) -> Tensor:
        """Give the free places to these prompts; which those are."""
        places = (~self.running).nonzero()[:, 0]
        self.row[places] = torch.tensor(fresh, device=places.device)
        self.at[places], self.running[places] = 0, True
        self.ends.add(self.step + self.most)
        return places


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Generate,
    stops: set[int],
    against: Transformer | None = None,
    tell: Callable[[list[int]], None] | None = None,
    places: int | None = None,
) -> tuple[list[list[int]], list[float]]:
    """(new tokens, their summed log-probability) for every prompt, `places` (None: all) decoded side by side: when a row ends, the
    next prompt gets its place.
    An answer ends with one of `stops`, which is kept, or after settings.max_new_tokens tokens. `against`: a second model
    of the same tokens, away from which it is decoded (`contrast`); log-probabilities are then of the contrast.
    `tell` gets the newest token of every row that is still held, step by step; what it raises ends it all."""
    device, most, places = (
        next(model.parameters()).device,
        settings.max_new_tokens,
        min(places or len(prompts), len(prompts)),
    )
    board, stop = (
        Board(prompts, seeds, most, places, device),
        torch.tensor(sorted(stops), device=device),
    )
    models = [prepack(m, places) if can_prepack(m) else m for m in (model, against) if m]
    longest = max(map(len, prompts))
    logits, caches = prefill(
        models, prompts[:places], longest + most - max(map(len, prompts[:places]))
    )
    decoder, fresh = Decoder(models, caches), []
    del caches  # else they stay beside what `Decoder.keep` makes of them
    while len(board.row):
        token, logp = pick(
            contrast(*logits) if against else logits[0],
            settings,
            board.uniform[board.row, board.at],
        )
        if tell:
            tell(token.tolist())
        board.write(token, logp, stop)
        if (board.step in board.ends or board.step % LOOK_EVERY == 0) and not board.running.all():
            keep, fresh = board.clear()
            if keep is not None:
                token = token[keep]
                decoder.keep(keep)
            if not len(board.row):
                break
        logits = decoder(
            token, board.lengths[board.row] + board.at - 1, longest + min(board.step, most) - 1
        )
        if fresh:
            decoder.admit(board.admit(fresh), [prompts[i] for i in fresh], logits)
            fresh = []
    return [
        row[:count] for row, count in zip(board.out.tolist(), board.counts.tolist(), strict=True)
    ], board.logps.tolist()
