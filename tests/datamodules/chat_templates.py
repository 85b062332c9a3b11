"""Chat templates in the manner of well-known ones, shortened, and a tokenizer that has their marks as tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers_of_kinds import byte_level, wrap

MARKS = [
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|bos|>", "<|User|>", "<|Assistant|>", "<|eos|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
    "<|eom_id|>",
]  # fmt: skip


class Template(NamedTuple):
    """A template, what it makes of the question Q and the answer A, and the token that ends the answer."""

    template: str
    prompt: str
    answer: str
    end: str


def tokenizer(template: str | None, eos: str = "</s>", marks: list[str] = MARKS) -> Any:
    """A byte-level tokenizer with the marks of all templates and think tags that are no special tokens."""
    made = wrap(byte_level())
    made.add_special_tokens({"additional_special_tokens": marks})
    made.add_tokens(["<think>", "</think>"])
    made.eos_token = eos
    made.chat_template = template
    return made


GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ ('<|begin_of_text|>' if loop.first else '') + '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>' + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
DEEPSEEK = (
    "{{ '<|bos|>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{% set said = m['content'].split('</think>')[-1] %}{{ '<|Assistant|>' + said + '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
R1 = DEEPSEEK.replace("{{ '<|Assistant|>' }}{% endif %}", "{{ '<|Assistant|><think>\n' }}{% endif %}")
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set said = m['content'] %}{% set thought = '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2.5's form of calls and of what tools return, and Llama 3.1's, whose calls have an end of their own.
QWEN_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for call in m['tool_calls'] %}{% set f = call['function'] %}"
    "{{ '<tool_call>\n{\"name\": \"' + f['name'] + '\", \"arguments\": ' + (f['arguments'] | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_TOOLS = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m['role'] == 'tool' else"
    " m['role']) + '<|end_header_id|>\n\n' }}{% if m['tool_calls'] %}{% set f = m['tool_calls'][0]['function'] %}"
    "{{ '{\"name\": \"' + f['name'] + '\", \"parameters\": ' + (f['arguments'] | tojson) + '}<|eom_id|>' }}"
    "{% elif m['role'] == 'tool' %}{{ (m['content'] | tojson) + '<|eot_id|>' }}{% else %}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {
    "gemma": Template(
        GEMMA,
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
        "A<end_of_turn>",
        "<end_of_turn>",
    ),
    "llama3": Template(
        LLAMA3,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A<|eot_id|>",
        "<|eot_id|>",
    ),
    "chatml": Template(
        CHATML,
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "A<|im_end|>",
        "<|im_end|>",
    ),
    "llama2": Template(LLAMA2, "<s>[INST] Q [/INST]", " A </s>", "</s>"),
    "phi": Template(PHI, "<|user|>\nQ<|end|>\n<|assistant|>\n", "A<|end|>", "<|end|>"),
    "zephyr": Template(ZEPHYR, "<|user|>\nQ</s>\n<|assistant|>\n", "A</s>", "</s>"),
    "deepseek": Template(DEEPSEEK, "<|bos|><|User|>Q<|Assistant|>", "A<|eos|>", "<|eos|>"),
    "qwen3": Template(
        QWEN3,
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nA<|im_end|>",
        "<|im_end|>",
    ),
    "harmony": Template(
        HARMONY,
        "<|start|>user<|message|>Q<|end|><|start|>assistant",
        "<|channel|>final<|message|>A<|return|>",
        "<|return|>",
    ),
    "no_generation_prompt": Template(
        NO_PROMPT, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>", "<|im_end|>"
    ),
    "vicuna": Template(VICUNA, "USER: Q ASSISTANT:", " A</s>", "</s>"),
    "marked": Template(MARKED, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>", "<|im_end|>"),
}
