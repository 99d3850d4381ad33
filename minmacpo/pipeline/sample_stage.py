"""The stage that samples a policy's answers to every prompt.

Requests are sorted by the length of their prompts and sampled in shards of fixed size, each a file
of its own: a killed stage redoes the shard that it was at. The shards are then merged into one
file in the order of the prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minmacpo import UserError
from minmacpo.config.schema import Generate
from minmacpo.core.sampling import SamplingParams, generate
from minmacpo.core.scoring import perplexity
from minmacpo.data.chat_template import count_thoughts, render_prompt, response_text
from minmacpo.data.records import Example, Sample
from minmacpo.data.tokenizer import Tokenizer
from minmacpo.pipeline.artifacts import Policy, TextColumn
from minmacpo.pipeline.model_pool import LoadedModel, Session
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.stage_log import log_first_row
from minmacpo.runtime.distributed import SINGLE_PROCESS, Distributed, weights_are_sharded
from minmacpo.runtime.files import JsonlView, finished_shards, to_values, write_rows, write_shard
from minmacpo.runtime.seeds import derive_seed

# A shard is sampled as one stream: when an answer ends, the next prompt of the shard takes its
# place in the batch, so that a shard of several batches wastes less than each batch by itself.
BATCHES_PER_SHARD = 4


@dataclass(frozen=True, slots=True)
class SampleArgs:
    """How a policy is asked.

    Attributes:
        answers: how many to each prompt.
        temperature: in place of generate.temperature.
        contrast_adapter: decode away from what the base with this adapter would say.
    """

    answers: int = 1
    temperature: float | None = None
    contrast_adapter: Stage | None = None


ONE_ANSWER = SampleArgs()


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted: the prompt, and which of several answers to it."""

    prompt: Example
    number: int = 0


def sample(
    session: Session,
    name: str,
    policy: Policy,
    prompts: TextColumn,
    seed_key: tuple,
    args: SampleArgs = ONE_ANSWER,
) -> Stage:
    """The stage with samples.jsonl: answers of a policy to every prompt, in the prompts' order.

    Args:
        seed_key: what the stage's seed is derived from, beside the run's.
    """
    models = session.models
    answers = args.answers
    settings = session.run.config.generate
    if args.temperature is not None:
        settings = replace(settings, temperature=args.temperature)

    def write_samples(context: StageContext) -> dict:
        # --- The models, and the first prompt as they read it
        contrast_model = None  # a second model in memory, since both adapters are at work
        if args.contrast_adapter is not None:
            contrast = models.get(policy.base, args.contrast_adapter, copy="contrast")
            contrast_model = contrast.model
        sampler = Sampler(
            loaded=models.get_policy(policy),
            settings=settings,
            agent=policy.name,
            seed=context.seed,
            contrast_model=contrast_model,
            dist=context.dist,
        )
        texts = prompts.read()
        log_first_prompt(context, sampler.loaded, texts)

        # --- Short prompts first, so that those side by side need little padding
        order = order_by_length(sampler.loaded, texts, answers)
        shard_size = settings.batch * BATCHES_PER_SHARD
        shards = []
        for start in range(0, len(order), shard_size):
            shards.append(order[start : start + shard_size])

        def sample_shard(shard: np.ndarray) -> list[dict]:
            requests = []
            for request in shard.tolist():
                prompt_number, answer_number = divmod(request, answers)
                requests.append(Request(texts[prompt_number], answer_number))
            return [to_values(answer) for answer in sampler(requests, settings.batch)]

        # --- Sample, and merge the shards into the prompts' order
        files = sample_shards(context, shards, sample_shard)
        if not context.dist.is_main:
            return {}
        counts = {"answers": len(order), "tokens": 0, "hit_length": 0, "empty": 0}
        merged = count_samples(
            merge_shards(files, order, shard_size), counts, sampler.loaded.tokenizer
        )
        write_rows(context.folder / "samples.jsonl", merged)
        for file in context.folder.glob("block*.jsonl"):  # damaged ones, of a kill, as well
            file.unlink()
        if "thoughts" in counts:
            context.log(describe_thoughts(counts))
        return counts

    inputs = [policy.base.stage, policy.adapter, prompts.stage, args.contrast_adapter]
    return session.run.stage(
        name=name,
        kind="sample/2",
        settings=models.settings(policy.base)
        | asdict(settings)
        | {
            "texts": prompts.location,
            "answers": answers,
            "agent": policy.name,
            "contrastive": args.contrast_adapter is not None,
            "batches_per_shard": BATCHES_PER_SHARD,
        },
        inputs=[stage for stage in inputs if stage is not None],
        compute=write_samples,
        seed_key=seed_key,
        summary=f"{answers} answer(s) per prompt",
    )


def log_first_prompt(context: StageContext, loaded: LoadedModel, texts: Sequence[Example]) -> None:
    """Log how the first prompt is read."""
    row = None
    if texts:
        row = loaded.render(texts[0].prompt)
    log_first_row(context, loaded, "prompt", row)


def order_by_length(loaded: LoadedModel, texts: Sequence[Example], answers: int) -> np.ndarray:
    """The numbers of all requests, short prompts first; request i is for prompt i // answers."""
    lengths = [len(loaded.render(text.prompt).ids) for text in texts]
    lengths_of_requests = np.repeat(np.array(lengths, np.int32), answers)
    return np.argsort(lengths_of_requests, kind="stable").astype(np.int32)


def sample_shards(
    context: StageContext, shards: list[np.ndarray], sample_shard: Callable
) -> list[Path]:
    """The files of all shards; those that a stopped stage has left are not sampled again.

    The ranks divide the shards among them; the main rank alone writes, the others get no files.
    """
    # --- What is left to do, as the main rank sees it
    files = {}
    if context.dist.is_main:
        files = finished_shards(context.folder)
    missing = context.dist.run_on_main(
        lambda: [number for number in range(len(shards)) if number not in files]
    )
    unsampled = [shards[number] for number in missing]
    total = sum(map(len, shards))
    done = total - sum(map(len, unsampled))

    # --- Every missing shard
    with context.progress(total, "answer", done) as progress:
        results = context.dist.parallel_map(unsampled, sample_shard)
        for number, samples in zip(missing, results, strict=True):
            if context.dist.is_main:
                files[number] = write_shard(context.folder, number, samples)
            progress.step(len(samples))
    if not context.dist.is_main:
        return []
    return [files[number] for number in range(len(shards))]


def merge_shards(files: Sequence[Path], order: np.ndarray, shard_size: int) -> Iterator[Sample]:
    """The samples of the shards in the order of their requests, read one by one.

    Args:
        order: the request that each sample answers, in the order in which they were sampled.
    """
    positions = np.empty_like(order)  # of the sample that answers a request
    positions[order] = np.arange(len(order), dtype=order.dtype)
    shards = [JsonlView(file, Sample) for file in files]
    for position in positions.tolist():
        yield shards[position // shard_size][position % shard_size]


def count_samples(
    samples: Iterator[Sample], counts: dict[str, int], tokenizer: Tokenizer
) -> Iterator[Sample]:
    """The samples as they are, counted on their way; thoughts only where there are some."""
    for answer in samples:
        thoughts = count_thoughts(tokenizer, answer.tokens)
        if thoughts:
            counts["thoughts"] = counts.get("thoughts", 0) + 1
            counts["thought_tokens"] = counts.get("thought_tokens", 0) + thoughts
        counts["tokens"] += len(answer.tokens)
        if answer.finish == "length":
            counts["hit_length"] += 1
        if not answer.response:
            counts["empty"] += 1
        yield answer


def describe_thoughts(counts: Mapping[str, int]) -> str:
    """What the log says of answers with thoughts."""
    sentence = (
        f"{counts['thoughts']} of {counts['answers']} answers begin with thoughts, which are left "
        f"out: {counts['thought_tokens']} of {counts['tokens']} tokens"
    )
    if counts["empty"]:
        sentence += f"; {counts['empty']} answers are empty, see generate.max_new_tokens"
    return sentence


@dataclass(slots=True)
class Sampler:
    """Samples answers of one model; how many side by side is halved when memory is short.

    Attributes:
        agent: the name that the samples bear.
        seed: of all samples; that of one is derived from it, the prompt's id and its number.
        contrast_model: decode away from what this model would say.
        on_token: gets the newest tokens of all running answers after every step.
        dist: the ranks, of which each samples answers of its own.
    """

    loaded: LoadedModel
    settings: Generate
    agent: str
    seed: int
    contrast_model: torch.nn.Module | None = None
    on_token: Callable[[list[int]], None] | None = None
    dist: Distributed = SINGLE_PROCESS

    def __call__(
        self, requests: Sequence[Request], max_batch_size: int | None = None
    ) -> list[Sample]:
        """One sample per request, at most so many decoded side by side (None: all).

        Raises:
            UserError: a prompt has no room in the context, or memory is too short for one answer.
        """
        prompts = []
        seeds = []
        for request in requests:
            prompt = request.prompt
            prompts.append(
                render_prompt(self.loaded.tokenizer, self.loaded.template, prompt.prompt)
            )
            seeds.append(derive_seed(self.seed, prompt.id, request.number))
        self.check_context(prompts)
        batch_size = min(max_batch_size or len(requests), len(requests))
        answers, logps = self.decode(prompts, seeds, batch_size)

        samples = []
        for request, seed, tokens, logp in zip(requests, seeds, answers, logps, strict=True):
            samples.append(self.to_sample(request.prompt, seed, tokens, logp))
        return samples

    def check_context(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise UserError where the context has no room for the longest prompt and an answer."""
        room = self.loaded.context - self.settings.max_new_tokens
        longest = max(len(prompt) for prompt in prompts)
        if longest > room:
            raise UserError(
                f"a prompt has {longest} tokens; with generate.max_new_tokens = "
                f"{self.settings.max_new_tokens} the context has room for {max(room, 0)}"
            )

    def decode(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], batch_size: int
    ) -> tuple[list[list[int]], list[float]]:
        """New tokens and their summed log-probability for every prompt."""
        params = SamplingParams(
            temperature=self.settings.temperature,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
            max_new_tokens=self.settings.max_new_tokens,
        )

        def attempt(size: int) -> tuple[list[list[int]], list[float]]:
            return generate(
                self.loaded.model,
                prompts,
                seeds,
                params,
                self.loaded.answer_end_ids(),
                amateur=self.contrast_model,
                on_token=self.on_token,
                batch_size=size,
                dist=self.dist,
            )

        # Of a sharded model the other ranks wait for this one's next pass: nothing is halved there
        smallest = batch_size if weights_are_sharded(self.loaded.model) else 1
        return self.loaded.batch_limit.run(attempt, batch_size, smallest)

    def to_sample(self, prompt: Example, seed: int, tokens: Sequence[int], logp: float) -> Sample:
        """The record of one answer."""
        ended = tokens[-1] in self.loaded.answer_end_ids()
        return Sample(
            id=prompt.id,
            prompt=prompt.prompt,
            response=response_text(self.loaded.tokenizer, self.loaded.template, tokens),
            finish="stop" if ended else "length",
            tokens=tuple(tokens),
            logp=logp,
            perplexity=perplexity(logp, len(tokens)),
            agent=self.agent,
            seed=seed,
            meta=prompt.meta,
        )
