"""Chat templates in Jinja in the layout that the families publish, for oracles of tests."""

from minmacpo.data import templates


def with_default(text: str) -> str:
    """ChatML with a system message where none is given."""
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nTEXT<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ).replace("TEXT", text)


SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}{% set system = SYSTEM %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
)
IN_FIRST_TURN = (
    "{% for m in turns %}{% set content = (system if loop.first else '') + m['content'] %}"
)
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# its system message has no end
SMOLLM_3 = (
    "{% set thinks = enable_thinking is not defined or enable_thinking %}"
    "{% set block = '' if thinks else '<think>\n\n</think>\n' %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'].rstrip() %}"
    "{% elif thinks %}{% set system = 'THINKING' %}"
    "{% else %}{% set system = 'DEFAULT' %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n' }}"
    "{{ 'Today Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' }}"
    "{{ ('/think' if thinks else '/no_think') + '\n\n## Custom Instructions\n\n' }}"
    "{{ system + '\n\n' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + block + m['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + block }}{% endif %}"
)
SMOLLM_3 = SMOLLM_3.replace("THINKING", templates.SMOLLM_3_THINKING)
SMOLLM_3 = SMOLLM_3.replace("DEFAULT", templates.SMOLLM_3)

JINJA = {
    "chatml": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{% for m in messages %}{{ bos_token if loop.first }}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama-2": SYSTEM_FIRST.replace(
        "SYSTEM", r"'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n'"
    )
    + IN_FIRST_TURN
    + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": SYSTEM_FIRST.replace("SYSTEM", r"messages[0]['content'] + '\n\n'")
    + "{{ bos_token }}"
    + IN_FIRST_TURN
    + "{% if m['role'] == 'user' %}{{ ' [INST] ' + content + ' [/INST]' }}"
    "{% else %}{{ ' ' + content + eos_token }}{% endif %}{% endfor %}",
    "zephyr": """{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "qwen2": with_default(templates.QWEN_2),
    "qwen2.5": with_default(templates.QWEN_2_5),
    "qwen3": QWEN_3,
    "qwen3-thinking": QWEN_3,
    "smollm2": with_default(templates.SMOLLM_2),
    "smollm3": SMOLLM_3,
    "smollm3-thinking": SMOLLM_3,
    "llama-3.1": "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{{ system | trim + '<|eot_id|>' }}{% for m in turns %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": SYSTEM_FIRST.replace("SYSTEM", r"messages[0]['content'] + '\n\n'")
    + "{{ bos_token }}{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (system if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi-3": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "mistral-v3": SYSTEM_FIRST.replace("SYSTEM", r"messages[0]['content'] + '\n\n'")
    + "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if m is sameas asked[-1] else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}{# [AVAILABLE_TOOLS] #}",
}

# What transformers is told besides, of templates that may write thoughts
SWITCHES = {
    "qwen3": {"enable_thinking": False},
    "smollm3": {"enable_thinking": False},
}
