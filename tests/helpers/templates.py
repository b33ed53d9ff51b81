"""Chat templates in the manner of model families, shortened, and a tokenizer that puts a token before every text."""

from tokenizers.processors import TemplateProcessing

from neurondrift.models.loading import byte_tokenizer

# Thoughts of the last answer are always written, empty or not; `enable_thinking = false` closes them in the prompt.
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set reasoning = '' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.last or reasoning %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN3_THINKING = QWEN3.replace(
    "<|im_start|>assistant\n{% if enable_thinking", "<|im_start|>assistant\n<think>\n{% if x"
)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = 'never' %}{% endif %}{% endif %}"
    "<|start|>system\n\nToday Date: {{ date_string }}<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n"
    "Reasoning: {{ reasoning_effort | default('medium') }}<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# The prompt opens the thought, and earlier answers are written without theirs.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>")


def begun_tokenizer(template=None, *, also_ends=False, special=()):
    """Bytes behind `<|bos|>`, which the tokenizer itself puts first (and last `<|end|>`, if it also ends texts)."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    if special:
        tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|end|>" if also_ends else "<|bos|> $A",
        special_tokens=[("<|bos|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)],
    )
    tokenizer.chat_template, tokenizer.name_or_path = template, "a tokenizer of tests"
    return tokenizer


def templated(template):
    """The tokenizer of bytes with this chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "a tokenizer of tests"
    return tokenizer
