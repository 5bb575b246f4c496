"""Chats with functions, and templates that write these in the places where the well-known ones do."""

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_SYSTEM = "{% if tools %}{{ '<|im_start|>system\n# Tools\n' + (tools | tojson) + '\nCall one as JSON.<|im_end|>\n' }}{% endif %}" + TURNS
# as Llama 3.1: a line at the very beginning, and the rest behind the system message
IN_USER = (
    "{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{{ '<|im_start|>user\n' }}{% if tools %}{{ 'Given these functions, answer with a call of one.\n\n' + (tools | tojson) + '\n\n' }}{% endif %}"
    "{{ messages[1].content + '<|im_end|>\n<|im_start|>assistant\n' }}"
)
# none at all without functions, for some messages
ONLY_WITH = "{% if not tools and 'rules' in messages[0].content %}{{ raise_exception('there are no functions') }}{% endif %}" + IN_SYSTEM
# another prompt altogether
ELSEWHERE = "{% if tools %}{{ '## Task\n' + (tools | tojson) + messages[-1].content }}{% else %}" + TURNS + "{% endif %}"


def function(name):
    fields = {f"{name}_{i}": {"type": "string", "description": f"the field {i} of {name}"} for i in range(4)}
    return {"type": "function", "function": {"name": name, "description": "Do it.", "parameters": {"type": "object", "properties": fields}}}


TOOLS = [function("alpha"), function("beta")]
MESSAGES = [{"role": "system", "content": "Some rules. " * 40}, {"role": "user", "content": "A long text. " * 250 + "And what of it?"}]
