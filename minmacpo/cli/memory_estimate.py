"""How much memory the largest forward pass of a stage takes, by hand: counted, not tried out.

The terms are what autograd keeps of model.py and losses.py; a test compares them with every tensor that lives in
a real step, bench/memory.py with the memory of whole stages. All sizes are bytes.
"""

from dataclasses import dataclass

from minmacpo.cli.heap import tuned
from minmacpo.config.schema import LINEARS, Lora
from minmacpo.core.model import CACHE_ALIGN
from minmacpo.core.model_config import ModelConfig
from minmacpo.core.prepack import MAX_WEIGHTS, MIN_WEIGHTS, multiplies_bf16
from minmacpo.kernels.attention import EAGER_BF16_MAX_LEN
from minmacpo.kernels.fused_logps import FP32_CHUNK, SMALL_VOCAB, chunk_size
from minmacpo.kernels.quantization import NF4_BLOCK

HEAP = 32 << 20  # glibc maps no smaller block by itself, but cuts it from its heap


UNUSED = {
    True: 0.45,
    False: 0.85,
}  # of what such blocks hold, the heap holds beside them: as heap.py sets it, and else (glibc 2.36, bench/memory.py)


PROCESS = 85 << 20  # what torch loads with its first model (measured), as the next two


BACKWARD = 23 << 20  # with its first backward pass and optimiser


KERNELS = (
    27 << 20
)  # oneDNN's, of a pass in bf16 (machine.py says how many there are); as many again of a backward pass


@dataclass(frozen=True, slots=True)
class Load:
    """The largest forward pass of a stage. kind: "pretrain" (all weights learn), "train" (the slot learns), "score" or
    "sample". `rows` lie side by side, each `length` tokens with its padding, `scored` of all these reach the head; where padding
    and prompts in common are left out (model.PackedIndex), all but attention is done on `computed` tokens.
    `again`: gradients of an earlier pass of the step are kept. `room`: positions of the cache; `models`: how many;
    `twins`: their linears are packed once more where that pays (packed.py)."""

    kind: str
    rows: int
    length: int
    scored: int
    again: bool = False
    room: int = 0
    models: int = 1
    twins: bool = False
    computed: int | None = None

    @property
    def tokens(self) -> int:
        """That all but attention is done on."""
        return self.rows * self.length if self.computed is None else self.computed


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage holds at its peak: frozen or learning `weights`; the `learning` parameters beside them with
    gradients and moments; `activations`; the `head`'s logits; the `cache` of keys and values."""

    weights: int
    learning: int
    activations: int
    head: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.learning + self.activations + self.head + self.cache


def linear_ends(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{linear of a block: (in, out)}."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    ends = (
        (hidden, query),
        (hidden, key),
        (hidden, key),
        (query, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    )
    return dict(zip(LINEARS, ends, strict=True))


def weight_bytes(config: ModelConfig, size: int, form: str) -> int:
    """Of a frozen base with weights of `size` bytes a number, its linears in `form` (quant.py)."""
    base, _ = parameters(config, Lora())
    if form == "none":
        return size * base
    ends = linear_ends(config).values()
    linears = config.num_hidden_layers * sum(wide * out for wide, out in ends)
    scales = (
        config.num_hidden_layers * sum(out for _, out in ends)
        if form == "int8"
        else linears // NF4_BLOCK
    )
    return size * (base - linears) + (linears if form == "int8" else linears // 2) + 2 * scales


def twin_bytes(config: ModelConfig, size: int, form: str) -> int:
    """Of what packed.pack makes beside a model: its head, and its linears unless they are quantised."""
    linears = (
        config.num_hidden_layers
        * sum(wide * out for wide, out in linear_ends(config).values())
        * (form == "none")
    )
    if not MIN_WEIGHTS <= outside(config) + linears <= MAX_WEIGHTS:
        return 0
    return size * (linears + config.vocab_size * config.hidden_size)


def unpacking(config: ModelConfig, size: int, form: str) -> int:
    """Bytes while the largest linear is multiplied: its weight in the dtype of the products, and what that is made from."""
    largest = max(wide * out for wide, out in linear_ends(config).values())
    return {"none": 0, "int8": size, "nf4": size + 2}[
        form
    ] * largest  # nf4: a half-byte's look-up needs an int32 a byte


def parameters(config: ModelConfig, lora: Lora) -> tuple[int, int]:
    """How many (of the base, of the slot)."""
    hidden, mlp, layers = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
    )
    query, key = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    linears = linear_ends(config)
    each = (
        sum(wide * out for wide, out in linears.values())
        + 2 * hidden
        + 2 * config.head_dim * config.qk_norm
    )
    each += (
        (query + 2 * key) * config.qkv_bias
        + hidden * config.o_bias
        + (2 * mlp + hidden) * config.mlp_bias
    )
    return layers * each + outside(config), layers * lora.r * sum(
        sum(linears[name]) for name in lora.targets
    )


def outside(config: ModelConfig) -> int:
    """How many parameters of the base are in none of its blocks."""
    return (
        config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        + config.hidden_size
    )


def held(config: ModelConfig, size: int, form: str, world: int) -> int:
    """`weight_bytes` that one of `world` ranks holds where they divide a base's blocks: its part of them, two whole ones (the
    one at work and the next), and all that is outside."""
    whole, outer = weight_bytes(config, size, form), size * outside(config)
    return round(whole - (whole - outer) * max(0, 1 - 1 / world - 2 / config.num_hidden_layers))


def kept(config: ModelConfig, lora: Lora | None) -> int:
    """Numbers that a layer keeps of a token for its backward pass, without what attention gets and gives
    (`attended`); `lora` None: every weight learns."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    found = 2 * hidden  # what the norms get
    found += 3 * mlp  # gate, silu(gate) and up, which multiply each other
    found += attended(config) // 2 * config.qk_norm
    if lora is None:  # a weight that learns needs its input, that of a norm the normed input
        return found + 4 * hidden + mlp + attended(config) // 2 * config.qk_norm
    learning = {*lora.targets}
    found += hidden * bool(learning & {"q_proj", "k_proj", "v_proj"}) + hidden * bool(
        learning & {"gate_proj", "up_proj"}
    )
    return found + mlp * ("down_proj" in learning) + lora.r * len(learning)


def attended(config: ModelConfig) -> int:
    """Numbers that attention gets and gives for a token, padding and prompts in common too: query, key, value, their mean."""
    return 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)


def of_logits(count: int, config: ModelConfig, size: int, device: str) -> int:
    """Bytes of so many logits and of what is made of them, under a frozen head (losses.take_exponentials)."""
    if config.vocab_size <= SMALL_VOCAB:
        return 8 * count
    return size * count + 4 * (min(count, FP32_CHUNK) if device == "cpu" else count) * (size < 4)


def crossed(config: ModelConfig, lora: Lora, size: int, scores: int) -> int:
    """Numbers (of `size` bytes) a token that are there at most while a layer is crossed and nothing is kept: in its MLP
    (gate, up, their product; a slot gives a sum of two), in a norm that computes in fp32, or in its attention, where
    queries turn, or where its `scores` (0: they are never all there) become their softmax."""
    query, key = (
        n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    mlp = config.intermediate_size * (3 + ("up_proj" in lora.targets))
    norm = 5 * config.hidden_size * (size < 4)
    return 2 * config.hidden_size + max(
        mlp, norm, config.hidden_size + 4 * query + 2 * key + 2 * scores
    )


def need(
    load: Load,
    config: ModelConfig,
    lora: Lora,
    size: int,
    form: str = "none",
    world: int = 1,
    device: str = "cpu",
) -> Need:
    """What a pass of this load holds at its peak, in a model with weights of `size` bytes a number, its linears in `form` (a base
    that is being pre-trained is not quantised), its blocks divided among `world` ranks. Gradients of all weights appear while the activations go: the larger of
    the two counts, unless `again`."""
    (base, slot), weights, unpacked = (
        parameters(config, lora),
        held(config, size, form, world),
        unpacking(config, size, form),
    )
    tokens, places, chunk = (
        load.tokens,
        load.rows * load.length,
        min(load.scored, chunk_size(config.vocab_size, device)) * config.vocab_size,
    )
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    small = (
        device == "cpu" and size < 4 and load.length <= EAGER_BF16_MAX_LEN
    )  # its bf16 attention then has all its scores
    scores = load.length * config.num_attention_heads * small
    if load.kind in ("score", "sample"):
        moving, passing = (
            size * tokens * hidden,
            size * tokens * crossed(config, lora, size, scores) + unpacked,
        )
        twins = twin_bytes(config, size, form) * load.twins
        room = load.room + -load.room % CACHE_ALIGN * (size == 4) * bool(
            twins
        )  # its cache lies by coordinate
        cache = 2 * layers * load.rows * room * config.num_key_value_heads * config.head_dim
        head = (
            of_logits(chunk, config, size, device)
            if load.kind == "score"
            else 20 * load.rows * config.vocab_size
        )
        return Need(
            (weights + twins) * load.models,
            4 * slot * load.models,
            moving + max(passing, head) - head,
            head,
            2 * cache * size * load.models,
        )
    full = load.kind == "pretrain"
    freed = mlp * (
        full or "down_proj" in lora.targets
    )  # what down_proj kept goes before the rest comes
    passing = (
        size * tokens * (3 * mlp - freed + 2 * hidden) + unpacked
    )  # back through the last layer's MLP
    if places > tokens:  # or through its attention, when what the MLP kept has gone
        passing = max(passing, size * (places * 3 * attended(config) // 2 - tokens * 3 * mlp))
    each = kept(config, None if full else lora)
    stats = 4 * layers * places * config.num_attention_heads  # fp32: logsumexp of attention
    inside = size * places * layers * (attended(config) + scores)
    stored = (
        size * tokens * (layers * each + 2 * hidden)
        + inside
        + stats
        + 2 * size * load.scored * hidden
    )
    head = 16 * chunk if full else of_logits(chunk, config, size, device)
    if full:
        gradients = 4 * base
        worked = stored + max(passing, head) - head
        spare = gradients if load.again else max(0, gradients - worked - head)
        return Need(size * base, 8 * base + spare, worked, head, 0)
    low = size * slot if size < 4 else 0  # the slot in the base's dtype
    return Need(weights, 16 * slot, stored + low + max(passing, head) - head, head, 0)


def beside(load: Load, config: ModelConfig, size: int, found: Need) -> int:
    """What a process on a CPU holds beside the tensors of a pass: libraries, kernels, and the part of glibc's heap that is free but
    taken: an aligned block that is freed has no room for the next of its size where what was cut off to align it has been given
    away, which is rarer as heap.py sets it. Larger blocks are mapped, and given back."""
    learns, block = load.kind in ("pretrain", "train"), size * load.tokens
    fixed = PROCESS + learns * BACKWARD + (1 + learns) * KERNELS * (size < 4 and multiplies_bf16())
    if block * config.hidden_size >= HEAP:
        return fixed
    mlp, others = (
        3 * config.intermediate_size,
        7 * config.hidden_size,
    )  # numbers a token, about, that a layer makes
    share = 1 if block * config.intermediate_size < HEAP else others / (mlp + others)
    return fixed + max(
        0, round(UNUSED[tuned()] * share * (found.activations + found.head)) - found.cache // 2
    )
