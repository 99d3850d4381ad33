"""Reward models: a head trained here, transformers' classifiers as oracle, external scores."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from byte_pairs import lacking_bytes
from conftest import far, random_model
from runs import invoke, rows_of
from safetensors.torch import load_file, save_file
from test_chat_template import tokenizer_folder

from minmacpo import UserError
from minmacpo.core.checkpoint import load_classifier
from minmacpo.data.chat_template import Renderer
from minmacpo.data.records import Pair
from minmacpo.data.tokenizer import Tokens, load_tokenizer
from minmacpo.evaluation import reward_model as reward
from minmacpo.evaluation.finished_run import read_run
from minmacpo.runtime.files import read_rows, write_rows

FILE = "model.safetensors"


def save_classifier(folder, config, seed, tokenizer_file, dtype=torch.float32):
    """A random one-label classifier of transformers in a folder, with this tokenizer."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config).to(dtype).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return model


def llama_config(**settings):
    return transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        max_position_embeddings=128,
        **{"pad_token_id": 0, "vocab_size": 480} | settings,
    )


def qwen3_config(**settings):
    """Skywork-Reward-V2-Qwen3-0.6B's config.json, smaller."""
    sizes = {
        "vocab_size": 480,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 2,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    return transformers.Qwen3Config(
        architectures=["Qwen3ForSequenceClassification"],
        attention_bias=False,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1000000,
        tie_word_embeddings=True,
        num_labels=1,
        **sizes | settings,
    )


@pytest.fixture
def classifier(tmp_path, tiny, seed):
    folder = tmp_path / "classifier"
    model = save_classifier(folder, llama_config(), seed, tiny / "bases/tokenizer/tokenizer.model")
    return folder, model


@pytest.mark.parametrize("pad", [0, 2, None])
@pytest.mark.parametrize("make_config", [llama_config, qwen3_config])
def test_scores_equal_those_of_transformers(tmp_path, tiny, seed, make_config, pad):
    """Padding may be the end token, and stand at the end of a text or amid it."""
    folder = tmp_path / "classifier"
    oracle = save_classifier(
        folder, make_config(pad_token_id=pad), seed, tiny / "bases/tokenizer/tokenizer.model"
    )
    classifier = load_classifier(folder)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 480, n).tolist() for n in (1, 7, 30, 12)]
    rows += [[*rows[1], 2], [*rows[2][:5], 2, *rows[2][5:], 2], [*rows[3], 2, 2], [2, 2], [2]]
    tokens = [Tokens(ids, [True] * len(ids)) for ids in rows]
    hidden = reward.last_hidden(classifier.model, tokens, 40, classifier.pad_token_id)
    with torch.no_grad():
        wanted = torch.cat([oracle(torch.tensor([ids])).logits[0] for ids in rows])
    assert classifier.pad_token_id == pad
    assert far(hidden @ classifier.head, wanted) < 1e-5


@pytest.mark.slow
def test_a_classifier_of_a_published_size_scores_as_transformers(tmp_path, tiny, seed):
    """Skywork-Reward-V2-Qwen3-0.6B's shape, 596M parameters, stored in bf16, read in fp32."""
    folder = tmp_path / "classifier"
    config = qwen3_config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        pad_token_id=151643,
        eos_token_id=151645,
    )
    tokenizer_file = tiny / "bases/tokenizer/tokenizer.model"
    save_classifier(folder, config, seed, tokenizer_file, torch.bfloat16)
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    oracle = read(folder, dtype=torch.float32).eval()
    classifier = load_classifier(folder)
    rng = np.random.default_rng(seed)
    rows = [[*rng.integers(0, 151643, n).tolist(), 151645, 198, 151643] for n in (3, 60)]
    tokens = [Tokens(ids, [True] * len(ids)) for ids in rows]
    hidden = reward.last_hidden(classifier.model, tokens, 999, classifier.pad_token_id)
    with torch.no_grad():
        wanted = torch.cat([oracle(torch.tensor([ids])).logits[0] for ids in rows])
    assert far(hidden @ classifier.head, wanted) < 1e-4


def test_a_classifier_runs_as_the_run_says(classifier, tiny):
    run = read_run(tiny)
    settings = replace(run.config.run, dtype="bfloat16")
    run = replace(run, config=replace(run.config, run=settings))
    rater = reward.load_rater(classifier[0], run, template=None)
    assert next(rater.model.parameters()).dtype == torch.bfloat16
    assert rater.max_tokens == settings.max_tokens_per_batch


def test_a_classifier_is_asked_in_its_own_template(classifier, tiny):
    folder = classifier[0]
    own = invoke("eval", "reward", tiny, f"--model={folder}", "--json")
    other = invoke("eval", "reward", tiny, f"--model={folder}", "--template=plain", "--json")
    assert own.code == 0 == other.code
    assert json.loads(own.out)["rows"] != json.loads(other.out)["rows"]
    wrong = invoke("eval", "reward", tiny, f"--model={folder}", "--template=plane")
    assert wrong.code == 2 and "--template=plane" in wrong.err and "plain" in wrong.err
    alone = invoke("eval", "reward", tiny, "--template=plain")
    assert alone.code == 2 and "--model" in alone.err


def test_characters_that_a_classifier_has_no_token_for_are_counted(tmp_path, tiny, seed):
    config = llama_config(vocab_size=900)
    folder = tmp_path / "classifier"
    save_classifier(folder, config, seed, tiny / "bases/tokenizer/tokenizer.model")
    (folder / "tokenizer.model").unlink()
    file = tokenizer_folder(folder, "smollm-2") / "tokenizer.json"
    file.write_text(lacking_bytes(file.read_text(), b"?"))
    ended = invoke("eval", "reward", tiny, f"--model={folder}", "--template=plain")
    assert ended.code == 0, ended.err
    asked = sum(
        message.content.count("?")
        for pair in read_rows(tiny / "data/slices/test.jsonl", Pair)
        for message in pair.prompt
    )
    (count,) = re.findall(rf"WARNING: {file}: has no token for (\d+) characters", ended.err)
    assert int(count) >= asked > 0


def test_a_padding_token_that_is_no_id_is_told(classifier, tiny):
    config_file = classifier[0] / "config.json"
    config = json.loads(config_file.read_text()) | {"pad_token_id": "</s>"}
    config_file.write_text(json.dumps(config))
    ended = invoke("eval", "reward", tiny, f"--model={classifier[0]}")
    assert ended.code == 2 and "pad_token_id" in ended.err


def test_a_classifier_rates_a_run(classifier, tiny):
    ended = invoke("eval", "reward", tiny, f"--model={classifier[0]}", "--json")
    found = json.loads(ended.out)
    assert ended.code == 0 and {row["agent"] for row in found["rows"]} >= {
        "student",
        "teacher1",
        "ceiling",
    }
    assert (
        0
        <= found["accuracy_interval"][0]
        <= found["accuracy"]
        <= found["accuracy_interval"][1]
        <= 1
    )


def test_what_is_stored_beside_the_score(classifier):
    """A head of the base changes nothing, a bias would; two labels are no score."""
    folder, oracle = classifier
    weights = load_file(folder / FILE)
    score = weights["score.weight"]
    kept = {"format": "pt"}
    save_file(weights | {"lm_head.weight": torch.ones(480, 24)}, folder / FILE, metadata=kept)
    assert torch.equal(load_classifier(folder).head, oracle.score.weight[0])
    save_file(weights | {"score.bias": torch.ones(1)}, folder / FILE, metadata=kept)
    with pytest.raises(UserError, match=r"score\.bias"):
        load_classifier(folder)
    save_file(weights | {"score.weight": torch.cat([score, score])}, folder / FILE, metadata=kept)
    with pytest.raises(UserError, match=re.escape("score.weight is [2, 24]")):
        load_classifier(folder)


def test_a_base_is_no_reward_model(tiny):
    ended = invoke("eval", "reward", tiny, f"--model={tiny / 'bases/strong'}")
    assert ended.code == 2 and "no reward model" in ended.err


def test_the_head_minimises_its_loss_and_learns_a_planted_direction(seed):
    torch.manual_seed(seed)
    direction, chosen, rejected = torch.randn(6), torch.randn(400, 6), torch.randn(400, 6)
    swap = ((chosen - rejected) @ direction < 0)[:, None]
    better, worse = torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)
    weight = reward.fit_head(better, worse)
    difference = (better - worse).double().requires_grad_(False)
    probe = weight.clone().requires_grad_(True)
    loss = -torch.nn.functional.logsigmoid(difference @ probe).mean() + 0.005 * probe.square().sum()
    (gradient,) = torch.autograd.grad(loss, probe)
    assert gradient.abs().max() < 1e-4
    assert torch.cosine_similarity(weight, direction.double(), dim=0) > 0.9


def test_the_head_trained_here_ranks_and_says_how_well(tiny):
    ended = invoke("eval", "reward", tiny)
    found = float(re.search(r"held-out accuracy ([\d.]+) \[([\d.]+), ([\d.]+)\]", ended.out)[1])
    assert ended.code == 0 and found > 0.6 and "NOT INFORMATIVE" not in ended.out


def test_an_accuracy_around_one_half_is_called_not_informative(tiny, monkeypatch):
    class Indifferent:
        """Rates all answers the same."""

        renderer = Renderer(load_tokenizer(tiny / "bases/strong"), "turns")

        def __call__(self, texts):
            return np.zeros(len(texts))

    monkeypatch.setattr(reward, "train_reward_model", lambda run, own: Indifferent())
    assert "NOT INFORMATIVE" in invoke("eval", "reward", tiny).out


def test_hidden_states_do_not_depend_on_the_batch(seed):
    model = random_model(seed)
    rows = [Tokens(list(range(3, 3 + n)), [True] * n) for n in (5, 19, 2, 33)]
    assert (
        far(
            reward.last_hidden(model, rows, 10**6),
            torch.cat([reward.last_hidden(model, [r], 50) for r in rows]),
        )
        < 1e-5
    )


def test_external_scores_are_joined_by_id(tiny, tmp_path):
    said = rows_of(tiny / "eval/round1_student_samples/samples.jsonl")
    scores = {row["id"]: float(i) for i, row in enumerate(said)}
    rows = [
        {"id": name, "agent": "student", "round": 1, "score": s, "note": "x"}
        for name, s in reversed(scores.items())
    ]
    write_rows(tmp_path / "scores.jsonl", rows)
    found = json.loads(
        invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}", "--json").out
    )
    (row,) = found["rows"]
    assert (row["agent"], row["round"]) == ("student", 1) and row["score"] == pytest.approx(
        np.mean([*scores.values()])
    )
    twice = [row | {"score": row["score"] + 2} for row in rows]  # a prompt has several answers
    write_rows(tmp_path / "scores.jsonl", rows + twice)
    (again,) = json.loads(
        invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}", "--json").out
    )["rows"]
    assert again["score"] == pytest.approx(row["score"] + 1)
    write_rows(tmp_path / "scores.jsonl", rows[1:])
    ended = invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}")
    assert ended.code == 2 and rows[0]["id"] in ended.err
    (tmp_path / "scores.jsonl").write_text(
        '{"id": "a", "agent": "b", "round": 1, "score": "much"}\n'
    )
    ended = invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}")
    assert ended.code == 2 and "line 1" in ended.err
    write_rows(tmp_path / "scores.jsonl", [{"id": "a", "agent": "nobody", "round": 1, "score": 1}])
    assert invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}").code == 2
    both = invoke(
        "eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}", f"--model={tmp_path}"
    )
    assert both.code == 2 and "expected one of --pairs, --model and --scores" in both.err


@pytest.mark.parametrize(
    "change",
    [
        {"round": 2.0},
        {"round": True},
        {"score": True},
        {"score": None},
        {"score": math.nan},
        {"score": math.inf},
        {"score": 10**400},
        {"score": 1e308},
        {"id": "unknown"},
        {"agent": "nobody"},
        {"round": 99},
        {"id": ["x"]},
    ],
)
def test_a_score_that_is_none_names_its_line(tiny, tmp_path, change):
    said = rows_of(tiny / "eval/round1_student_samples/samples.jsonl")
    rows = [{"id": row["id"], "agent": "student", "round": 1, "score": 1.0} for row in said]
    rows.insert(1, rows[0] | change)
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = invoke("eval", "reward", tiny, f"--scores={tmp_path / 'scores.jsonl'}")
    assert ended.code == 2 and "line 2" in ended.err and ended.err.count("\n") == 1


def test_true_answers_without_worse_ones_are_no_test_of_a_reward_model(tiny, monkeypatch):
    read_split = reward.read_split

    def without_rejected(run, name):
        return [replace(pair, rejected="") for pair in read_split(run, name)]

    monkeypatch.setattr(reward, "read_split", without_rejected)
    ended = invoke("eval", "reward", tiny)
    assert ended.code == 2 and "no worse ones" in ended.err


def test_what_became_of_the_rows_of_own_pairs_is_told(tiny, tmp_path):
    own = [
        {
            "prompt": f"what is the sum of {i} ?",
            "chosen": f"it is {i} .",
            "rejected": "i do not know .",
        }
        for i in range(8)
    ]
    write_rows(
        tmp_path / "own.jsonl", [*own, {"prompt": "why ?", "chosen": "so .", "rejected": "so ."}]
    )
    ended = invoke("eval", "reward", tiny, f"--pairs={tmp_path / 'own.jsonl'}")
    assert (
        ended.code == 0
        and "own: prompt: text, chosen: text, rejected: text; 9 rows, 8 kept; 1 identical answers"
        in ended.out
    )


def test_every_measured_answer_is_rated(tiny):
    run = read_run(tiny)
    found = reward.read_test_answers(run)
    assert len(found) == len(
        [n for n in run.metadata if n.startswith("eval/round") and n.endswith("_samples")]
    )
