"""Which finished stages a run takes instead of computing them, and what has changed since others.

A stage is taken if its fingerprint is the one that is needed, wherever it lies in the root of all
runs. The fingerprint covers the code, so an edit of a loss has all trainings, and what follows
them, computed anew. With run.reuse=all the code is left out; what a stage was really made of stays
in its fingerprint and in those of its followers, so that a later run can tell.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minmacpo.pipeline.code_digest import module_digest_or_none
from minmacpo.pipeline.run_dir import finished_stages
from minmacpo.pipeline.stage import Stage

SHOWN = 4  # changes of one sort that are named in a line
LONGEST_VALUE = 30  # characters of a setting's value in a line


@dataclass(frozen=True, slots=True)
class FinishedStage:
    """A stage that some run has finished, with its stage.json."""

    folder: Path
    notes: dict

    @property
    def fingerprint(self) -> str:
        return self.notes["fingerprint"]

    @property
    def input_fingerprints(self) -> list[str]:
        return list(dict.fromkeys(self.notes["inputs"].values()))

    @property
    def has_code(self) -> bool:
        """Whether it says what code made it, as it does since fingerprints cover the code."""
        return isinstance(self.notes.get("code"), dict)


class FinishedStages:
    """The finished stages of all runs of a root."""

    def __init__(self, root: Path, run: Path):
        """Args:
        root: the folder that holds all runs.
        run: the folder of this run, whose stages come first.
        """
        self.root = root
        self.run = run
        self.by_fingerprint: dict[str, FinishedStage] = {}
        self.by_recipe: dict[str, FinishedStage] = {}  # of other runs, whatever their code
        self.own: dict[str, FinishedStage] = {}  # this run's, by name
        for folder in sorted(root.glob("*/")):
            self.read_run(folder)

    def read_run(self, run: Path) -> None:
        """Add the finished stages of one run."""
        is_own_run = run.absolute() == self.run.absolute()
        for folder, notes in finished_stages(run):
            stage = FinishedStage(folder, notes)
            self.by_fingerprint.setdefault(stage.fingerprint, stage)
            is_set_aside = folder.parent.name.startswith(".")
            if is_own_run and not is_set_aside:
                self.own[folder.relative_to(run).as_posix()] = stage
            elif stage.has_code:
                key = recipe_key(notes, stage.input_fingerprints)
                self.by_recipe.setdefault(key, stage)

    def add(self, folder: Path, notes: dict) -> None:
        """Add a stage that this run has finished."""
        self.by_fingerprint[notes["fingerprint"]] = FinishedStage(folder, notes)


def recipe_key(recipe: dict, input_fingerprints: Sequence[str]) -> str:
    """What identifies a stage if its code is left out."""
    inputs = list(dict.fromkeys(input_fingerprints))
    parts = [kind_name(recipe), recipe["settings"], recipe["seed"], inputs]
    return json.dumps(parts, sort_keys=True)


def kind_name(recipe: dict) -> str:
    """The kind without its version: "sft" of "sft/1"."""
    return recipe["kind"].partition("/")[0]


class Reuse:
    """Looks for the earlier stage that each stage of a run corresponds to."""

    def __init__(self, finished: FinishedStages, whatever_the_code: bool):
        self.finished = finished
        self.whatever_the_code = whatever_the_code
        self.earlier: dict[str, FinishedStage] = {}  # by the fingerprint of the stage of today

    def fingerprint(self, name: str, recipe: dict, of_today: str) -> str:
        """The fingerprint of the stage to take or to compute; remembers the earlier stage.

        Args:
            recipe: with the fingerprints of the inputs that this run has or will have.
            of_today: the recipe's own fingerprint.
        """
        if of_today in self.finished.by_fingerprint:
            return of_today

        # --- The earlier stage that it corresponds to
        if of_today not in self.earlier:
            earlier = self.find_earlier(name, recipe)
            if earlier is None:
                return of_today
            self.earlier[of_today] = earlier
        earlier = self.earlier[of_today]

        # --- Whether that one is taken in its place
        if self.whatever_the_code and may_stand_for(earlier, name, recipe, self.finished):
            self.earlier[earlier.fingerprint] = earlier
            return earlier.fingerprint
        return of_today

    def find_earlier(self, name: str, recipe: dict) -> FinishedStage | None:
        """The stage of this name in the run's folder, else another run's with the same settings."""
        if name in self.finished.own:
            return self.finished.own[name]
        # Its inputs, too, may correspond to earlier stages, which it was then made of
        inputs = []
        for fingerprint in recipe["inputs"]:
            if fingerprint in self.earlier:
                fingerprint = self.earlier[fingerprint].fingerprint
            inputs.append(fingerprint)
        return self.finished.by_recipe.get(recipe_key(recipe, inputs))


def may_stand_for(
    earlier: FinishedStage, name: str, recipe: dict, finished: FinishedStages
) -> bool:
    """Whether run.reuse=all takes an earlier stage for this recipe: only the code may differ.

    Within the run's own folder a setting may have been added since: the folder's config.toml says
    that it is at its default.
    """
    notes = earlier.notes
    if not earlier.has_code or kind_name(notes) != kind_name(recipe):
        return False
    if notes["seed"] != recipe["seed"]:
        return False

    settings = as_stored(recipe["settings"])
    if finished.own.get(name) is earlier:
        for added in settings.keys() - notes["settings"].keys():
            del settings[added]
    if notes["settings"] != settings:
        return False

    inputs = list(dict.fromkeys(recipe["inputs"]))
    return earlier.input_fingerprints == inputs


def as_stored(settings: dict) -> dict:
    """Settings as they come back from stage.json: tuples have become lists."""
    return json.loads(json.dumps(settings))


# --- What has changed


@dataclass(frozen=True, slots=True)
class Changes:
    """How stages differ from earlier ones, in words; without any, only their inputs may differ."""

    modules: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # settings, versions and files

    def __bool__(self) -> bool:
        return bool(self.modules or self.others)

    def sentence(self) -> str:
        """ "core/losses.py has changed", "core/losses.py and 2 more modules have changed, ..." """
        parts = []
        if self.modules:
            verb = "have" if len(self.modules) > 1 else "has"
            parts.append(f"{enumeration(self.modules)} {verb} changed")
        parts += self.others[:SHOWN]
        return ", ".join(parts)


def enumeration(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b, c, d and 3 more"."""
    shown = list(words[:SHOWN])
    if len(words) > SHOWN:
        shown.append(f"{len(words) - SHOWN} more")
    if len(shown) == 1:
        return shown[0]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def changes_since(earlier: FinishedStage, recipe: dict, inputs: Iterable[Stage]) -> Changes:
    """What differs between an earlier stage and the recipe of today, its inputs' content apart."""
    notes = earlier.notes
    if not earlier.has_code:
        made = "minmacpo has changed (their version did not record the code that made them)"
        return Changes(others=(made,))

    others = []
    if notes["kind"] != recipe["kind"]:
        others.append(f"{notes['kind']} has become {recipe['kind']}")
    if notes["seed"] != recipe["seed"]:
        others.append("the key of a seed has changed")
    others += changed_settings(notes["settings"], as_stored(recipe["settings"]))
    for stage in inputs:
        recorded = notes["inputs"].get(stage.name)
        if stage.external and recorded not in (None, stage.fingerprint):
            others.append(f"the files in {stage.path} have changed")
    modules = changed_modules(notes["code"], recipe["code"])
    return Changes(modules, tuple(others))


def changed_modules(before: dict[str, str], now: dict[str, str]) -> tuple[str, ...]:
    """The modules whose code differs; those that came or went only where no other one differs."""
    modules = [module for module in now if module in before and now[module] != before[module]]
    if not modules:
        modules = sorted(before.keys() ^ now.keys())
    return tuple(modules)


def changed_settings(before: dict, now: dict) -> list[str]:
    """One phrase for every setting that differs: "the setting beta has changed from 0.1 to 0.2"."""
    phrases = []
    for key in sorted(before.keys() | now.keys()):
        if key not in before:
            phrases.append(f"the setting {key} has been added ({shortened(now[key])})")
        elif key not in now:
            phrases.append(f"the setting {key} has been removed ({shortened(before[key])})")
        elif before[key] != now[key]:
            old = shortened(before[key])
            new = shortened(now[key])
            phrase = f"the setting {key} has changed"
            if old != new:  # long values may differ beyond what is shown of them
                phrase += f" from {old} to {new}"
            phrases.append(phrase)
    return phrases


def shortened(value) -> str:
    """A setting's value for a line."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= LONGEST_VALUE:
        return text
    return text[:LONGEST_VALUE] + "..."


def merged(all_changes: Iterable[Changes]) -> Changes:
    """All that differs, each thing once."""
    modules: set[str] = set()
    others: dict[str, None] = {}  # a set that keeps the order
    for changes in all_changes:
        modules.update(changes.modules)
        others.update(dict.fromkeys(changes.others))
    return Changes(tuple(sorted(modules)), tuple(others))


# --- What no longer fits


def stale_stages(finished: FinishedStages, plan: dict[str, Stage], changed: set[str]) -> list[str]:
    """Names of the run's own stages that other code, settings or files made than today's.

    A stage follows its inputs: it is stale if one of them is, or has been computed anew since. One
    that is not in the plan (a method may end earlier than planned) is judged by its code.

    Args:
        changed: the stages of the plan that differ from their recipe.
    """
    verdicts: dict[str, bool] = {}

    def is_stale(name: str) -> bool:
        if name not in verdicts:
            verdicts[name] = False  # a stage cannot depend on itself; damaged notes could say so
            verdicts[name] = judge(name)
        return verdicts[name]

    def judge(name: str) -> bool:
        # --- By itself
        stage = finished.own[name]
        planned = plan.get(name)
        if planned and planned.fingerprint == stage.fingerprint:
            return False
        if name in changed or not stage.has_code:
            return True
        if not planned and code_has_changed(stage):
            return True

        # --- By its inputs
        for input_name, fingerprint in stage.notes["inputs"].items():
            source = finished.own.get(input_name)
            if source and (source.fingerprint != fingerprint or is_stale(input_name)):
                return True
            if not source and input_name in plan and plan[input_name].fingerprint != fingerprint:
                return True
        return False

    return [name for name in finished.own if is_stale(name)]


def code_has_changed(stage: FinishedStage) -> bool:
    """Whether a module that made a stage is another one today."""
    for module, digest in stage.notes["code"].items():
        if module_digest_or_none(module) != digest:
            return True
    return False
