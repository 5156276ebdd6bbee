"""Short chat templates that behave as those of well-known models do, in the points that laying out depends on."""

CHATML = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Without a word for add_generation_prompt.
UNPROMPTED = CHATML[: CHATML.index("\n{%- if add")]

# Contents are trimmed, the date is today's, tools are listed before the user speaks.
LLAMA = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- endif %}
{{- '<|start|>system<|header|>\n\nToday: ' + date_string + '\n\n' + system + '<|eot|>' }}
{%- if tools is not none %}
    {{- '<|start|>user<|header|>\n\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
    {{- messages[0].content | trim + '<|eot|>' }}{% set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('One call at a time!') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|header|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>ipython<|header|>\n\n' + message.content + '<|eot|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|header|>\n\n' + message.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|header|>\n\n' }}{% endif %}"""

# Tools within the system turn, calls in tags, results as the user's words.
QWEN25 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Be helpful.') }}
    {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first and tools %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}{% if message.content %}{{ '\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}{% set call = call.function %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Thoughts are kept after the last question only, and the last answer has one, be it empty.
QWEN3 = r"""
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}{% set content = message.content %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{ content }}{% endif %}
        {%- for call in message.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}
            {{- '<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# The same, with a prompt that opens the thought.
QWEN3_THINKING = QWEN3[: QWEN3.index("\n{%- if add")] + (
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)

# No thought is ever laid out, the prompt opens one, arguments are strings.
R1 = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] }}
        {%- for call in message.tool_calls or [] %}
            {{- '<|call|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<|end_call|>' }}
        {%- endfor %}{{ '<|end|>' }}
    {%- elif message.role == 'tool' %}{{ '<|result|>' + message.content + '<|end_result|>' }}
    {%- elif message.role == 'user' %}{{ '<|User|>' + message.content }}
    {%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# Calls without content have none of the words that precede others, arguments are strings, results follow one another.
DEEPSEEK = r"""
{{- bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|Assistant|>' + (message.content or '') + '<|calls|>' }}
        {%- for call in message.tool_calls %}
            {{- '<|call|>' + call.type + '<|sep|>' + call.function.name }}
            {{- '\n```json\n' + call.function.arguments + '\n```' }}
        {%- endfor %}{{ '<|end|>' }}
    {%- elif message.role == 'tool' %}{{ '<|result|>' + message.content }}
    {%- elif message.role == 'assistant' %}{{ '<|Assistant|>' + message.content + '<|end|>' }}
    {%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

# Nothing prompts an answer, turns must alternate.
MISTRAL = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
    {%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

# No system turn, the assistant is called model.
GEMMA = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Thoughts in a channel of their own, the last answer ends with another mark, the prompt does not name a channel.
GPT_OSS = r"""
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if message.thinking and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last else '<|end|>' }}
    {%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# A conversation that is over ends with another token.
PHI3 = r"""
{%- for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = r"""
{%- for message in messages %}
{{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{%- endfor %}"""
