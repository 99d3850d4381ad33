"""The decoder against transformers' Llama: values, gradients, cache, padding, real weights."""

import json

import pytest
import torch
from conftest import config_of, far, logits_of, ragged, random_model

from minmacpo import UserError
from minmacpo.core.checkpoint import load_model
from minmacpo.core.model_config import parse_config
from minmacpo.core.sampling import SamplingParams, generate

SHAPES = {  # heads, key heads, head_dim, hidden, mlp, layers, vocab, theta, eps, tied
    "grouped": (4, 2, 10, 24, 40, 2, 61, 1e4, 1e-5, False),
    "one key head, tied": (6, 1, 4, 30, 22, 1, 47, 5e5, 1e-6, True),
    "no grouping": (3, 3, 6, 18, 50, 3, 33, 1e6, 1e-3, False),
    "narrow heads, tied": (8, 4, 2, 24, 12, 2, 70, 123.0, 1e-5, True),
    "wide head": (1, 1, 32, 12, 16, 1, 29, 1e4, 1e-2, False),
}


@pytest.fixture(params=SHAPES)
def hf(request, seed, tmp_path):
    """(transformers' model with random weights, the folder it saved)."""
    transformers = pytest.importorskip("transformers")
    heads, keys, dim, hidden, mlp, layers, vocab, theta, eps, tied = SHAPES[request.param]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=dim,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(tmp_path)
    return model, tmp_path


# ---- against transformers -------------------------------------------------------------------


def test_logits_and_every_gradient_equal_transformers(hf):
    theirs, folder = hf
    ours = load_model(folder)
    tokens = torch.randint(0, ours.config.vocab_size, (3, 41))
    a, b = logits_of(ours, tokens), theirs(tokens).logits
    assert b.std() > 0.1, "the oracle's logits are too flat to prove anything"
    assert far(a, b) <= 1e-5
    direction = torch.randn_like(a) / a.numel() ** 0.5
    ours.requires_grad_(True)
    (a := logits_of(ours, tokens)).backward(direction)
    b.backward(direction)
    wanted = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(wanted)
    for name, weight in ours.named_parameters():
        scale = 1 + wanted[name].grad.abs().max().item()
        assert far(weight.grad, wanted[name].grad) <= 1e-5 * scale, name
        assert wanted[name].grad.abs().max() > 0, name


def test_greedy_decoding_equals_transformers(hf, seed):
    theirs, folder = hf
    ours = load_model(folder)
    prompt = ragged(seed, 1, ours.config.vocab_size)[0]
    mine = greedy(ours, [prompt], 12)[0]
    kwargs = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    found = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        **kwargs,
    )
    found = found[0, len(prompt) :].tolist()
    for step, (a, b) in enumerate(zip(mine, found, strict=True)):
        if a != b:  # only where the two best logits are equal within rounding may they part
            logits = theirs(torch.tensor([prompt + found[:step]])).logits[0, -1]
            assert logits[b] - logits[a] < 2e-5, (step, a, b)
            break


@pytest.mark.parametrize(
    "absent",
    [
        "rms_norm_eps",
        "rope_parameters",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "hidden_act",
    ],
)
def test_a_field_left_out_means_what_transformers_takes_it_for(absent, seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.device("cpu"):
        made = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(0.01)  # so small that the norm's epsilon matters
    made.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop(absent)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 40, (2, 30))
    assert far(logits_of(load_model(tmp_path), tokens), theirs(tokens).logits) <= 1e-5


def test_the_older_spelling_of_config_json_is_read(hf):
    theirs, folder = hf
    raw = json.loads((folder / "config.json").read_text())
    raw |= {
        "rope_theta": raw.pop("rope_parameters")["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": raw.pop("dtype"),
    }
    (folder / "config.json").write_text(json.dumps(raw))
    tokens = torch.randint(0, raw["vocab_size"], (2, 30))
    assert far(logits_of(load_model(folder), tokens), theirs(tokens).logits) <= 1e-5


# ---- cache and padding ----------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decoding_with_the_cache_equals_the_full_forward(kv_heads, seed):
    model = random_model(seed, num_key_value_heads=kv_heads)
    rows = ragged(seed, 5, 61)
    more = ragged(seed + 1, 5, 61, 9, 10)
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    padded = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    cache = model.new_cache(5, width + 9)
    hidden = model(padded, cache=cache)[torch.arange(5), lengths - 1]
    alive = list(range(5))
    for step in range(9):
        for place, row in enumerate(alive):
            whole = model(torch.tensor([rows[row] + more[row][:step]]))[0, -1]
            assert far(hidden[place], whole) <= 1e-5, (step, row)
        if step == 4:  # rows that have ended are dropped from the cache
            alive = [0, 3, 4]
            cache = cache.select_rows(torch.tensor(alive))
        new = torch.tensor([[more[row][step]] for row in alive])
        hidden = model(new, positions=lengths[alive] + step, cache=cache)[:, 0]


def test_padding_at_the_right_changes_nothing(seed):
    model = random_model(seed)
    row = ragged(seed, 1, 61, 5, 20)[0]
    alone = logits_of(model, torch.tensor([row]))
    for junk in (0, 1, 60):
        padded = logits_of(model, torch.tensor([row + [junk] * 13, [junk] * (len(row) + 13)]))
        assert far(padded[0, : len(row)], alone[0]) <= 2e-6 * alone.abs().max()


def test_a_token_sees_the_past_only(seed):
    model = random_model(seed)
    tokens = torch.randint(0, 61, (1, 20))
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 61
    a, b = logits_of(model, tokens)[0], logits_of(model, changed)[0]
    assert far(a[:11], b[:11]) == 0
    assert (a[11:] - b[11:]).abs().amax(-1).min() > 0


def test_the_same_weights_sample_first_and_train_later(seed):
    """What inference mode leaves in the model must not stop a later training (a resumed run)."""
    model = random_model(seed)
    greedy(model, [[5, 6]], 2)
    logits_of(model, torch.tensor([[4, 5, 6]])).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


# ---- real weights ---------------------------------------------------------------------------


def greedy(model, prompts: list[list[int]], new: int) -> list[list[int]]:

    settings = SamplingParams(temperature=0, max_new_tokens=new)
    return generate(model, prompts, list(range(len(prompts))), settings, set())[0]


def test_stories_gives_the_known_text(stories):
    from minmacpo.data.tokenizer import load_tokenizer

    ids = greedy(load_model(stories), [[1]], 200)[0]
    known = (stories / "greedy_200.txt").read_text()
    tokenizer = load_tokenizer(stories)
    assert tokenizer.processor.decode([1, *ids]) == known
    assert tokenizer.decode(ids) == " " + known  # as the continuation of a text, it keeps its space


def test_stories_equals_transformers(stories, seed):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories).eval()
    ours = load_model(stories)
    tokens = torch.randint(0, 512, (4, 100))
    a, b = logits_of(ours, tokens), theirs(tokens).logits
    assert far(a, b) <= 1e-5 * b.abs().max()
    mine = greedy(ours, [[1]], 100)[0]
    kwargs = dict(do_sample=False, max_new_tokens=100, eos_token_id=None, pad_token_id=0)
    assert theirs.generate(torch.tensor([[1]]), **kwargs)[0, 1:].tolist() == mine


def test_stories_ragged_batch_equals_single(stories, seed):
    from minmacpo.data.tokenizer import load_tokenizer

    model, tokenizer = load_model(stories), load_tokenizer(stories)
    texts = ["Once upon a time", "Tom", "One day, a big dog saw a", "The sun was", 'She said, "I']
    prompts = [[1, *tokenizer.encode(text, start=True)] for text in texts] + [[1]]
    assert len({len(prompt) for prompt in prompts}) > 3
    together = greedy(model, prompts, 60)
    assert together == [greedy(model, [prompt], 60)[0] for prompt in prompts]


# ---- what is not understood -----------------------------------------------------------------

SIZES = dict(
    model_type="llama",
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"sliding_window": 4096},
        {"attention_bias": "yes"},
        {"mlp_bias": 2},
        {"hidden_act": "gelu"},
        {"quantization_config": {"bits": 4}},
        {"num_experts": 8},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
        {"rope_parameters": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": 5}},
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        {"rope_parameters": "default"},
        {"rope_theta": "10000"},
        {"rope_theta": -1.0},
        {"rms_norm_eps": None},
        {"num_key_value_heads": 3},
        {"head_dim": 5},
        {"hidden_size": "24"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"vocab_size": 40.0},
        {"hidden_size": True},
    ],
)
def test_a_config_that_is_not_understood_is_refused(changes):
    with pytest.raises(UserError) as caught:
        parse_config(SIZES | changes, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("absent", [name for name in SIZES if name != "num_key_value_heads"])
def test_a_size_that_is_missing_is_refused(absent):
    with pytest.raises(UserError, match=r"here/config\.json"):
        parse_config({k: v for k, v in SIZES.items() if k != absent}, "here/config.json")


def test_what_is_harmless_is_taken():
    plain = parse_config(dict(SIZES), "x")
    harmless = {
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "architectures": ["LlamaForCausalLM"],
        "pad_token_id": 7,
    }
    assert parse_config(SIZES | harmless, "x") == plain
    assert plain.head_dim == 6 and config_of(head_dim=6).head_dim == 6
