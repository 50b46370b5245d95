"""Chat templates of the shapes that models bring: what they do with a message, what they write around it."""

from typing import Any

from sparsemm_edge.runtime.chat_template import Turn, render_turns

LLAMA_3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content.strip() }}"
    " ASSISTANT:{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if 'image' in part or part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m.role %}{% endif %}{{ '<start_of_turn>' + role + '\n' }}{% if m.content is string %}"
    "{{ m.content | trim }}{% elif m.content is iterable %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for part in m.content %}{% if part.type == 'image' %}"
    "<image>\n{% endif %}{% endfor %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# of a reply only the text is taken, of a question only the parts
MIXED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% else %}{{ '=' + m.content + ';' }}{% endif %}"
    "{% endfor %}"
)

HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
# template: whether it strips a message, the first prompt and a later one, with @ for images and question
SHAPES = {
    "llama-3": (
        LLAMA_3,
        True,
        f"<s>{HEADER.format('user')}@<|eot_id|>{HEADER.format('assistant')}",
        f"<|eot_id|>{HEADER.format('user')}@<|eot_id|>{HEADER.format('assistant')}",
    ),
    "mistral": (MISTRAL, False, "<s>[INST] @ [/INST]", "</s>[INST] @ [/INST]"),
    "vicuna": (VICUNA, True, "<s>A chat. USER: @ ASSISTANT:", "</s>USER: @ ASSISTANT:"),
    "chatml": (
        CHATML,
        False,
        "<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen": (
        QWEN,
        False,
        "<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (
        GEMMA,
        True,
        "<s><start_of_turn>user\n@<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n<start_of_turn>user\n@<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek": (DEEPSEEK, False, "<s><|User|>@<|Assistant|>", "</s><|User|>@<|Assistant|>"),
    "llava": (LLAVA, False, "USER: @ ASSISTANT:", " USER: @ ASSISTANT:"),
    "mixed": (MIXED, False, "@", ";@"),
}
IMAGES = {"qwen": "<M>", "mixed": "<M>"}  # the others: a marker and a line end


def render(template: str, prompt: str, n_images: int, *, system: str | None = None, **options: Any) -> str:
    """render_turns of one user message, and a system message before it."""
    turns = [] if system is None else [Turn("system", system)]
    return render_turns(template, [*turns, Turn("user", prompt, n_images)], **options)
