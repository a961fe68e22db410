"""Chat templates of different habits. None of them has {% generation %}."""

from __future__ import annotations

# Marks around every message, and an invitation to answer.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The begin token before every question, no invitation, a complaint where roles do not alternate.
INST = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Names before what is said, no end token anywhere.
NAMES = "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}"
# A preface of its own, and an empty thought in front of the last answer alone.
THINKS = (
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The tokenizer's end token after answers alone, a begin token in front.
ENDS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token }}"
    "{% else %}{{ 'Q: ' + m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
HABITS = {"chatml": CHATML, "inst": INST, "names": NAMES, "thinks": THINKS, "ends": ENDS}

# Templates that cannot be trusted.
SHOUTS = CHATML.replace("m['content']", "m['content'] | upper")
FORGETS = CHATML.replace("in messages", "in messages[-2:]")
SPELLS = CHATML.replace("'\n' + m['content']", "'\n' + (m['content'] | length | string) + m['content']")
BEGINS_ANSWERS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ bos_token + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
