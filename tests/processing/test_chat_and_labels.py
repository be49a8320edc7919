"""What is trained on: the assistant's turns and their end tokens, nothing else, under any chat template."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lightning_vlm.processing import chat
from lightning_vlm.processing.chat import Span, render_prompt, render_turns, special_tokens
from lightning_vlm.processing.labels import tokenize_spans
from lightning_vlm.processing.messages import to_messages
from lightning_vlm.processing.pieces import MediaTokens
from lightning_vlm.processing.tiny import CHATML_TEMPLATE, tiny_tokenizer
from lightning_vlm.schema import IGNORE_INDEX, Conversation, DataError, ImageRef, Part, Text, Turn

SOURCE = "file.jsonl:12"

# The behaviour of Nemotron-3-Nano-Omni's template, written from its description: a system turn always, empty
# thinking prepended where a turn has no tags, thinking of turns before the last question cut.
OMNI_TEMPLATE = """
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set cut = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set ns = namespace(system='', last_user=-1) -%}
{%- for message in messages if message.role == 'system' -%}
{%- set ns.system = message.content -%}
{%- endfor -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\\n' ~ ns.system ~ '<|im_end|>\\n' -}}
{%- for message in turns -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' -%}
{%- if '<think>' not in content -%}{%- set content = '<think></think>' ~ content -%}{%- endif -%}
{%- if cut and loop.index0 < ns.last_user -%}
{%- set content = '<think></think>' ~ content.split('</think>')[-1] -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinking else '<think></think>') -}}
{%- endif -%}
"""

# Likewise of Nemotron-Nano-12B-v2-VL's: /think and /no_think leave the texts and choose the prompt's end.
OLDER_TEMPLATE = """
{%- set ns = namespace(thinking=true, system='') -%}
{%- for message in messages if message.role != 'assistant' -%}
{%- if '/no_think' in message.content -%}{%- set ns.thinking = false -%}
{%- elif '/think' in message.content -%}{%- set ns.thinking = true -%}{%- endif -%}
{%- endfor -%}
{%- if messages and messages[0].role == 'system' -%}{%- set ns.system = messages[0].content -%}{%- endif -%}
{{- '<SPECIAL_10>System\\n' ~ ns.system.replace('/no_think', '').replace('/think', '') ~ '\\n' -}}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'assistant' -%}
{{- '<SPECIAL_11>Assistant\\n' ~ message.content ~ '\\n<SPECIAL_12>\\n' -}}
{%- else -%}
{{- '<SPECIAL_11>User\\n' ~ message.content.replace('/no_think', '').replace('/think', '') ~ '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<SPECIAL_11>Assistant\\n' ~ ('<think>\\n' if ns.thinking else '<think></think>') -}}
{%- endif -%}
"""

# Trims contents, as many templates do.
TRIMMING_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ONE_TURN = "{{ m.role ~ ':' ~ m.content ~ '<|im_end|>' }}{% endfor %}"

EXTRA_TOKENS = ["<think>", "</think>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"]


def with_template(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


CHATML, OMNI, OLDER, TRIMMING = map(with_template, (None, OMNI_TEMPLATE, OLDER_TEMPLATE, TRIMMING_TEMPLATE))


def messages_of(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Alternating user and assistant turns, after a system turn if one is given."""
    roles = ["user", "assistant"]
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def trained(spans: list[Span]) -> list[str]:
    return [span.text for span in spans if span.trained]


def joined(spans: list[Span]) -> str:
    return "".join(span.text for span in spans)


def render(tokenizer: Any, messages: list[dict[str, str]], **template_kwargs: Any) -> list[Span]:
    """Spans, after checking that joined they are what the tokenizer itself renders."""
    spans = render_turns(tokenizer, messages, SOURCE, template_kwargs)
    assert joined(spans) == tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    return spans


def trained_text(tokenizer: Any, spans: list[Span]) -> str:
    input_ids, labels = tokenize_spans(tokenizer, spans)
    assert torch.equal(labels[labels != IGNORE_INDEX], input_ids[labels != IGNORE_INDEX])
    return tokenizer.decode(labels[labels != IGNORE_INDEX], clean_up_tokenization_spaces=False)


def refusal(tokenizer: Any, messages: list[dict[str, str]]) -> DataError:
    with pytest.raises(DataError) as caught:
        render_turns(tokenizer, messages, SOURCE)
    assert str(caught.value).startswith(f"{SOURCE}: ")
    assert "\n" not in str(caught.value)
    assert ".;" not in str(caught.value)
    return caught.value


class TestChatML:
    def test_trains_the_answer_and_its_end_token(self) -> None:
        assert render(CHATML, messages_of("hi", "hello")) == [
            Span("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
            Span("hello<|im_end|>", True),
            Span("\n", False),
        ]

    def test_trains_every_assistant_turn(self) -> None:
        spans = render(CHATML, messages_of("a", "b", "c", "d", "e", system="s"))
        assert trained(spans) == ["b<|im_end|>", "d<|im_end|>"]

    def test_trains_consecutive_assistant_turns_each(self) -> None:
        messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "assistant"], "abc")]
        assert trained(render(CHATML, messages)) == ["b<|im_end|>", "c<|im_end|>"]

    def test_trains_a_conversation_that_the_assistant_opens(self) -> None:
        messages = [{"role": "assistant", "content": "welcome"}, {"role": "user", "content": "hi"}]
        assert trained(render(CHATML, messages)) == ["welcome<|im_end|>"]

    def test_does_not_train_on_tool_output(self) -> None:
        roles = ["user", "assistant", "tool", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, ["q", "call", "result", "done"])]
        assert trained(render(CHATML, messages)) == ["call<|im_end|>", "done<|im_end|>"]

    def test_answer_that_also_occurs_in_the_question_is_trained_only_as_the_answer(self) -> None:
        spans = render(CHATML, messages_of("say yes or no: yes", "yes"))
        assert trained(spans) == ["yes<|im_end|>"]
        assert joined(spans[:1]).endswith("yes<|im_end|>\n<|im_start|>assistant\n")

    def test_of_several_closing_tokens_the_first_is_the_end_token(self) -> None:
        template = CHATML_TEMPLATE.replace("<|im_end|>", "<|im_end|><s>")
        assert trained(render(with_template(template), messages_of("q", "a", "r", "b"))) == [
            "a<|im_end|>",
            "b<|im_end|>",
        ]

    def test_question_that_imitates_the_template_is_not_trained(self) -> None:
        fake = "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n<|im_start|>user\nhi"
        assert trained(render(CHATML, messages_of(fake, "real"))) == ["real<|im_end|>"]

    @pytest.mark.parametrize(
        "answer",
        [
            "",
            " ",
            "\n",
            "\nb",
            "b\n",
            "assistant\n",
            "<|im_start|>assistant\n",
            "<|im_end|>",
            "turn1marker",
            "日本語 🙂 e\u0301",
            "{{ messages }}",
            "<think>",
        ],
        ids=repr,
    )
    def test_any_answer_is_trained_as_it_stands(self, answer: str) -> None:
        spans = render(CHATML, messages_of("q", answer, "q", answer))
        assert trained(spans) == [answer + "<|im_end|>"] * 2
        assert spans[0].text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"

    @settings(max_examples=50, deadline=None)
    @given(
        contents=st.lists(st.text(max_size=12), min_size=1, max_size=5),
        system=st.none() | st.text(max_size=5),
    )
    def test_any_conversation_is_rendered_and_trained_exactly(self, contents: list[str], system: str | None) -> None:
        spans = render(CHATML, messages_of(*contents, system=system))
        answers = [answer + "<|im_end|>" for answer in contents[1::2]]
        assert trained(spans) == answers
        assert trained_text(CHATML, spans) == "".join(answers)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.text("a \n\t", max_size=6), min_size=2, max_size=4))
    def test_trimming_template_trains_what_it_prints(self, contents: list[str]) -> None:
        spans = render(TRIMMING, messages_of(*contents))
        assert trained(spans) == [answer.strip() + "<|im_end|>" for answer in contents[1::2]]


class TestOmni:
    def test_system_turn_is_rendered_even_when_empty_and_never_trained(self) -> None:
        spans = render(OMNI, messages_of("q", "a"), enable_thinking=False)
        assert spans[0].text == (
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think></think>"
        )
        assert trained(spans) == ["a<|im_end|>"]
        assert render(OMNI, messages_of("q", "a", system="Be brief."))[0].text.startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n"
        )

    def test_thinking_is_trained_after_the_prompt_that_opens_it(self) -> None:
        spans = render(OMNI, messages_of("q", "<think>\nwhy\n</think>\na"))
        assert spans[0].text.endswith("<|im_start|>assistant\n<think>\n")
        assert trained(spans) == ["why\n</think>\na<|im_end|>"]

    def test_answer_without_thinking_is_trained_from_where_it_leaves_a_thinking_prompt(self) -> None:
        spans = render(OMNI, messages_of("q", "a"))  # the prompt ends with <think>\n, the turn with <think></think>a
        assert spans[0].text.endswith("<|im_start|>assistant\n<think>")
        assert trained(spans) == ["</think>a<|im_end|>"]

    def test_thinking_is_trained_in_full_after_a_prompt_that_forbids_it(self) -> None:
        spans = render(OMNI, messages_of("q", "<think>\nwhy\n</think>\na"), enable_thinking=False)
        assert spans[0].text.endswith("<|im_start|>assistant\n<think>")
        assert trained(spans) == ["\nwhy\n</think>\na<|im_end|>"]

    def test_thinking_of_earlier_turns_is_cut_and_not_trained(self) -> None:
        thought = "<think>\nwhy\n</think>"
        messages = messages_of("q", thought + "a", "r", thought + "b", system="s")
        spans = render(OMNI, messages, enable_thinking=False)
        assert trained(spans) == ["a<|im_end|>", "\nwhy\n</think>b<|im_end|>"]
        assert joined(spans).count("why") == 1

    def test_thinking_of_earlier_turns_can_be_kept(self) -> None:
        messages = messages_of("q", "<think>\nwhy\n</think>a", "r", "<think>\nhow\n</think>b")
        spans = render(OMNI, messages, truncate_history_thinking=False)
        assert trained(spans) == ["why\n</think>a<|im_end|>", "how\n</think>b<|im_end|>"]

    def test_turns_before_the_last_question_are_told_from_their_prompt_although_it_read_differently(
        self,
    ) -> None:
        roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
        contents = ["q", "<think>\nwhy\n</think>call", "result", "done", "r", "b"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        spans = render(OMNI, messages, enable_thinking=False)
        assert trained(spans) == ["call<|im_end|>", "done<|im_end|>", "b<|im_end|>"]

    @settings(max_examples=40, deadline=None)
    @given(
        contents=st.lists(st.text("ab<think></think>\n ", max_size=9), min_size=2, max_size=4),
        thinking=st.booleans(),
        cut=st.booleans(),
    )
    def test_any_conversation_is_rendered_exactly_and_ends_trained_turns_with_the_end_token(
        self, contents: list[str], thinking: bool, cut: bool
    ) -> None:
        messages = messages_of(*contents)
        spans = render(OMNI, messages, enable_thinking=thinking, truncate_history_thinking=cut)
        assert len(trained(spans)) == len(contents) // 2
        assert all(text.endswith("<|im_end|>") for text in trained(spans))

    @pytest.mark.parametrize(
        ("thinking", "end"),
        [(True, "<think>\n"), (False, "<think></think>")],
        ids=["thinking", "not thinking"],
    )
    def test_prompt_ends_where_the_model_goes_on(self, thinking: bool, end: str) -> None:
        prompt = render_prompt(OMNI, messages_of("q"), SOURCE, {"enable_thinking": thinking})
        assert prompt.endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" + end)


class TestOlder:
    def test_trains_the_answer_with_the_newline_before_its_end_token(self) -> None:
        spans = render(OLDER, messages_of("q", "a", system="s"))
        assert spans == [
            Span("<SPECIAL_10>System\ns\n<SPECIAL_11>User\nq\n<SPECIAL_11>Assistant\n", False),
            Span("a\n<SPECIAL_12>", True),
            Span("\n", False),
        ]

    def test_trains_every_turn_and_no_token_of_the_next_one(self) -> None:
        spans = render(OLDER, messages_of("q", "a", "r", "b"))
        assert trained(spans) == ["a\n<SPECIAL_12>", "b\n<SPECIAL_12>"]
        assert spans[2].text == "\n<SPECIAL_11>User\nr\n<SPECIAL_11>Assistant\n"

    @pytest.mark.parametrize("where", ["system", "user"])
    def test_prompt_that_the_row_chooses_is_not_trained(self, where: str) -> None:
        switch = {"system": "/no_think"} if where == "system" else {}
        question = "q" if where == "system" else "q /no_think"
        messages = messages_of(question, "<think></think>a", **switch)
        spans = render(OLDER, messages)
        prompt = render_prompt(OLDER, messages[:-1], SOURCE)
        assert prompt.endswith("<think></think>")
        assert spans[0].text == prompt
        assert trained(spans) == ["a\n<SPECIAL_12>"]

    def test_thinking_is_trained_after_the_prompt_that_opens_it(self) -> None:
        spans = render(OLDER, messages_of("q /no_think /think", "<think>\nwhy</think>a", system="/think"))
        assert trained(spans) == [
            "<think>\nwhy</think>a\n<SPECIAL_12>"
        ]  # /no_think wins here: the prompt shuts thinking
        spans = render(OLDER, messages_of("q", "<think>\nwhy</think>a", system="/think"))
        assert trained(spans) == ["why</think>a\n<SPECIAL_12>"]

    @pytest.mark.parametrize("answer", ["", "\n", "\na", "a\n", "Assistant\n", "<SPECIAL_12>"], ids=repr)
    def test_any_answer_is_trained_as_it_stands(self, answer: str) -> None:
        assert trained(render(OLDER, messages_of("q", answer, "q", answer))) == [answer + "\n<SPECIAL_12>"] * 2


class TestTemplatesThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("template", "problem"),
        [
            (
                "{% for m in messages if m.role != 'system' %}" + ONE_TURN,
                "prints turn 1 0 times",
            ),
            (
                "{% for m in messages %}" + ONE_TURN + "{{ messages[1].content }}",
                "prints turn 2 2 times",
            ),
            (
                "{% for m in messages %}{{ messages[1].content | length }}" + ONE_TURN,
                "renders turn 2 differently depending on what other turns say",
            ),
            (
                "{% for m in messages %}" + ONE_TURN + "{{ messages[0].content | length }}",
                "depending on what other turns say",
            ),
            (
                "{% for m in messages | reverse %}" + ONE_TURN,
                "depending on what other turns say",
            ),
            (
                "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '\n' }}{% endfor %}",
                "ends an assistant turn with '\\n', expected a special token",
            ),
            ("{{ raise_exception('one\ntwo.') }}", "refuses the turns (system, user, assistant): one two"),
            ("{{ messages[9].content }}", "refuses the turns"),
            ("{% for %}", "refuses the turns"),
        ],
        ids=[
            "drops",
            "repeats",
            "couples",
            "couples at the end",
            "reorders",
            "no end token",
            "raises",
            "out of range",
            "no Jinja",
        ],
    )
    def test_are_refused_naming_the_place_and_the_template(self, template: str, problem: str) -> None:
        error = refusal(with_template(template), messages_of("question", "answer", system="system"))
        assert problem in error.problem
        assert "template" in error.problem
        assert "chat_template" in error.fix

    @pytest.mark.parametrize("contents", ["qa", "qar"], ids=["answer last", "question last"])
    def test_next_turns_first_token_does_not_pass_for_an_end_token(self, contents: str) -> None:
        template = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '\n' }}{% endfor %}"
        error = refusal(with_template(template), messages_of(*contents))
        assert "expected a special token to stop at" in error.problem

    def test_tokenizer_without_a_template_is_refused(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        assert "chat_template is not set" in str(refusal(tokenizer, messages_of("q", "a")))

    def test_prompt_that_the_template_refuses_names_the_place(self) -> None:
        with pytest.raises(DataError, match=r"file\.jsonl:12: .* refuses the turns \(user\): no"):
            render_prompt(with_template("{{ raise_exception('no') }}"), messages_of("q"), SOURCE)


TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "omni": OMNI_TEMPLATE,
    "older": OLDER_TEMPLATE,
    "trimming": TRIMMING_TEMPLATE,
    "names another turn": "{% for m in messages %}" + ONE_TURN + "{{ messages[0].content[:1] == 'a' }}",
    "tells a length": "{% for m in messages %}{{ m.content | length }}" + ONE_TURN,
    "joins answers": "{% for m in messages %}{{ m.content.replace('ab', 'b') ~ '<|im_end|>' }}{% endfor %}",
}
WORDS = [
    "",
    "a",
    "b",
    "ab",
    " ",
    "\n",
    "<think>",
    "</think>",
    "/no_think",
    "/think",
    "<|im_end|>",
    "<|im_start|>user\n",
]


def outcome(tokenizer: Any, messages: list[dict[str, str]], **template_kwargs: Any) -> list[Span] | str:
    """Spans, or why there are none."""
    try:
        return render_turns(tokenizer, messages, SOURCE, template_kwargs)
    except DataError as error:
        return str(error)


TOKENIZERS = {name: with_template(template) for name, template in TEMPLATES.items()}


class Counted:
    """How often a tokenizer's template is rendered."""

    def __init__(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renderings = 0
        inner = tokenizer.apply_chat_template

        def counting(*args: Any, **kwargs: Any) -> str:
            self.renderings += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(tokenizer, "apply_chat_template", counting)

    def of(self, tokenizer: Any, *contents: str, **template_kwargs: Any) -> int:
        before = self.renderings
        render_turns(tokenizer, messages_of(*contents), SOURCE, template_kwargs)
        return self.renderings - before


class TestRememberedFrames:
    @pytest.mark.parametrize("name", TEMPLATES)
    @settings(max_examples=60, deadline=None)
    @given(
        turns=st.lists(
            st.tuples(
                st.sampled_from(["user", "assistant", "tool", "system"]), st.lists(st.sampled_from(WORDS), max_size=3)
            ),
            min_size=1,
            max_size=5,
        ),
        variables=st.sampled_from([{}, {"enable_thinking": False}, {"truncate_history_thinking": False}]),
    )
    def test_change_no_span(self, name: str, turns: list[tuple[str, list[str]]], variables: dict[str, bool]) -> None:
        """Against nothing remembered, and against every turn rendered by itself among markers."""
        tokenizer = TOKENIZERS[name]
        messages = [{"role": role, "content": "".join(words)} for role, words in turns]
        blank = [{**message, "content": "x"} for message in messages]  # of the same frame: remembers it
        outcome(tokenizer, blank, **variables)
        remembered = outcome(tokenizer, messages, **variables)
        chat._FRAMES.clear()
        assert outcome(tokenizer, messages, **variables) == remembered
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat._Frame, "around", lambda *_: None)
            thorough = outcome(tokenizer, messages, **variables)
        if isinstance(thorough, list) or name != "names another turn":
            assert remembered == thorough
        if isinstance(remembered, list):
            assert joined(remembered) == tokenizer.apply_chat_template(messages, tokenize=False, **variables)

    def test_cost_one_rendering_and_one_per_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = with_template()
        count = Counted(tokenizer, monkeypatch)
        assert count.of(tokenizer, "q", "a") == 4
        assert count.of(tokenizer, "another q", "another a") == 2
        assert count.of(tokenizer, "q", "a", "r", "b") > 3
        assert count.of(tokenizer, "q", "c", "r", "d") == 3

    def test_are_told_apart_by_template_variables_and_special_tokens(self) -> None:
        tokenizer, messages = with_template(OMNI_TEMPLATE), messages_of("q", "a")
        thinking = trained(render(tokenizer, messages))
        assert trained(render(tokenizer, messages, enable_thinking=False)) == ["a<|im_end|>"] != thinking
        other = TRIMMING_TEMPLATE.replace("<|im_end|>", "</think>")
        assert trained(render(tokenizer, messages, chat_template=other)) == ["a</think>"]
        tokenizer.chat_template = CHATML_TEMPLATE
        assert trained(render(tokenizer, messages)) == ["a<|im_end|>"]
        tokenizer.chat_template = CHATML_TEMPLATE.replace("<|im_end|>", "!<|im_end|>")
        assert trained(render(tokenizer, messages)) == ["a!<|im_end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": [*EXTRA_TOKENS, "!"]})
        assert trained(render(tokenizer, messages)) == ["a!"]

    def test_of_one_text_are_told_apart_by_how_an_answer_would_end_as_the_last_turn(self) -> None:
        template = "{% for m in messages %}{{ m.role ~ m.content }}"
        template += (
            "{% if open and loop.last and m.role == 'assistant' %}{{ '.' }}{% else %}{{ '<|im_end|>' }}{% endif %}"
        )
        template += "{% endfor %}"
        tokenizer, messages = with_template(template), messages_of("q", "a", "r")
        shut = render(tokenizer, messages, open=False)
        assert trained(shut)[0].endswith("a<|im_end|>")
        assert "expected a special token to stop at" in outcome(tokenizer, messages, open=True)
        always_open = template.replace("if open and", "if")
        assert "expected a special token to stop at" in outcome(
            tokenizer, messages, open=False, chat_template=always_open
        )

    def test_of_a_template_that_tells_the_time_are_made_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        template = CHATML_TEMPLATE + "{{ now }}"
        tokenizer, messages, now = with_template(template), messages_of("q", "a"), iter("12345678")
        inner = tokenizer.apply_chat_template
        time = next(now)
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: inner(*a, **k, now=time))
        for time in now:
            spans = render_turns(tokenizer, messages, SOURCE)
            assert trained(spans) == ["a<|im_end|>"]
            assert spans[-1].text == f"\n{time}"

    def test_are_bounded(self) -> None:
        tokenizer = with_template()
        for count in range(chat._MAX_FRAMES + 10):
            roles = ["user" if count >> bit & 1 else "tool" for bit in range(9)]
            render_turns(tokenizer, [{"role": role, "content": "x"} for role in [*roles, "assistant"]], SOURCE)
            assert len(chat._FRAMES[tokenizer]) <= chat._MAX_FRAMES

    def test_live_no_longer_than_their_tokenizer_and_do_not_travel_with_it(self) -> None:
        tokenizer = with_template()
        chat._FRAMES.clear()
        render_turns(tokenizer, messages_of("q", "a"), SOURCE)
        size = len(pickle.dumps(tokenizer))
        render_turns(tokenizer, messages_of("q", "a", "r", "b"), SOURCE)
        assert len(pickle.dumps(tokenizer)) == size
        assert list(chat._FRAMES) == [tokenizer]
        arrived = pickle.loads(pickle.dumps(tokenizer))
        assert render(arrived, messages_of("q", "a")) == render(tokenizer, messages_of("q", "a"))
        del tokenizer, arrived
        gc.collect()
        assert not chat._FRAMES


class TestMessages:
    def test_join_texts_and_images_verbatim(self) -> None:
        parts: tuple[Part, ...] = (Text("a "), ImageRef("1.png"), Text("\nb"), ImageRef("2.png"))
        conversation = Conversation((Turn("user", parts), Turn("assistant", (Text("c"),))), SOURCE)
        assert to_messages(conversation, MediaTokens()) == [
            {"role": "user", "content": "a <image>\nb<image>"},
            {"role": "assistant", "content": "c"},
        ]

    def test_text_that_contains_the_placeholder_is_an_error(self) -> None:
        turns = (Turn("user", (ImageRef("1.png"), Text("what is <image>?"))), Turn("assistant", (Text("a"),)))
        with pytest.raises(DataError) as caught:
            to_messages(Conversation(turns, SOURCE), MediaTokens())
        assert str(caught.value).startswith(f"{SOURCE}: the text of turn 1 (user) contains '<image>'")

    def test_special_tokens_hold_the_added_ones(self) -> None:
        assert {"<|im_end|>", "<image>", "<SPECIAL_12>", "<pad>"} <= special_tokens(OLDER)


class TestLabels:
    def test_token_level_labels_of_a_dialogue(self) -> None:
        assert trained_text(CHATML, render(CHATML, messages_of("q", "one", "r", "two"))) == "one<|im_end|>two<|im_end|>"

    @pytest.mark.parametrize("answer", ["é", "日本", "🙂", "e\u0301\u0323", "👩\u200d👩\u200d👧", "\u00a0"], ids=ascii)
    def test_every_byte_of_a_character_is_trained(self, answer: str) -> None:
        input_ids, labels = tokenize_spans(CHATML, render(CHATML, messages_of(answer, answer)))
        # One token per byte, and the end token.
        assert int((labels != IGNORE_INDEX).sum()) == len(answer.encode()) + 1
        assert CHATML.decode(labels[labels != IGNORE_INDEX]) == answer + "<|im_end|>"
        assert input_ids.dtype == labels.dtype == torch.int64

    def test_are_the_same_tokens_as_without_labels(self) -> None:
        spans = render(CHATML, messages_of("日本 q", "a 🙂"))
        input_ids, labels = tokenize_spans(CHATML, spans)
        assert input_ids.tolist() == CHATML(joined(spans), add_special_tokens=False)["input_ids"]
        assert labels.shape == input_ids.shape

    def test_no_beginning_of_text_is_added_to_what_the_template_printed(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        input_ids, _ = tokenize_spans(tokenizer, [Span("a", False)])
        assert tokenizer.decode(input_ids) == "a"

    def test_no_text_gives_no_token(self) -> None:
        input_ids, labels = tokenize_spans(CHATML, [])
        assert input_ids.shape == labels.shape == (0,)

    def test_untrained_text_has_no_label(self) -> None:
        _, labels = tokenize_spans(CHATML, [Span("question", False)])
        assert (labels == IGNORE_INDEX).all()

    def test_token_that_straddles_the_start_of_an_answer_is_trained(self) -> None:
        tokenizer = tokenizer_with_double_newlines()
        spans = [Span("a\n", False), Span("\nb", True), Span("\nc", False)]
        input_ids, labels = tokenize_spans(tokenizer, spans)
        assert tokenizer.convert_ids_to_tokens(input_ids) == ["a", "ĊĊ", "b", "Ċ", "c"]
        assert (labels != IGNORE_INDEX).tolist() == [False, True, True, False, False]

    def test_tokenizer_without_character_offsets_is_refused(self) -> None:
        with pytest.raises(ValueError, match="ByT5Tokenizer gives no character offsets; expected a fast tokenizer"):
            tokenize_spans(ByT5Tokenizer(), [Span("a", True)])


def tokenizer_with_double_newlines() -> PreTrainedTokenizerFast:
    """Byte-level, with one merge: two newlines become one token, as in every real vocabulary."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vocabulary["ĊĊ"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<pad>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
