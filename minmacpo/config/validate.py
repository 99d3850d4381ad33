"""The checks that a combination of settings can work."""

import re
import string
from dataclasses import replace

from minmacpo import UserError
from minmacpo.config.schema import (
    BOUNDS,
    LINEARS,
    LOSS_SETTINGS,
    SETTINGS,
    Config,
    Dpo,
    Macpo,
    flatten,
    toml_value,
)


def shape(text: str) -> tuple[int, int, int, int]:
    """(width, layers, heads, mlp) of a "192x4x6x512"; UserError if it is none."""
    if not re.fullmatch(r"([1-9]\d{0,5}x){3}[1-9]\d{0,5}", text, re.ASCII):
        raise UserError(
            f"{text!r}: expected a shape such as 192x4x6x512 (width x layers x heads x mlp)"
        )
    width, layers, heads, mlp = map(int, text.split("x"))
    if width % heads or width // heads % 2:
        raise UserError(f"{text!r}: width / heads must be an even whole number")
    return width, layers, heads, mlp


def placeholders(template: str) -> set[str]:
    """The names in braces of a text for str.format; empty for a text that is none, or that formats them."""
    try:
        found = [found for found in string.Formatter().parse(template) if found[1] is not None]
    except ValueError:
        return set()
    return (
        set()
        if any(form or conversion for *_, form, conversion in found)
        else {name for _, name, *_ in found}
    )


def check(config: Config) -> None:
    """Raise UserError for the first setting, or combination of settings, that cannot work."""
    flat, data, model, town = flatten(config), config.data, config.model, config.world
    asked, part = config.feedback, config.macpo
    shares, targets, count, name = (
        data.shares,
        config.lora.targets,
        config.macpo.teachers,
        config.run.name,
    )
    kept = {key: getattr(config.macpo, key) for key in ("teachers", "rounds", "stop", "controls")}
    longest = max(data.max_prompt_length + config.generate.max_new_tokens, data.max_length)
    rules = [
        (value is None or BOUNDS[bound](value, limit), key, f"{bound.replace('_', ' ')} {limit}")
        for key, value in flat.items()
        for bound, limit in SETTINGS[key].metadata["bounds"].items()
    ]
    rules += [
        (
            town.tagged + town.judged <= 1,
            "world.tagged",
            f"at most 1 - world.judged = {1 - town.judged:g}",
        ),
        (town.held_names < town.names, "world.held_names", f"below world.names = {town.names}"),
        (
            not 0 < config.generate.temperature < 1e-3,
            "generate.temperature",
            "0 (greedy) or at least 0.001",
        ),
        (
            len(shares) == 4
            and min(shares) >= 0
            and sum(shares) < 1.000001
            and all(
                share > 0 or name in data.files
                for name, share in zip(("d1", "d2", "test"), shares[1:], strict=True)
            ),
            "data.shares",
            "four shares (D0, D1, D2, test) that sum to at most 1, above 0 where a slice has no own file",
        ),
        (
            data.path is not None or not data.files,
            "data.path",
            "a file or folder where a slice has its own file",
        ),
        (targets and set(targets) <= set(LINEARS), "lora.targets", f"some of {', '.join(LINEARS)}"),
        (
            len(model.teachers) in (0, count),
            "model.teachers",
            f"a list of {count}, as macpo.teachers says",
        ),
        (
            data.max_prompt_length < data.max_length,
            "data.max_prompt_length",
            f"below data.max_length = {data.max_length}",
        ),
        (
            (model.student and model.teachers) or longest <= model.context,
            "model.context",
            f"at least {longest}: the larger of data.max_length and data.max_prompt_length + generate.max_new_tokens",
        ),
        (
            config.run.method == "macpo" or config.macpo == replace(Macpo(), **kept),
            "run.method",
            "macpo where a setting of [macpo] but teachers, rounds, stop and controls is set",
        ),
        (
            len({*part.select}) == len(part.select) > 0
            and (len(part.select) == 1 or not {"all", "random", "shortest"} & {*part.select}),
            "macpo.select",
            "one of its values, or several of perplexity, likelihood-ratio and agreement",
        ),
        (
            part.mutual_positives or not part.self_fraction,
            "macpo.self_fraction",
            "0 where macpo.mutual_positives = false, which is all of it",
        ),
        (
            count > 1 or not ("agreement" in part.select or part.pair_weighting == "agreement"),
            "macpo.teachers",
            "at least 2 where other teachers are to agree",
        ),
        (
            (part.mutual_positives and not part.self_fraction)
            or part.answers == 1
            or {"perplexity", "random", "all", "shortest"} & {*part.select},
            "macpo.select",
            "perplexity, random, all, shortest or a list with perplexity where teachers choose among several answers of their own",
        ),
        (
            not part.refresh_negatives or part.negatives in ("agent", "other", "contrastive"),
            "macpo.negatives",
            "agent, other or contrastive where macpo.refresh_negatives = true",
        ),
        (
            placeholders(asked.rubric) == {"prompt", "response"},
            "feedback.rubric",
            "a text with {prompt} and {response}, other braces doubled",
        ),
        (
            placeholders(asked.compare) == {"prompt", "first", "second"},
            "feedback.compare",
            "a text with {prompt}, {first} and {second}, other braces doubled",
        ),
        (
            len(set(asked.verdicts)) == len(asked.verdicts) > 1 and all(asked.verdicts),
            "feedback.verdicts",
            "at least two different texts, the worst verdict first",
        ),
        (
            len(set(asked.options)) == len(asked.options) == 2,
            "feedback.options",
            "two different texts",
        ),
        (
            len(asked.good_tags) == len(asked.bad_tags) > 0,
            "feedback.bad_tags",
            f"as many tags as feedback.good_tags has, which is {len(asked.good_tags)}",
        ),
        (
            config.macpo.rounds or config.run.method in ("macpo", "sft"),
            "run.method",
            "macpo or sft where macpo.rounds = 0",
        ),
        (
            not {"/", "\\"} & set(name or "") and name not in (".", ".."),
            "run.name",
            "a plain folder name",
        ),
    ]
    for holds, key, wanted in rules:
        if not holds:
            raise UserError(f"{key} = {toml_value(flat[key])} must be {wanted}")
    for text in (model.strong, *model.weak):
        shape(text)
    check_loss(config.dpo)


def check_loss(dpo: Dpo) -> None:
    """Raise UserError for a setting that the preference loss does not use, yet is set."""
    usual = Dpo()
    used = LOSS_SETTINGS[dpo.loss]
    for settings in LOSS_SETTINGS.values():
        for name in settings:
            if name in used or getattr(dpo, name) == getattr(usual, name):
                continue
            if name == "reference":
                problem = "uses no reference policy; leave dpo.reference out"
            else:
                problem = f"does not use dpo.{name}; leave it out"
            raise UserError(f"dpo.loss={dpo.loss} {problem}")
