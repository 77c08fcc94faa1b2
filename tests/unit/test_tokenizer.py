"""Ids, text and chat templates."""

import json
import threading
from pathlib import Path

import pytest
from gemma import TEMPLATE
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from paths import SUDOKU
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from mlx_diffgemma import Tokenizer, TokenizerError
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.text import rendering_budget
from mlx_diffgemma.text.tokenizer import COUNTED_AT_ONCE, TooLong


def with_template(template: str | None) -> Tokenizer:
    backend = Backend.from_file(str(SUDOKU / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": None}
    return Tokenizer(backend, settings, template)


def test_round_trip_and_framing() -> None:
    tokenizer = Tokenizer.from_directory(SUDOKU)
    text = "12.\n34."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    framed = tokenizer.encode(f"<bos><|turn>{text}<turn|><eos><pad>")
    assert tokenizer.decode(framed) == text
    # Markers of channels are for the caller to parse: dropping them used to mix thought and answer.
    thought = tokenizer.encode("<|channel>12<channel|>3<turn|>")
    assert tokenizer.decode(thought) == "<|channel>12<channel|>3"


def test_bytes_of_one_character() -> None:
    vocab = {"<unk>": 0, "a": 1, **{f"<0x{b:02X}>": b + 2 for b in range(256)}}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend, {}, None)
    ids = tokenizer.encode("aé")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "aé"
    assert tokenizer.decode(ids[:2]) == "a\ufffd"
    assert tokenizer.pieces(ids) == ["a", "\ufffd", "\ufffd"]


def test_template_gets_what_gemma_uses() -> None:
    tokenizer = with_template(
        "{{ bos_token }}{% if enable_thinking %}<think>{% endif %}"
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}\n"
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {{- m.role }}:{{ m['content'] | trim }};{% endfor %}"
        "{% if add_generation_prompt %}model{% endif %}"
    )
    chat = [{"role": "user", "content": " hi "}] * 3
    assert tokenizer.apply_chat_template(chat) == "<bos>user:hi;user:hi;model"
    text = tokenizer.apply_chat_template(
        chat, enable_thinking=True, add_generation_prompt=False, tools=[{"name": "é<"}]
    )
    assert text == '<bos><think>{"name": "é<"}user:hi;user:hi;'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% for %}", "is damaged"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must"),
        ("{{ messages.nothing.at.all }}", "refuses these messages"),
        # Templates come from strangers: the sandbox keeps them from Python's internals.
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_templates_that_fail(template: str | None, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        with_template(template).apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%9999d' * 100000 % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ ('{:1000000000}' | safe).format(1) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ ('x' | attr('ljust'))(10**9) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x\\n' | indent(10**9) }}",
        "{{ ['x'] | map('indent', 10**9, true) | list }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ 1 | round(10**8, 'ceil') }}",
        "{{ '\\t'.expandtabs(10**9) }}",
        "{{ (5).to_bytes(10**9, 'big') }}",
        "{{ 3 ** (10 ** 8) }}",
        "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}",
        "{{ 'x' * 10**5 | replace('x', 'y' * 10**6) }}",
        "{{ range(10**5) | join('y' * 10**5) }}",
        "{{ ('y' * 10**5).join(range(10**5) | map('string')) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ lipsum(n=10**6) }}",
        "{{ 1 / 0 }}",
        "{{ 10.0 ** 1000 }}",
        "{{ 1 + 'x' }}",
        "{{ 10 ** 15000 }}",
        "{{ '\\ud800' }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% set x = 'x' * 10**6 %}{% for i in range(10**5) %}{{ x }}{% endfor %}",
        "{% set x %}{% for i in range(10**5) %}" + "y" * 1000 + "{% endfor %}{% endset %}",
        "{% set x = 'x' * 10**6 %}{% for i in range(10**5) %}{% set y = x[i:] %}{% endfor %}",
        "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = n.a * 9 ** 99 %}"
        "{% set n.a = n.a * n.a %}{% endfor %}",
        *(
            "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = "
            + twice
            + " %}{% endfor %}{{ n.a }}"
            for twice in (
                "[n.a, n.a]",
                "(n.a, n.a)",
                "{'a': n.a, 'b': n.a}",
                "dict(a=n.a, b=n.a)",
                "namespace(a=n.a, b=n.a)",
                "n.a + n.a",
                "n.a ~ n.a",
            )
        ),
        "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}"
        "{{ f(60) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{% extends messages %}",
        "{{ raise_exception('x' * 10**6) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ 1" + "+1" * 30000 + " }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{" * 90000,
        "x" * 10**7,
    ],
)
def test_hostile_templates_are_refused_in_one_short_sentence(template: str) -> None:
    """They used to take gigabytes, run for ever, or raise what nobody catches."""
    tokenizer = with_template(template)
    with pytest.raises(TokenizerError, match=r"^the chat template ") as raised:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**5) %}{% for j in range(10**5) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(10**5) recursive %}{% if loop.depth < 3 %}{{ loop(range(10**5)) }}"
        "{% endif %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% set x = 'x' * 10**6 %}{% for i in range(10**5) %}{% set y = 'xy' in x %}{% endfor %}",
        "{% set x = 'x' * 10**6 %}{% for i in range(10**5) %}{{ x.count('xy') }}{% endfor %}",
        "{{ range(10**5) | map(attribute='" + "real." * 10000 + "real') | list | length }}",
    ],
)
def test_templates_that_do_not_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested loops used to run for days; the sandbox bounds each one by itself."""
    monkeypatch.setattr(rendering_budget, "MOST_SECONDS", 0.1)
    with pytest.raises(TokenizerError, match="takes more than"):
        with_template(template).apply_chat_template([{"role": "user", "content": "hi"}])


def test_bounds_change_no_text() -> None:
    """Jinja's own sandbox renders the same."""
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, indent=indent)
    source = """{% macro show(value, deep=none) %}
    {%- for key, item in value | dictsort if item is not none %}{{ key }}={{ item ~ 1 }}
    {%- if item in more or key == 'city' %}!{% endif %}{{ ', ' if not loop.last }}{% endfor %}
    {{- varargs[1:] }}{{ caller() if caller }}{% endmacro %}
{% set ns = namespace(n=0, seen=[], said='') %}
{% for m in messages[1:] if m.role != 'system' %}
    {% set ns.n = ns.n + 2 ** 3 * 4 % 5 %}{% set ns.seen = ns.seen + [m.role, (1, 2), {'a': m}] %}
    {% set ns.said = ns.said + m.content | trim + '\\n' %}
    {{ loop.index }}/{{ loop.length }} {{ '%-5s|%05.1f' % (m.role, 1.5) }}
    {{ loop.cycle('a', 'b') }}
    {% for call in m.tool_calls or [] %}{{ show(call.arguments, 2, 'x') }}
    {{ call | tojson(indent=2) }}
    {% call show(call.arguments) %}{{ '<' | safe + '<b>' }}{% endcall %}{% endfor %}
    {{ '{}:{:>8}'.format(m.role, 'x') }} {{ m.content.split('o') | map('upper') | join('-') }}
    {{ m.content.replace('o', '00') | replace('0', 'p') | indent(3) }} {{ ns.seen | length }}
{% endfor %}
{% set block %}{{ ns.seen }}{{ ns.said.rjust(20) }}{% endset %}
{{ block | upper }}{{ none ~ missing }}
{% filter title %}{{ [3, 1, 2] | sort | reverse | list }}{% endfilter %}{{ messages | tojson }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | last }}"""
    call = {"name": "weather", "arguments": {"city": "Oslo", "days": 2, "at": None}}
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hello\nyou"}]
    chat += [{"role": "assistant", "content": "no", "tool_calls": [call]}]  # type: ignore[dict-item]
    wanted = plain.from_string(source).render(messages=chat)
    assert with_template(source).apply_chat_template(chat) == wanted
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    for template in (TEMPLATE.read_text(), (EMBEDDED / "chat_template.jinja").read_text()):
        wanted = plain.from_string(template).render(
            messages=chat[:2], add_generation_prompt=True, tools=[tool], bos_token="<bos>"
        )
        assert with_template(template).apply_chat_template(chat[:2], tools=[tool]) == wanted


def test_a_long_chat_is_within_the_bounds() -> None:
    """The bounds grow with what is rendered: this is more than any context holds."""
    chat = [
        {"role": "user", "content": "word " * 1000},
        {"role": "assistant", "content": "x"},
    ] * 500
    text = with_template(TEMPLATE.read_text()).apply_chat_template(chat)
    assert text.count("word") == 500_000


def test_a_chat_has_a_message() -> None:
    """It used to end as whatever the template makes of nothing."""
    for template in (TEMPLATE.read_text(), "always"):
        with pytest.raises(TokenizerError, match="no message"):
            with_template(template).apply_chat_template([])


def test_files_of_templates_that_fail(tmp_path: Path) -> None:
    """One that is not UTF-8 used to end in a traceback, a large one was read to its end."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((SUDOKU / name).read_text())
    file = tmp_path / "chat_template.jinja"
    with file.open("wb") as large:
        large.truncate(10**9)  # sparse
    with pytest.raises(TokenizerError, match="more than 100000 characters"):
        Tokenizer.from_directory(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="is not UTF-8"):
        Tokenizer.from_directory(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)
    file.rmdir()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="is not a JSON object"):
        Tokenizer.from_directory(tmp_path)


def test_template_inside_tokenizer_config(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((SUDOKU / name).read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}!"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = [{"role": "user", "content": "hi"}]
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(chat) == "hi!"


def test_plain_texts_are_what_a_token_adds() -> None:
    """A decoder that drops the first space made " b" look one character long."""
    vocabulary = {"<unk>": 0, "a": 1, "\u2581b": 2, "<0x41>": 3, "</s>": 4, "\u2581": 5}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>", "<unk>"])
    assert backend.decode([2]) == "b"
    assert Tokenizer(backend, {}, None).plain == {1: "a", 2: " b", 5: " "}


def test_encoding_lets_other_threads_run() -> None:
    """A megabyte used to hold the interpreter for a second, and a server's /health with it."""
    tokenizer = Tokenizer.from_directory(SUDOKU)
    ticks, over = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not over.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    tokenizer.encode("12 " * 1_000_000)
    while_encoding = ticks - before
    over.set()
    thread.join()
    assert while_encoding >= 5


def test_text_that_cannot_fit_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was, whatever came: 3.9 MB took ten seconds and 1.7 GB, to be refused."""
    tokenizer = Tokenizer.from_directory(SUDOKU)
    encode, sizes = Tokenizer.encode, []

    def noted(self: Tokenizer, text: str) -> list[int]:
        sizes.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    most = 1000 * tokenizer.longest
    with pytest.raises(TooLong, match=f"the text has {most + 1:,} characters; 1,000 tokens of at"):
        tokenizer.encode_within("1" * (most + 1), 1000, "the text")
    assert sizes == []
    with pytest.raises(TooLong, match="far more than 200,000 tokens"):
        tokenizer.encode_within("1" * 1_900_000, 200_000, "the text")
    assert sum(sizes) < 500_000
    sizes.clear()
    text = "12.\n<|turn>" * 30_000
    assert tokenizer.encode_within(text, 150_000, "the text") == encode(tokenizer, text)
    assert len(sizes) == 1 + -(-len(text) // COUNTED_AT_ONCE)

    def stop() -> None:
        if len(sizes) == 3:
            raise KeyError

    sizes.clear()
    with pytest.raises(KeyError):
        tokenizer.encode_within(text, 150_000, "the text", stop)
    assert len(sizes) == 3


def test_half_a_character_is_refused() -> None:
    """It was a TypeError, and an answer of 500."""
    with pytest.raises(TokenizerError, match="surrogate"):
        Tokenizer.from_directory(SUDOKU).encode("1\ud800")
