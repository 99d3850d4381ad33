"""The decoder against transformers' Llama: values, gradients, cache, padding, real weights."""

import json

import pytest
import torch
from conftest import far, logits_of, ragged, random_model

from minmacpo.core.checkpoint import load_model
from minmacpo.core.sampling import SamplingParams, generate

SHAPES = {
    "grouped": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        vocab_size=61,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "one key head, tied": dict(
        num_attention_heads=6,
        num_key_value_heads=1,
        head_dim=4,
        hidden_size=30,
        intermediate_size=22,
        num_hidden_layers=1,
        vocab_size=47,
        rope_theta=5e5,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    "no grouping": dict(
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=6,
        hidden_size=18,
        intermediate_size=50,
        num_hidden_layers=3,
        vocab_size=33,
        rope_theta=1e6,
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
    ),
    "narrow heads, tied": dict(
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=2,
        hidden_size=24,
        intermediate_size=12,
        num_hidden_layers=2,
        vocab_size=70,
        rope_theta=123.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "wide head": dict(
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        vocab_size=29,
        rope_theta=1e4,
        rms_norm_eps=1e-2,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(params=SHAPES)
def hf(request, seed, tmp_path):
    """transformers' model with random weights, and the folder it was saved in."""
    transformers = pytest.importorskip("transformers")
    shape = dict(SHAPES[request.param])
    rope = {"rope_theta": shape.pop("rope_theta"), "rope_type": "default"}
    config = transformers.LlamaConfig(
        **shape, rope_parameters=rope, max_position_embeddings=64, initializer_range=0.2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def greedy(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest tokens after every prompt."""
    settings = SamplingParams(temperature=0.0, max_new_tokens=new_tokens)
    return generate(model, prompts, range(len(prompts)), settings, set())[0]


def greedy_of_transformers(model, prompt: list[int], new_tokens: int) -> list[int]:
    """The same of one prompt by transformers' generate."""
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


# ---- against transformers -----------------------------------------------------------------------


def test_logits_and_every_gradient_equal_transformers(hf):
    theirs, folder = hf
    ours = load_model(folder).requires_grad_(True)
    tokens = torch.randint(0, ours.config.vocab_size, (3, 41))

    our_logits = logits_of(ours, tokens)
    their_logits = theirs(tokens).logits

    assert their_logits.std() > 0.1, "the oracle's logits are too flat to prove anything"
    assert far(our_logits, their_logits) <= 1e-5
    upstream = torch.randn_like(our_logits) / our_logits.numel() ** 0.5
    our_logits.backward(upstream)
    their_logits.backward(upstream)
    their_params = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(their_params)
    for name, param in ours.named_parameters():
        grad = their_params[name].grad
        largest = grad.abs().max().item()
        assert far(param.grad, grad) <= 1e-5 * (1 + largest), name
        assert largest > 0, name


def test_greedy_decoding_equals_transformers(hf, seed):
    theirs, folder = hf
    ours = load_model(folder)
    prompt = ragged(seed, 1, ours.config.vocab_size)[0]

    our_tokens = greedy(ours, [prompt], 12)[0]
    their_tokens = greedy_of_transformers(theirs, prompt, 12)

    for step, (ours_next, theirs_next) in enumerate(zip(our_tokens, their_tokens, strict=True)):
        if ours_next != theirs_next:
            # only where the two best logits are equal within rounding may they part
            before = torch.tensor([prompt + their_tokens[:step]])
            logits = theirs(before).logits[0, -1]
            assert logits[theirs_next] - logits[ours_next] < 2e-5, step
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
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.01)  # so small that the norm's epsilon matters
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw[absent]
    (tmp_path / "config.json").write_text(json.dumps(raw))

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 40, (2, 30))
    assert far(logits_of(load_model(tmp_path), tokens), theirs(tokens).logits) <= 1e-5


def test_the_older_spelling_of_config_json_is_read(hf):
    theirs, folder = hf
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw["rope_scaling"] = None
    raw["torch_dtype"] = raw.pop("dtype")
    (folder / "config.json").write_text(json.dumps(raw))

    tokens = torch.randint(0, raw["vocab_size"], (2, 30))
    assert far(logits_of(load_model(folder), tokens), theirs(tokens).logits) <= 1e-5


# ---- cache and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decoding_with_the_cache_equals_the_full_forward(kv_heads, seed):
    model = random_model(seed, num_key_value_heads=kv_heads)
    prompts = ragged(seed, 5, 61)
    answers = ragged(seed + 1, 5, 61, 9, 10)  # nine tokens each
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    padded = torch.tensor([prompt + [7] * (longest - len(prompt)) for prompt in prompts])

    cache = model.new_cache(5, longest + 9)
    hidden = model(padded, cache=cache)[torch.arange(5), lengths - 1]
    running = [0, 1, 2, 3, 4]
    for step in range(9):
        for place, row in enumerate(running):
            whole = torch.tensor([prompts[row] + answers[row][:step]])
            assert far(hidden[place], model(whole)[0, -1]) <= 1e-5, (step, row)
        if step == 4:  # rows that have ended are dropped from the cache
            running = [0, 3, 4]
            cache = cache.select_rows(torch.tensor(running))
        tokens = torch.tensor([[answers[row][step]] for row in running])
        hidden = model(tokens, positions=lengths[running] + step, cache=cache)[:, 0]


def test_padding_at_the_right_changes_nothing(seed):
    model = random_model(seed)
    row = ragged(seed, 1, 61, 5, 20)[0]
    alone = logits_of(model, torch.tensor([row]))[0]
    for padding in (0, 1, 60):
        tokens = torch.tensor([row + [padding] * 13, [padding] * (len(row) + 13)])
        padded = logits_of(model, tokens)[0, : len(row)]
        assert far(padded, alone) <= 2e-6 * alone.abs().max()


def test_a_token_sees_the_past_only(seed):
    model = random_model(seed)
    tokens = torch.randint(0, 61, (1, 20))
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 61

    before = logits_of(model, tokens)[0]
    after = logits_of(model, changed)[0]

    assert torch.equal(before[:11], after[:11])
    assert (before[11:] - after[11:]).abs().amax(-1).min() > 0


def test_the_same_weights_sample_first_and_train_later(seed):
    """What inference mode leaves in the model must not stop a later training (a resumed run)."""
    model = random_model(seed)
    greedy(model, [[5, 6]], 2)
    logits_of(model, torch.tensor([[4, 5, 6]])).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


# ---- real weights -------------------------------------------------------------------------------


def test_stories_gives_the_known_text(stories):
    from minmacpo.data.tokenizer import load_tokenizer

    tokens = greedy(load_model(stories), [[1]], 200)[0]
    known = (stories / "greedy_200.txt").read_text()
    # as the continuation of a text, it keeps its first space
    assert load_tokenizer(stories).decode(tokens) == " " + known


def test_stories_equals_transformers(stories, seed):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories).eval()
    ours = load_model(stories)
    tokens = torch.randint(0, 512, (4, 100))
    their_logits = theirs(tokens).logits
    assert far(logits_of(ours, tokens), their_logits) <= 1e-5 * their_logits.abs().max()
    assert greedy(ours, [[1]], 100)[0] == greedy_of_transformers(theirs, [1], 100)


def test_stories_ragged_batch_equals_single(stories, seed):
    from minmacpo.data.tokenizer import load_tokenizer

    model = load_model(stories)
    tokenizer = load_tokenizer(stories)
    texts = ["Once upon a time", "Tom", "One day, a big dog saw a", "The sun was", 'She said, "I']
    prompts = [[1, *tokenizer.encode(text, start=True)] for text in texts] + [[1]]
    assert len({len(prompt) for prompt in prompts}) > 3
    alone = [greedy(model, [prompt], 60)[0] for prompt in prompts]
    assert greedy(model, prompts, 60) == alone
