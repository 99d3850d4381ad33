"""The checks that a combination of settings can work, one line each, by section.

The bounds of single values stand in schema.py.
"""

import re
import string
from collections.abc import Collection

from minmacpo import UserError
from minmacpo.config.schema import (
    BOUNDS,
    LOSS_SETTINGS,
    SELECTION_RULES,
    SETTINGS,
    TARGET_MODULES,
    Config,
    Data,
    Dpo,
    Feedback,
    Macpo,
    flatten,
    toml_value,
)

# Rules of selection that rank the candidates of a prompt, so that several of them can be added up
RANKING_RULES = {"perplexity", "likelihood-ratio", "agreement"}


# Rules of macpo.select that look at scores which the student's candidates alone have
STUDENT_RULES = {"likelihood-ratio", "agreement"}


def check(config: Config, stated: Collection[str] = ()) -> None:
    """Raise UserError for the first setting, or combination of settings, that cannot work.

    Args:
        stated: the settings that the user has given, by name, whatever their values.
    """
    check_bounds(config)
    checker = Checker(config)
    check_world(config, checker)
    check_data(config.data, checker)
    check_templates(config, checker)
    check_models(config, checker)
    check_generation(config, checker)
    check_method(config, checker)
    check_macpo(config.macpo, checker)
    check_feedback(config.feedback, checker)
    check_run_name(config.run.name, checker)
    for size in (config.model.strong, *config.model.weak):
        parse_model_size(size)
    check_loss(config.dpo, stated)


class Checker:
    """Says which setting has which value where a condition does not hold."""

    def __init__(self, config: Config):
        self.values = flatten(config)

    def require(self, condition, setting: str, expectation: str) -> None:
        """Raise UserError unless the condition holds: the setting "must be" as expected."""
        if not condition:
            value = toml_value(self.values[setting])
            raise UserError(f"{setting} = {value} must be {expectation}")


def check_bounds(config: Config) -> None:
    """Every value against its own bounds."""
    checker = Checker(config)
    for name, value in checker.values.items():
        if value is None or isinstance(value, str):
            continue
        for bound, limit in SETTINGS[name].metadata["bounds"].items():
            holds = BOUNDS[bound](value, limit)
            checker.require(holds, name, f"{bound.replace('_', ' ')} {limit}")


def check_world(config: Config, checker: Checker) -> None:
    """What the synthetic world asks of its settings together."""
    world = config.world
    checker.require(
        world.tagged + world.judged <= 1,
        "world.tagged",
        f"at most 1 - world.judged = {1 - world.judged:g}",
    )
    checker.require(
        world.held_names < world.names, "world.held_names", f"below world.names = {world.names}"
    )


def check_data(data: Data, checker: Checker) -> None:
    """Shares, limits of length, and files that go together."""
    checker.require(
        shares_are_valid(data),
        "data.shares",
        "four shares (D0, D1, D2, test) that sum to at most 1, above 0 where a split has no own "
        "file",
    )
    checker.require(
        data.path is not None or not data.files,
        "data.path",
        "a file or folder where a split has its own file",
    )
    checker.require(
        data.max_prompt_length < data.max_length,
        "data.max_prompt_length",
        f"below data.max_length = {data.max_length}",
    )


def check_templates(config: Config, checker: Checker) -> None:
    """One template for all bases, or one for each."""
    bases = 1 + config.macpo.teachers
    checker.require(
        len(config.data.template) in (1, bases),
        "data.template",
        f"one template, or a list of {bases}: the strong base, then the weak ones",
    )


def shares_are_valid(data: Data) -> bool:
    """Whether data.shares divides the data among D0, D1, D2 and test."""
    shares = data.shares
    if len(shares) != 4 or min(shares) < 0 or sum(shares) >= 1.000001:
        return False
    for split, share in zip(("d1", "d2", "test"), shares[1:], strict=True):
        if share == 0 and split not in data.files:
            return False
    return True


def check_models(config: Config, checker: Checker) -> None:
    """Adapters, given models and their quantisation."""
    targets = set(config.lora.targets)
    checker.require(
        targets and targets <= set(TARGET_MODULES),
        "lora.targets",
        f"some of {', '.join(TARGET_MODULES)}",
    )
    model = config.model
    teachers = config.macpo.teachers
    checker.require(
        len(model.teachers) in (0, teachers),
        "model.teachers",
        f"a list of {teachers}, as macpo.teachers says",
    )
    all_given = model.student and model.teachers  # then their own context counts
    data = config.data
    longest = max(data.max_prompt_length + config.generate.max_new_tokens, data.max_length)
    checker.require(
        all_given or longest <= model.context,
        "model.context",
        f"at least {longest}: the larger of data.max_length and data.max_prompt_length + "
        "generate.max_new_tokens",
    )


def check_generation(config: Config, checker: Checker) -> None:
    """Sampling settings that go together."""
    checker.require(
        not 0 < config.generate.temperature < 1e-3,
        "generate.temperature",
        "0 (greedy) or at least 0.001",
    )


def check_method(config: Config, checker: Checker) -> None:
    """What the method uses of [macpo], and what it would leave unused."""
    # what the other methods use of [macpo]
    macpo = config.macpo
    shared = Macpo(
        teachers=macpo.teachers, rounds=macpo.rounds, stop=macpo.stop, controls=macpo.controls
    )
    checker.require(
        config.run.method == "macpo" or macpo == shared,
        "run.method",
        "macpo where a setting of [macpo] but teachers, rounds, stop and controls is set",
    )
    checker.require(
        macpo.rounds or config.run.method in ("macpo", "sft"),
        "run.method",
        "macpo or sft where macpo.rounds = 0",
    )


def check_macpo(macpo: Macpo, checker: Checker) -> None:
    """Rules of selection, negatives and rounds that go together."""
    rules = set(macpo.select)
    checker.require(
        rules and len(rules) == len(macpo.select) and (len(rules) == 1 or rules <= RANKING_RULES),
        "macpo.select",
        f"one of its values, or several of {', '.join(sorted(RANKING_RULES))}",
    )
    checker.require(
        macpo.mutual_positives or not macpo.self_fraction,
        "macpo.self_fraction",
        "0 where macpo.mutual_positives = false, which is all of it",
    )
    agreement = "agreement" in rules or macpo.pair_weighting == "agreement"
    checker.require(
        macpo.teachers > 1 or not agreement,
        "macpo.teachers",
        "at least 2 where other teachers are to agree",
    )
    own_positives = macpo.self_fraction or not macpo.mutual_positives
    free_rules = [rule for rule in SELECTION_RULES if rule not in STUDENT_RULES]
    checker.require(
        not own_positives or macpo.answers == 1 or rules - STUDENT_RULES,
        "macpo.select",
        f"{', '.join(free_rules)} or a list with perplexity where teachers choose among "
        "several answers of their own",
    )
    checker.require(
        not macpo.refresh_negatives or macpo.negatives in ("agent", "other", "contrastive"),
        "macpo.negatives",
        "agent, other or contrastive where macpo.refresh_negatives = true",
    )


def check_feedback(feedback: Feedback, checker: Checker) -> None:
    """Texts of AI feedback: their placeholders and verdicts."""
    checker.require(
        placeholders(feedback.rubric) == {"prompt", "response"},
        "feedback.rubric",
        "a text with {prompt} and {response}, other braces doubled",
    )
    checker.require(
        placeholders(feedback.compare) == {"prompt", "first", "second"},
        "feedback.compare",
        "a text with {prompt}, {first} and {second}, other braces doubled",
    )
    verdicts = feedback.verdicts
    checker.require(
        len(verdicts) > 1 and all(verdicts) and len(set(verdicts)) == len(verdicts),
        "feedback.verdicts",
        "at least two different texts, the worst verdict first",
    )
    checker.require(
        len(feedback.options) == 2 and len(set(feedback.options)) == 2,
        "feedback.options",
        "two different texts",
    )
    checker.require(
        feedback.good_tags and len(feedback.good_tags) == len(feedback.bad_tags),
        "feedback.bad_tags",
        f"as many tags as feedback.good_tags has, which is {len(feedback.good_tags)}",
    )


def check_run_name(name: str | None, checker: Checker) -> None:
    """The name of the run is that of a folder."""
    plain = name is None or not ("/" in name or "\\" in name or name in (".", ".."))
    checker.require(plain, "run.name", "a plain folder name")


def check_loss(dpo: Dpo, stated: Collection[str]) -> None:
    """Raise UserError for a setting that the preference loss does not use, yet is set."""
    usual = Dpo()
    used = LOSS_SETTINGS[dpo.loss]
    for settings in LOSS_SETTINGS.values():
        for name in settings:
            is_set = f"dpo.{name}" in stated or getattr(dpo, name) != getattr(usual, name)
            if name in used or not is_set:
                continue
            if name == "reference":
                problem = "uses no reference policy; leave dpo.reference out"
            else:
                problem = f"does not use dpo.{name}; leave it out"
            raise UserError(f"dpo.loss={dpo.loss} {problem}")


def parse_model_size(text: str) -> tuple[int, int, int, int]:
    """(width, layers, heads, mlp) of a text such as "192x4x6x512".

    Raises:
        UserError: the text is no size, or heads do not divide the width into even parts.
    """
    if not re.fullmatch(r"([1-9]\d{0,5}x){3}[1-9]\d{0,5}", text, re.ASCII):
        raise UserError(
            f"{text!r}: expected a shape such as 192x4x6x512 (width x layers x heads x mlp)"
        )
    width, layers, heads, mlp = (int(part) for part in text.split("x"))
    if width % heads or width // heads % 2:
        raise UserError(f"{text!r}: width / heads must be an even whole number")
    return width, layers, heads, mlp


def placeholders(template: str) -> set[str]:
    """The names in braces of a text for str.format.

    None of a text that is no such template, or that formats or converts what it is given.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return set()
    names = set()
    for _, name, format_spec, conversion in parts:
        if format_spec or conversion:
            return set()
        if name is not None:
            names.add(name)
    return names
