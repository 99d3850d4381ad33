"""A model's own chat template: found, compared by rendering or by its marks, and said."""

import json
import sys
from pathlib import Path

import pytest
from published_templates import JINJA

from minmacpo.data import own_template as module
from minmacpo.data.own_template import export_warning, own_template, template_warning
from minmacpo.data.templates import TEMPLATES
from minmacpo.data.tokenizer_files import read_chat_template

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def write_template(folder: Path, template: object, place: str = "tokenizer_config.json") -> Path:
    """A folder whose chat template stands in a file of its own, or in tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    notes = dict(ENDS)
    if place == "tokenizer_config.json":
        notes["chat_template"] = template
    else:
        (folder / place).write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture
def without_jinja(monkeypatch):
    """As where jinja2 is not installed."""
    module.run_template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    yield
    module.run_template.cache_clear()


# Of two that are written by one program, the one without thoughts is taken
SAME = {"qwen3-thinking": "qwen3", "smollm3-thinking": "smollm3"}


@pytest.mark.parametrize("name", JINJA)
def test_a_published_template_is_found(name, tmp_path):
    pytest.importorskip("jinja2")
    folder = write_template(tmp_path / "model", JINJA[name])
    assert own_template(folder) == SAME.get(name, name)
    assert template_warning(folder, name) is None
    assert export_warning(folder, name) is None


def test_json_in_a_template_is_written_as_transformers_writes_it(tmp_path):
    """Some write a content so; Jinja's own filter would spell < as in HTML, and all behind it."""
    pytest.importorskip("jinja2")
    asked = JINJA["chatml"].replace("m['content']", "(m['content'] | tojson)")
    assert asked != JINJA["chatml"]
    warning = template_warning(write_template(tmp_path / "model", asked), "chatml")
    assert r"<|im_start|>user\n\"Who are you?\"<|im_end|>" in warning


@pytest.mark.parametrize("name", JINJA)
def test_its_marks_do_where_jinja2_is_missing(name, tmp_path, without_jinja):
    folder = write_template(tmp_path / "model", JINJA[name])
    assert own_template(folder) == SAME.get(name, name)
    assert template_warning(folder, SAME.get(name, name)) is None
    said = template_warning(folder, "vicuna")
    assert f"--data.template={SAME.get(name, name)} " in said and "pip install jinja2" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("qwen2.5", "You are Qwen, created by Alibaba Cloud"),
        ("smollm2", "You are a helpful AI assistant named Smo"),
    ],
)
def test_a_default_system_message_is_a_difference(name, default, tmp_path):
    """One line shows both."""
    pytest.importorskip("jinja2")
    folder = write_template(tmp_path / "model", JINJA[name])
    said = template_warning(folder, "chatml")
    assert len(said.splitlines()) == 1
    assert f'writes "<|im_start|>system\\n{default}' in said
    assert 'data.template = chatml writes "<|im_start|>user\\n' in said
    assert said.endswith(f"--data.template={name} writes as it does")


def test_a_template_of_somebody_else_is_shown_beside_the_nearest(tmp_path):
    pytest.importorskip("jinja2")
    source = JINJA["qwen2.5"].replace("Qwen, created by Alibaba Cloud", "Bob")
    folder = write_template(tmp_path / "model", source)
    assert own_template(folder) == "chatml"
    said = template_warning(folder, "chatml")
    assert "You are Bob" in said and "--data.template" not in said


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_where_a_chat_template_stands(place, tmp_path):
    folder = write_template(tmp_path / "model", JINJA["chatml"], place)
    assert read_chat_template(folder) == JINJA["chatml"]


@pytest.mark.parametrize("form", ["list", "object"])
def test_of_several_the_default_counts(form, tmp_path):
    templates = {"tool_use": JINJA["llama-3"], "default": JINJA["chatml"]}
    if form == "list":
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    folder = write_template(tmp_path / "model", templates)
    assert own_template(folder) == "chatml"


@pytest.mark.parametrize("template", [None, 3, [3], [{"name": "x"}], {"default": 3}, ""])
def test_what_is_no_template_is_none(template, tmp_path):
    folder = write_template(tmp_path / "model", template)
    assert read_chat_template(folder) == ""
    assert own_template(folder) == "plain"
    assert template_warning(folder, "vicuna") is None
    assert "no chat template" in export_warning(folder, "vicuna")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% broken",
    ],
)
def test_a_program_that_fails_or_oversteps_writes_nothing(source, tmp_path):
    """It is run in a sandbox, and compared by its marks after all."""
    pytest.importorskip("jinja2")
    folder = write_template(tmp_path / "model", source + "<|start_header_id|>")
    assert module.run_template(source, "", "", None) is None
    assert own_template(folder) == "llama-3"
    assert "has the marks of llama-3" in template_warning(folder, "plain")


def test_every_template_that_marks_lead_to_is_known():
    assert {name for name, *_ in module.MARKS} <= set(TEMPLATES)
