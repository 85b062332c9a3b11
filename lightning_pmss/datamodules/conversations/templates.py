"""Chat templates by name, for tokenizers that have none of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BOS = "{{ bos_token }}"
_TEXTS_ONLY = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] or m['tool_calls'] %}"
    "{{ raise_exception('it has no form for tools') }}{% endif %}{% endfor %}"
)
_BELOW = "Below is an instruction that describes a task"
_COMPLETE = "Write a response that appropriately completes the request."
TEMPLATES = {
    # OpenAI's; Qwen's and SmolLM's without their default system turn.
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # Meta's Llama 3, whose templates trim.
    "llama3": "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    # Google's Gemma, which has no system turn.
    "gemma": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('it has no system turn') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + m['content'] | trim"
    " + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    # Stanford Alpaca's `train.py`: another first sentence where there is an input; a system turn replaces it.
    "alpaca": "{% set paired = messages[0]['input'] %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ m['content'] + '\\n\\n' }}{% elif m['role'] == 'user' %}{% if loop.first %}{{ '"
    + _BELOW
    + "' + (', paired with an input that provides further context. ' if paired else '. ') + '"
    + _COMPLETE
    + "\\n\\n' }}{% endif %}{{ '### Instruction:\\n' }}{% if m['input'] %}{{ m['instruction'] + '\\n\\n### Input:\\n' }}"
    "{{ m['input'] }}{% else %}{{ m['content'] }}{% endif %}{{ '\\n\\n' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '### Response:' }}{% endif %}"
    "{% else %}{{ m['content'] + eos_token + ('' if loop.last else '\\n\\n') }}{% endif %}{% endfor %}",
    # LMSYS's Vicuna 1.1.
    "vicuna": "{% if messages[0]['role'] != 'system' %}{{ 'A chat between a curious user and an artificial intelligence"
    " assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}{% elif m['role'] == 'user' %}"
    "{{ 'USER: ' + m['content'] + ' ' }}{% if not loop.last or add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    # Hugging Face's Zephyr.
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
}
"""What each name means. A beginning-of-sequence token comes in front where the tokenizer itself puts one in front of texts."""

_ENDINGS = (
    "alpaca, vicuna and zephyr end turns in the tokenizer's end-of-sequence token; chatml, llama3 and gemma need their"
    " marks as tokens of the tokenizer"
)


def remedy(option: str) -> str:
    """Return what to type where a template does not fit, with the option that takes one."""
    return f"{option} with one of {', '.join(TEMPLATES)} or a Jinja file ({_ENDINGS})"


REMEDY = remedy("--data.template")
"""What to type where a template of a data module does not fit."""


def use_template(tokenizer: Any, template: str | None, remedy: str = REMEDY) -> str:
    """Give ``tokenizer`` the chat template that is asked for.

    Args:
        tokenizer: A tokenizer of transformers; its ``chat_template`` is set.
        template: A name of `TEMPLATES`, a Jinja file, or null for the tokenizer's own.
        remedy: What to type where there is none, for messages.

    Returns:
        The template in words, for the log.

    Raises:
        ValueError: If there is none, or none of that name.
        FileNotFoundError: If there is no such file.
    """
    name = getattr(tokenizer, "name_or_path", "")
    if template is None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer {name!r} has no chat template, as those of base models, and none is guessed. Give {remedy}."
            )
        return "the tokenizer's chat template"
    if template in TEMPLATES:
        tokenizer.chat_template = _TEXTS_ONLY + (_BOS if _begins(tokenizer) else "") + TEMPLATES[template]
        return f"the template {template!r}"
    path = Path(template).expanduser()
    if not path.is_file():
        kind: type[Exception] = FileNotFoundError if path.suffix or len(path.parts) > 1 else ValueError
        raise kind(f"There is no chat template {template!r}, by name or as a file. Give {remedy}.")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The chat template {path} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    return f"the template of {path}"


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token in front of texts by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
