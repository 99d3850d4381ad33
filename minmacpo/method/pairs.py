"""Preference pairs (R3, R5): every chosen answer beside the agent's own negative.

The stage goes through the prompts in chunks, so that memory does not grow with their number:

    1 group the candidates by prompt        selection.candidates_by_prompt
    2 select                                selection.select
    3 keep the least perplexing prompts     selection.lowest_perplexity_mask
    4 join with the rejected answers        join_with_rejected
    5 tokenize, drop what is unusable       tokenize, drop_unusable
    6 score under the reference             add_reference_logps
    7 write                                 to_pair
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from minmacpo import UserError
from minmacpo.core.batching import scoring_tokens
from minmacpo.core.scoring import score
from minmacpo.data.records import Example, Pair, Sample
from minmacpo.data.tokenizer import Tokens
from minmacpo.method.selection import (
    Candidate,
    CandidateSet,
    Selection,
    lowest_perplexity_mask,
    select,
)
from minmacpo.pipeline.artifacts import Policy, Score, ScoreColumn, TextColumn
from minmacpo.pipeline.model_pool import LoadedModel, Session
from minmacpo.pipeline.stage import Stage, StageContext
from minmacpo.pipeline.stage_log import log_first_row, warn_dropped
from minmacpo.runtime.files import JsonlView, batched, write_rows

CHUNK = 2048  # pairs that are tokenized and scored at a time

UNUSABLE = ("all_empty", "negative_empty", "negative_equal", "over_long")  # reasons, in this order


@dataclass(frozen=True, slots=True)
class PairInputs:
    """What pairs are made of.

    Attributes:
        candidates: by source, for the chosen side.
        selection: how one of them is chosen.
        rejected: the agent's negatives, at most one to a prompt.
        rejected_scores: theirs under the reference; None where the loss needs no reference.
        reference: the policy that the loss compares with; None where it needs none.
        learner: the policy that is to be trained, under which candidates have their mean_logp.
    """

    candidates: Sequence[CandidateSet]
    selection: Selection
    rejected: TextColumn
    rejected_scores: ScoreColumn | None
    reference: Policy | None
    learner: Policy

    @property
    def reference_is_learner(self) -> bool:
        """Whether the candidates' scores are those under the reference, too."""
        return self.reference is not None and self.reference.adapter == self.learner.adapter

    def stages(self) -> list[Stage]:
        """All stages that the pairs depend on."""
        stages = [self.learner.base.stage]
        for source in self.candidates:
            stages.append(source.answers.stage)
            stages += [column.stage for column in source.score_columns]
        stages.append(self.rejected.stage)
        if self.rejected_scores is not None:
            stages.append(self.rejected_scores.stage)
        if self.reference is not None and self.reference.adapter is not None:
            stages.append(self.reference.adapter)
        return stages

    def settings(self) -> dict:
        """What the fingerprint says beside the stages."""
        return {
            "names": [source.source for source in self.candidates],
            "answers": [source.answers.location for source in self.candidates],
            "scores": [source.score_names for source in self.candidates],
            "select": list(self.selection.rules),
            "keep_fraction": self.selection.keep_fraction,
            "pair_weighting": self.selection.pair_weighting,
            "self_agent": self.selection.self_agent,
            "self_fraction": self.selection.self_fraction,
            "texts": self.rejected.location,
            "scores_chosen": self.scores_chosen,
        }

    @property
    def scores_chosen(self) -> bool:
        """Whether there is a reference that has not scored the chosen answers yet."""
        if self.reference is None:
            return False
        is_scored = all(source.learner_scores is not None for source in self.candidates)
        return not (self.reference_is_learner and is_scored)


@dataclass(frozen=True, slots=True)
class PairDraft:
    """A pair on its way: what is not known yet is None."""

    chosen: Candidate
    rejected: Example | Sample
    ref_rejected_logp: float | None  # summed over the answer's tokens, in nats
    ref_chosen_logp: float | None = None
    chosen_row: Tokens | None = None
    rejected_row: Tokens | None = None


def build_pairs(session: Session, name: str, inputs: PairInputs, seed_key: tuple) -> Stage:
    """The stage with pairs.jsonl; a pair that cannot be used is dropped and counted by reason."""
    models = session.models
    seed = session.run.config.run.seed
    base = inputs.learner.base

    def write_pairs(context: StageContext) -> dict:
        # --- The model that scores chosen answers: the reference, if the loss has one
        reference_adapter = None
        if inputs.reference is not None:
            reference_adapter = inputs.reference.adapter
        loaded = models.get(base, reference_adapter)
        budget = scoring_tokens(models.config.run.max_tokens_per_batch, models.device)

        # --- Pairs, made one by one while they are written
        counts: Counter[str] = Counter()
        chosen = choose_answers(inputs, seed, seed_key)
        drafts = join_with_rejected(inputs, chosen, counts)
        pairs = complete_pairs(context, loaded, drafts, inputs, budget, counts)
        if not context.dist.is_main:
            for _ in pairs:  # the other ranks take part in the scoring
                pass
            return {}

        # Weights need the mean of all pairs, so with them the file is written twice
        file = context.folder / "pairs.jsonl"
        write_rows(file, pairs)
        if inputs.selection.pair_weighting == "agreement":
            write_rows(file, normalize_weights(JsonlView(file, Pair)))
        warn_dropped(context, {reason: counts[reason] for reason in UNUSABLE}, counts["pairs"])
        if not counts["pairs"]:
            log_first_row(context, loaded, "chosen", None)
        return summarize(counts, inputs)

    return session.run.stage(
        name=name,
        kind="pairs/4",
        settings=models.settings(base) | inputs.settings(),
        inputs=inputs.stages(),
        compute=write_pairs,
        seed_key=seed_key,
    )


def choose_answers(
    inputs: PairInputs, seed: int, seed_key: tuple
) -> Iterator[tuple[list[Candidate], bool]]:
    """The chosen candidates for every prompt, and whether the prompt is kept (steps 1 to 3)."""

    def chosen() -> Iterator[list[Candidate]]:
        return select(inputs.candidates, inputs.selection, seed, seed_key)

    fraction = inputs.selection.keep_fraction
    if fraction == 1:
        return zip(chosen(), repeat(True), strict=False)
    # The candidates are read twice, since which prompts are kept depends on all of them
    return zip(chosen(), lowest_perplexity_mask(chosen(), fraction), strict=True)


class NegativeLookup:
    """The rejected answer to the prompt of an id, with its score under the reference.

    Prompts come in the order of their negatives, as a rule: then none of them stays in memory.
    """

    def __init__(self, rejected: TextColumn, scores: ScoreColumn | None):
        if scores is None:
            self.unread = zip(rejected.read(), repeat(None), strict=False)
        else:
            self.unread = zip(rejected.read(), scores.read(), strict=True)
        self.passed: dict[str, tuple[Example | Sample, Score | None]] = {}

    def pop(self, prompt_id: str) -> tuple[Example | Sample, Score | None] | None:
        """The answer and its score, once; None where there is no answer to that prompt."""
        if prompt_id not in self.passed:
            for answer, answer_score in self.unread:
                self.passed[answer.id] = (answer, answer_score)
                if answer.id == prompt_id:
                    break
        return self.passed.pop(prompt_id, None)


def join_with_rejected(
    inputs: PairInputs, chosen: Iterable[tuple[list[Candidate], bool]], counts: Counter
) -> Iterator[PairDraft]:
    """A draft for every chosen answer whose prompt is kept and has a negative (step 4)."""
    negatives = NegativeLookup(inputs.rejected, inputs.rejected_scores)
    for candidates, is_kept in chosen:
        negative = negatives.pop(candidates[0].prompt_id)
        if not is_kept:
            counts["not_kept"] += 1
        if negative is None:
            counts["no_negative"] += 1  # its question was too long to be asked
        if not is_kept or negative is None:
            continue
        answer, answer_score = negative
        for candidate in candidates:
            yield PairDraft(
                chosen=candidate,
                rejected=answer,
                ref_rejected_logp=answer_score.logp if answer_score else None,
            )


def complete_pairs(
    context: StageContext,
    loaded: LoadedModel,
    drafts: Iterable[PairDraft],
    inputs: PairInputs,
    budget: int,
    counts: Counter,
) -> Iterator[Pair]:
    """The usable pairs with their reference log-probabilities, a chunk at a time (steps 5 to 7).

    Args:
        loaded: the base with the adapter of the reference policy.
        budget: tokens of a forward pass, padding included.
    """
    for chunk in batched(drafts, CHUNK):
        context.raise_if_stopped()
        # --- 5: token rows; drop what is unusable
        chunk = [tokenize(draft, loaded, inputs.reference_is_learner) for draft in chunk]
        usable = drop_unusable(chunk, loaded.max_length, counts)
        if usable and not counts["pairs"]:
            log_first_row(context, loaded, "chosen", usable[0].chosen_row)

        # --- 6: what the reference has not scored yet
        if inputs.reference is not None:
            usable = add_reference_logps(usable, context, loaded, budget)

        # --- 7: the records that are written
        counts["pairs"] += len(usable)
        for draft in usable:
            counts["tokens"] += sum(draft.chosen_row.mask)
            counts[f"chosen_{draft.chosen.source}"] += 1
            yield to_pair(draft, inputs.selection)


def tokenize(draft: PairDraft, loaded: LoadedModel, reference_is_learner: bool) -> PairDraft:
    """The draft with both rows, and with the chosen answer's log-probability where it is known."""
    prompt = draft.chosen.answer.prompt
    chosen_row = loaded.render(prompt, draft.chosen.response)
    # The same texts under the same policy: the score that decided the selection is the reference's
    logp = None
    if reference_is_learner and draft.chosen.mean_logp is not None:
        logp = draft.chosen.mean_logp * sum(chosen_row.mask)
    return replace(
        draft,
        chosen_row=chosen_row,
        rejected_row=loaded.render(prompt, draft.rejected.response),
        ref_chosen_logp=logp,
    )


def drop_unusable(drafts: Sequence[PairDraft], max_length: int, counts: Counter) -> list[PairDraft]:
    """The drafts that can be trained on; the others are counted by reason."""
    usable = []
    for draft in drafts:
        reason = why_unusable(draft, max_length)
        if reason is None:
            usable.append(draft)
        else:
            counts[reason] += 1
    return usable


def why_unusable(draft: PairDraft, max_length: int) -> str | None:
    """The first reason that holds, one of UNUSABLE; None for a pair that can be trained on."""
    if not draft.chosen.response:
        return "all_empty"  # an empty answer is chosen only where all are empty
    if not draft.rejected.response:
        return "negative_empty"
    if draft.chosen.response == draft.rejected.response:
        return "negative_equal"  # no preference: the margin would have no gradient
    if max(len(draft.chosen_row.ids), len(draft.rejected_row.ids)) > max_length:
        return "over_long"
    return None


def add_reference_logps(
    drafts: Sequence[PairDraft], context: StageContext, loaded: LoadedModel, budget: int
) -> list[PairDraft]:
    """The drafts with log p(chosen) under the reference; those that have it are not scored."""
    unscored = [draft for draft in drafts if draft.ref_chosen_logp is None]
    if not unscored:
        return list(drafts)
    logps = iter(
        score(
            loaded.model,
            [draft.chosen_row for draft in unscored],
            budget,
            dist=context.dist,
            log=context.log,
            log_detail=context.log_detail,
            packed=True,
        )
    )
    scored = []
    for draft in drafts:
        if draft.ref_chosen_logp is None:
            draft = replace(draft, ref_chosen_logp=next(logps))
        scored.append(draft)
    return scored


def to_pair(draft: PairDraft, selection: Selection) -> Pair:
    """The record that is written and trained on."""
    chosen = draft.chosen.answer
    weight = None
    if selection.pair_weighting == "agreement" and draft.chosen.agreement is not None:
        weight = math.exp(draft.chosen.agreement)
    return Pair(
        id=chosen.id,
        prompt=chosen.prompt,
        chosen=chosen.response,
        rejected=draft.rejected.response,
        chosen_by=draft.chosen.source,
        rejected_by=draft.rejected.agent if isinstance(draft.rejected, Sample) else "data",
        ref_chosen_logps=draft.ref_chosen_logp,
        ref_rejected_logps=draft.ref_rejected_logp,
        meta=chosen.meta,
        weight=weight,
    )


def normalize_weights(pairs: Sequence[Pair]) -> Iterable[Pair]:
    """The pairs with their weights, if they have any, scaled to a mean of 1.

    Raises:
        UserError: no pair has a weight above 0.
    """
    if not pairs or pairs[0].weight is None:
        return pairs
    mean = sum(pair.weight for pair in pairs) / len(pairs)
    if mean == 0:
        raise UserError(
            "macpo.pair_weighting = agreement leaves every pair without a weight, since no peer "
            "has room for the answers; take macpo.pair_weighting=none"
        )
    return (replace(pair, weight=pair.weight / mean) for pair in pairs)


def summarize(counts: Counter, inputs: PairInputs) -> dict[str, int]:
    """What stage.json says: pairs, what was left out for which reason, and who was chosen."""
    names = ["pairs", *UNUSABLE, "not_kept", "no_negative"]
    names += [f"chosen_{source.source}" for source in inputs.candidates]
    return {name: counts[name] for name in (*names, "tokens")}
