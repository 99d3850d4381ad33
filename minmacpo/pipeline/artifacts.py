"""What stages hand to each other: base models, policies, columns of texts and of scores.

Each of them only names a finished stage and says how its files are read; nothing is kept in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from minmacpo.data.records import Example, Pair, Sample
from minmacpo.pipeline.stage import Stage
from minmacpo.runtime.files import JsonlView, iter_rows


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen pre-trained model in Hugging Face's layout, made by this run or given."""

    name: str  # "strong", "weak1", ...
    stage: Stage


@dataclass(frozen=True, slots=True)
class Policy:
    """A base model with an adapter, or without one, under the name that its answers bear."""

    name: str
    base: BaseModel
    adapter: Stage | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """What every method starts from: the stage with d1, d2 and test, and base models by name."""

    splits: Stage
    base_models: dict[str, BaseModel]


@dataclass(frozen=True, slots=True)
class TextColumn:
    """One text per prompt in a file of a stage.

    `column` is "chosen" or "rejected" of pairs, "response" of samples, "untagged" (the same, as
    answers to the prompt without its tag), or "question".
    """

    stage: Stage
    file: str = "samples.jsonl"
    column: str = "response"

    @property
    def location(self) -> list[str]:
        """File and column, as a setting of the stages that read them."""
        return [self.file, self.column]

    def read(self) -> Sequence[Example] | Sequence[Sample]:
        """The texts in the file's order, each read from the disk when it is looked at."""
        file = self.stage.path / self.file
        if self.column == "question":
            return JsonlView(file, Example)
        if self.column == "response":
            return JsonlView(file, Sample)
        if self.column == "untagged":
            return JsonlView(file, Sample, strip_tag)
        return JsonlView(file, Pair, self.side_of)

    def side_of(self, pair: Pair) -> Example:
        """The chosen or the rejected answer of a pair."""
        return Example(pair.id, pair.prompt, getattr(pair, self.column), pair.meta)


def strip_tag(sample: Sample) -> Sample:
    """The sample as if it had been asked for without a tag (RLCD)."""
    prompt = tuple(message for message in sample.prompt if message.role != "tag")
    return replace(sample, prompt=prompt)


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is: summed log-probability in nats, end token included, and its length."""

    logp: float | None  # None: the text is longer than the model's context
    tokens: int


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """The scores of the texts of one source, in their order: one file of a score stage."""

    stage: Stage
    file: str = "scores.jsonl"

    def read(self) -> Iterator[Score]:
        """One score per text, read one by one."""
        for row in iter_rows(self.stage.path / self.file):
            yield Score(logp=row["logp"], tokens=row["tokens"])
