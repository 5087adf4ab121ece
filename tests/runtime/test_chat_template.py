"""Chat templates: the same prompts as transformers renders, in a sandbox, and one line for what goes wrong."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_bundle import sample_manifest, write_bundle

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.template_process import TemplateFault, TemplateProcess

TALK = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Wie tief ist das Meer? ä"},
    {"role": "assistant", "content": " 11 km "},
    {"role": "user", "content": "{{ 1 }}"},
]
# Of kinds that published models have: loops with controls, whitespace control, tojson, marks for training.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama": (
        "{{- bos_token }}\n{%- for m in messages %}\n    {%- if m.role == 'system' %}\n{{- '<<SYS>>' ~ m.content }}\n"
        "    {%- continue %}\n    {%- endif %}\n{{- '[' ~ m.role ~ '] ' ~ m.content ~ eos_token }}\n{%- endfor %}"
    ),
    "tools": (
        "{{ messages[0] | tojson }}{{ messages[1] | tojson(indent=2) }}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    ),
    "generation": (
        "  {% for m in messages %}\n  {% if m.role == 'assistant' %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% else %}{{ m.content }}{% endif %}\n  {% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("more", [{}, {"enable_thinking": True}])
@pytest.mark.parametrize("prompt", [True, False])
def test_prompts_are_those_of_transformers(name: str, more: dict[str, Any], prompt: bool) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
    wanted = theirs.apply_chat_template(
        TALK, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt, **more
    )
    ours = ChatTemplate(TEMPLATES[name], "here", **tokens)
    assert ours.render(TALK, add_generation_prompt=prompt, **more) == wanted


def test_what_a_template_refuses_is_one_line() -> None:
    refusing = ChatTemplate("{{ raise_exception('roles must\n alternate') }}", "bundle")
    with pytest.raises(UsageError, match=r"the chat template \(bundle\) cannot make .*: roles must alternate"):
        refusing.render(TALK)
    for text in ("{% for %}", "{{ unclosed", "{% bad %}"):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            ChatTemplate(text, "bundle").render(TALK)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ 'a' * 10**12 }}",
        "{{ 10 ** 10 ** 8 }}",
        "{{ range(10**9) | list }}",
        "{{ messages[7].content.nothing }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_template_does_nothing(text: str) -> None:
    talk = [dict(message) for message in TALK]
    try:
        made = ChatTemplate(text, "bundle").render(talk)
    except UsageError:
        made = ""
    assert len(made) < 100
    assert "uid=" not in made
    assert talk == TALK


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a'|center(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ ['a']|batch(10**9, 'x')|list|length }}",
        "{{ messages|tojson(indent=10**9) }}",
        "{% set ns = namespace(x='a' * 99) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
def test_a_template_gets_so_much_memory_and_no_more(text: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="takes more than 512 MB of memory"):
        ChatTemplate(text, "bundle").render(TALK)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    with pytest.raises(UsageError, match="it makes 10000000 characters, expected at most 8000000"):
        ChatTemplate("{% for i in range(100) %}{{ 'a' * 100000 }}{% endfor %}", "bundle").render(TALK)


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=99) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    ],
)
def test_a_template_gets_so_many_seconds_and_no_more(text: str) -> None:
    """In Python and inside one C function; the next prompt is made as ever."""
    process = TemplateProcess("{% if slow %}" + text + "{% endif %}{{ n }}", seconds=0.5)
    for number in range(2):
        assert process.render({"n": number}) == str(number)
        with pytest.raises(TemplateFault, match=r"it takes longer than 0\.5 s"):
            process.render({"slow": True})
    with pytest.raises(TemplateFault, match="values are not those of JSON"):
        process.render({"n": object()})


def test_the_process_of_a_template_can_do_nothing_else() -> None:
    """Were a template to get out of Jinja's sandbox."""
    program = (
        "import os, socket\nfrom mythos_edge.runtime import template_process as t\nt._confine()\n"
        "for do in (lambda: open('/etc/hostname'), lambda: open('made', 'w'), socket.socket, lambda: bytes(1 << 30)):\n"
        "    try:\n        do()\n    except (OSError, MemoryError) as error:\n        print(type(error).__name__)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["OSError", "OSError", "OSError", "MemoryError"]


def test_the_process_of_a_template_ends_with_what_asked_it() -> None:
    process = TemplateProcess("{{ n }}")
    assert process.render({"n": 1}) == "1"
    child = process._process
    assert child is not None
    del process
    assert child.wait(timeout=10) == -9
    # Killed while nobody looked, as by a machine short of memory: told once, and the next prompt has another.
    process = TemplateProcess("{{ n }}")
    process.render({"n": 1})
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    with pytest.raises(TemplateFault, match="its process ended with SIGKILL"):
        process.render({"n": 2})
    assert process.render({"n": 3}) == "3"


def test_names_choose_a_template(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    assert ChatTemplate.of(bundle).render(TALK) == str(TALK)
    assert ChatTemplate.of(bundle, "plain").render(TALK[:2]) == "Be <brief>.Wie tief ist das Meer? ä"
    assert ChatTemplate.of(bundle, "chatml").render(TALK[1:2]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert ChatTemplate.of(bundle, "chatml").stops == ("<|im_end|>",)
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")
    assert ChatTemplate.of(bundle, str(own)).render(TALK) == "<s>Be <brief>."
    for wrong in ("absent.jinja", str(tmp_path)):
        with pytest.raises(UsageError, match=r"cannot read the chat template.*expected a file, chatml or plain"):
            ChatTemplate.of(bundle, wrong)
    own.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        ChatTemplate.of(bundle, str(own))


def test_a_bundle_without_one_is_plain(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", make=lambda files: sample_manifest(files, chat_template=None))
    template = ChatTemplate.of(open_bundle(tmp_path / "b"))
    assert (template.name, template.is_plain, template.stops) == ("plain", True, ())
