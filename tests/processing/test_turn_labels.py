"""Labels by the template's marks and, as a last resort, by search: the answers and never the question."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import example as worked
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from lightning_vlm.processing import turn_labels
from lightning_vlm.processing.answer_search import _extract_assistant_text, build_labels
from lightning_vlm.processing.chat import render_turns
from lightning_vlm.processing.labels import tokenize_spans
from lightning_vlm.processing.tiny import CHATML_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from lightning_vlm.processing.token_search import (
    _decode_single_token,
    _find_pattern_indices,
    content_end,
    pattern_starts,
)
from lightning_vlm.processing.turn_labels import (
    _build_labels_from_markers,
    _derive_turn_markers,
    _get_assistant_marker,
    _get_stop_token_id,
    build_labels_from_template,
    turn_markers,
)

Dict = dict[str, Any]
IGNORED = -100


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE in which characters merge across borders as in released ones: line breaks with one another, words with the
    space before."""
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s?\w+|[^\s\w]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    corpus = ["is it red or blue\n\nred red\n\n\nblue assistant\nuser\nsystem\n a b ab \n\n"] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML_TEMPLATE
    )


BYTES, MERGING = tiny_tokenizer(), merging_tokenizer()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, MERGING], ids=["bytes", "merging"])


def exact(tokenizer: Any, *texts: str) -> tuple[torch.Tensor, torch.Tensor, list[Dict]]:
    """Ids and labels from rendered spans, as our own processor makes them, and the messages: user, assistant, ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    ids, labels = tokenize_spans(tokenizer, render_turns(tokenizer, messages, "test"))
    return ids, labels, messages


def words(labels: torch.Tensor, tokenizer: Any = BYTES) -> str:
    return tokenizer.decode(labels[labels != IGNORED])


# Searching tokens


def test_a_pattern_is_found_at_or_after_an_index() -> None:
    row = [1, 2, 3, 1, 2, 4]
    assert _find_pattern_indices(row, [1, 2]) == (0, 2)
    assert _find_pattern_indices(row, [1, 2], 1) == (3, 5)
    assert _find_pattern_indices(torch.tensor(row), torch.tensor([1, 2]), 4) == (-1, -1)
    assert _find_pattern_indices(row, [9, 2, 4], 0, True) == (3, 6)
    assert _find_pattern_indices(row, [9, 2, 4]) == (-1, -1)
    assert _find_pattern_indices(row, []) == (-1, -1)
    assert _find_pattern_indices([], [1]) == (-1, -1)


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=4), st.integers(0, 20))
def test_a_pattern_is_where_a_loop_finds_it(row: list[int], pattern: list[int], start: int) -> None:
    places = [i for i in range(len(row) - len(pattern) + 1) if pattern and row[i : i + len(pattern)] == pattern]
    assert pattern_starts(torch.tensor(row, dtype=torch.int64), pattern).tolist() == places
    after = [i for i in places if i >= start]
    assert _find_pattern_indices(row, pattern, start) == ((after[0], after[0] + len(pattern)) if after else (-1, -1))


class Decoder:
    """Takes one form of a token, as some tokenizers do."""

    def __init__(self, form: type) -> None:
        self.form = form

    def decode(self, token: Any) -> str:
        if type(token) is not self.form:
            raise TypeError(token)
        return "text"


@pytest.mark.parametrize("form", [int, list, torch.Tensor])
def test_a_token_is_decoded_in_the_form_that_its_tokenizer_takes(form: type) -> None:
    assert _decode_single_token(Decoder(form), 7) == "text"


def test_a_token_that_no_form_decodes_is_its_number() -> None:
    assert _decode_single_token(Decoder(dict), 7) == "7"


def test_padding_is_what_the_mask_says_or_else_the_padding_token_at_the_end() -> None:
    row = torch.tensor([5, 0, 6, 0, 0])
    assert content_end(row, torch.tensor([1, 1, 1, 1, 0]), 0) == 4
    assert content_end(row, None, 0) == 3
    assert content_end(row, None, 0, keep=0) == 4
    assert content_end(row, None, None) == 5
    assert content_end(torch.zeros(3, dtype=torch.int64), None, 0) == 0


# Markers in ids


def markers(row: list[int], marker: list[int], **options: Any) -> list[int]:
    return _build_labels_from_markers(torch.tensor([row]), marker, 9, **options)[0].tolist()


def test_a_turn_is_labelled_up_to_and_including_its_stop() -> None:
    assert markers([1, 2, 5, 6, 9, 7, 1, 2, 8, 9, 3], [1, 2]) == [-100, -100, 5, 6, 9, -100, -100, -100, 8, 9, -100]


def test_an_empty_turn_is_its_stop() -> None:
    assert markers([1, 2, 9, 4], [1, 2]) == [-100, -100, 9, -100]


def test_a_marker_inside_a_turn_opens_nothing() -> None:
    assert markers([1, 2, 5, 1, 2, 6, 9, 7], [1, 2]) == [-100, -100, 5, 1, 2, 6, 9, -100]
    assert markers([1, 1, 1, 9], [1]) == [-100, 1, 1, 9]


def test_a_turn_without_a_stop_ends_with_its_row() -> None:
    assert markers([3, 1, 2, 5, 6], [1, 2]) == [-100, -100, -100, 5, 6]


@pytest.mark.parametrize("pad", [0, 9], ids=["a token of its own", "the stop token"])
def test_a_turn_without_a_stop_does_not_label_padding(pad: int) -> None:
    """Defect 2B.11: labels run to the end of the padding."""
    row, mask = [1, 2, 5, 6, pad, pad], torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert markers(row, [1, 2], attention_mask=mask) == [-100, -100, 5, 6, -100, -100]
    if pad == 0:
        assert markers(row, [1, 2], pad_token_id=pad) == [-100, -100, 5, 6, -100, -100]


def test_a_stop_that_also_pads_is_labelled_once() -> None:
    assert markers([1, 2, 5, 9, 9, 9], [1, 2], pad_token_id=9) == [-100, -100, 5, 9, -100, -100]


def test_an_empty_marker_is_refused() -> None:
    """Defect 2B.11: it loops for ever."""
    with pytest.raises(ValueError, match="the assistant marker is empty"):
        markers([1, 2], [])


def test_a_marker_at_the_end_or_none_labels_nothing() -> None:
    assert markers([5, 1, 2], [1, 2]) == [-100] * 3
    assert markers([5, 6, 9], [1, 2]) == [-100] * 3
    assert _build_labels_from_markers(torch.zeros(2, 0, dtype=torch.int64), [1], 9).shape == (2, 0)


def by_the_loop(row: list[int], marker: list[int], stop: int) -> list[int]:
    """The description, token by token."""
    labels, place = [IGNORED] * len(row), 0
    while place < len(row):
        if row[place : place + len(marker)] != marker:
            place += 1
            continue
        place += len(marker)
        while place < len(row):
            labels[place] = row[place]
            place += 1
            if row[place - 1] == stop:
                break
    return labels


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 5, 9]), max_size=30), st.sampled_from([[1], [1, 2], [2, 2], [1, 2, 1], [9, 1]]))
def test_labels_are_those_of_the_loop(row: list[int], marker: list[int]) -> None:
    assert markers(row, marker) == by_the_loop(row, marker, 9)


# Markers of templates


def test_markers_are_learned_from_the_template() -> None:
    marker, stop = _derive_turn_markers(BYTES)
    assert BYTES.decode(marker) == "<|im_start|>assistant\n"
    assert BYTES.decode([stop]) == "<|im_end|>"
    assert (marker, stop) == (_get_assistant_marker(BYTES), _get_stop_token_id(BYTES))


class Wrapped:
    """A tokenizer that returns tokens in another form, or prints other texts."""

    def __init__(self, form: Any = list, template: str | None = None) -> None:
        self.form, self.template, self.rendered = form, template, 0

    def apply_chat_template(self, messages: Any, tokenize: bool = True, add_generation_prompt: bool = False) -> Any:
        self.rendered += 1
        options = {} if self.template is None else {"chat_template": self.template}
        found = BYTES.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False, **options
        )
        return self.form(found)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return BYTES.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Any) -> str:
        return BYTES.decode(tokens)


@pytest.mark.parametrize(
    "form",
    [
        list,
        lambda ids: {"input_ids": ids},
        lambda ids: BatchEncoding({"input_ids": [ids]}),
        lambda ids: torch.tensor([ids]),
    ],
    ids=["list", "dict", "BatchEncoding", "tensor"],
)
def test_a_template_may_return_tokens_in_any_form(form: Any) -> None:
    assert _derive_turn_markers(Wrapped(form)) == _derive_turn_markers(BYTES)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}"
    "{% if m.role == 'assistant' and '<think>' not in m.content and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}{% for c in m.content %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def test_the_marker_is_what_all_turns_have_in_common() -> None:
    """With the last turn's empty thinking in it, the marker would miss the turns before."""
    tokenizer = Wrapped(template=THINKING)
    marker, _ = _derive_turn_markers(tokenizer)
    assert BYTES.decode(marker) == "<|im_start|>assistant\n"
    messages = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b")] * 2]
    ids = torch.tensor([tokenizer.apply_chat_template(messages)])
    assert words(build_labels_from_template(ids, [messages], tokenizer)[0]) == "b<|im_end|><think></think>b<|im_end|>"


def test_a_template_may_take_parts_alone() -> None:
    assert _derive_turn_markers(Wrapped(template=PARTS)) == _derive_turn_markers(BYTES)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content }}", "not in the rendered conversation"),
        ("{% for m in messages %}<s>{{ m.content }}{% endfor %}", "nothing follows an answer"),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "nothing precedes an answer"),
        ("{{ raise_exception('not so') }}", "not so"),
    ],
    ids=["answer not printed", "nothing behind", "nothing before", "refused"],
)
def test_a_template_that_does_not_tell_is_an_error(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"no markers in the chat template: .*{reason}"):
        _derive_turn_markers(Wrapped(template=template))


def test_markers_are_learned_once_per_tokenizer_and_template() -> None:
    tokenizer = Wrapped()
    found = turn_markers(tokenizer)
    count = tokenizer.rendered
    assert [turn_markers(tokenizer) for _ in range(3)] == [found] * 3
    assert tokenizer.rendered == count
    tokenizer.chat_template = "another"  # type: ignore[attr-defined]
    turn_markers(tokenizer)
    assert tokenizer.rendered == 2 * count


def test_known_markers_do_not_keep_a_tokenizer_alive() -> None:
    before = len(turn_labels._KNOWN)
    tokenizer = Wrapped()
    turn_markers(tokenizer)
    assert len(turn_labels._KNOWN) == before + 1
    del tokenizer
    assert len(turn_labels._KNOWN) == before


def test_a_failure_is_learned_once_too() -> None:
    tokenizer = Wrapped(template="{{ messages[0].content }}")
    for _ in range(2):
        with pytest.raises(ValueError, match="markers"):
            turn_markers(tokenizer)
    count = tokenizer.rendered
    with pytest.raises(ValueError, match="markers"):
        turn_markers(tokenizer)
    assert tokenizer.rendered == count


def test_a_tokenizer_without_these_tokens_has_no_marker_of_that_name() -> None:
    class Without:
        unk_token_id = 3

        def convert_tokens_to_ids(self, token: str) -> int:
            return 3

    assert _get_assistant_marker(Without()) is None
    assert _get_stop_token_id(Without()) is None
    assert _get_stop_token_id(object()) is None


# Labels by template are those of rendered spans

TEXTS = st.text(st.sampled_from("ab \n.\u00e9\u4e2d\U0001f600"), max_size=8) | st.sampled_from(
    ["red", " red", "is it red or blue ?", "assistant", "assistant\n", "user\n", "\n", "\n\n", "\nred", " \n\nred\n"]
)


@TOKENIZERS
@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6))
@worked(["is it red or blue ?", "red"])
@worked(["red", "red", "red", "red"])
@worked(["a", "\n\nred"])
@worked(["a", "", "b", ""])
def test_labels_by_template_are_the_exact_ones(tokenizer: Any, texts: list[str]) -> None:
    """Answers that also stand in the question, empty ones, several turns, any script, borders that merge."""
    ids, labels, messages = exact(tokenizer, *texts[: len(texts) // 2 * 2])
    found = build_labels_from_template(ids[None], [messages], tokenizer)[0]
    assert found.tolist() == labels.tolist()


def test_rows_of_a_batch_are_labelled_by_themselves() -> None:
    rows = [exact(BYTES, "q", "a" * n) for n in (1, 9, 4)]
    ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    labels = build_labels_from_template(ids, [row[2] for row in rows], BYTES)
    for (_, expected, _), found in zip(rows, labels):
        assert found[: len(expected)].tolist() == expected.tolist()
        assert (found[len(expected) :] == IGNORED).all()


def test_a_cut_turn_is_labelled_to_the_cut_and_not_on_padding() -> None:
    ids, labels, messages = exact(BYTES, "q", "answer")
    cut, stop = len(ids) - 4, BYTES.convert_tokens_to_ids("<|im_end|>")
    for pad in (0, stop):
        row = torch.cat([ids[:cut], ids.new_full((5,), pad)])
        mask = (torch.arange(len(row)) < cut).long()
        found = build_labels_from_template(row[None], [messages], BYTES, attention_mask=mask[None])[0]
        assert found[:cut].tolist() == labels[:cut].tolist()
        assert (found[cut:] == IGNORED).all()


def test_a_sample_whose_answers_are_not_found_is_said(caplog: pytest.LogCaptureFixture) -> None:
    turn_labels._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        labels = build_labels_from_template(torch.tensor([[7, 8, 9]]), [[{"role": "assistant", "content": "x"}]], BYTES)
    assert (labels == IGNORED).all()
    assert "not trained on" in caplog.text


# The last resort


class Plain:
    """A tokenizer without a template."""

    pad_token_id, eos_token, eos_token_id = 0, "<|im_end|>", 3

    def __init__(self, tokenizer: Any) -> None:
        self.encode, self.decode = tokenizer.encode, tokenizer.decode


@TOKENIZERS
@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6))
@worked(["is it red or blue ?", "red"])
@worked(["red", "red", "red", "red"])
@worked(["assistant", "assistant", "assistant", "assistant"])
@worked(["user", "user", "user", "user"])
@worked(["\nred", "red", "red", "red"])
@worked(["", "\nred", "", "", "", "red"])
def test_a_search_never_labels_a_question(tokenizer: Any, texts: list[str]) -> None:
    """Defect 2B.10: "red" in "is it red or blue ?" is supervised, and the answer is not."""
    ids, labels, messages = exact(tokenizer, *texts[: len(texts) // 2 * 2])
    found = build_labels(ids[None], [messages], Plain(tokenizer))[0]
    wrong = (found != IGNORED) & (labels == IGNORED)
    assert not wrong.any(), tokenizer.decode(ids[wrong])
    assert (found[found != IGNORED] == ids[found != IGNORED]).all()


@TOKENIZERS
@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abcdef", min_size=6, max_size=9), min_size=2, max_size=6, unique=True))
def test_a_search_finds_what_stands_in_one_place(tokenizer: Any, texts: list[str]) -> None:
    ids, labels, messages = exact(tokenizer, *[f"<{text}>" for text in texts[: len(texts) // 2 * 2]])
    assert build_labels(ids[None], [messages], Plain(tokenizer))[0].tolist() == labels.tolist()


def test_a_search_finds_answers_that_stand_in_their_questions() -> None:
    ids, labels, messages = exact(BYTES, "is it red or blue ?", "red", "red again ?", "red", "blue ?", "it is blue")
    assert build_labels(ids[None], [messages], Plain(BYTES))[0].tolist() == labels.tolist()
    assert build_labels_from_template(ids[None], [messages], Plain(BYTES))[0].tolist() == labels.tolist()


def test_an_answer_that_is_not_found_does_not_end_the_search(caplog: pytest.LogCaptureFixture) -> None:
    """Defect 2A.11: everything behind it is not trained on."""
    ids, _, messages = exact(BYTES, "one ?", "first", "two ?", "second", "three ?", "third")
    messages[1]["content"] = "another text"
    with caplog.at_level(logging.WARNING):
        found = build_labels(ids[None], [messages], Plain(BYTES))[0]
    assert words(found) == "second<|im_end|>third<|im_end|>"
    assert "not trained on: 'another text'" in caplog.text


def test_what_cannot_be_told_apart_is_not_labelled(caplog: pytest.LogCaptureFixture) -> None:
    """The question is not found (it was cut), and the answer's words are in it."""
    ids, _, messages = exact(BYTES, "is it red", "red")
    messages[0]["content"] = "I ask: is it red or blue, or something else"
    with caplog.at_level(logging.WARNING):
        found = build_labels(ids[None], [messages], Plain(BYTES))[0]
    assert (found == IGNORED).all()
    assert "cannot be told from its question" in caplog.text


def test_an_answer_is_all_its_text_parts() -> None:
    message = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b", {"text": "c"}]}
    assert _extract_assistant_text(message) == "abc"
    assert _extract_assistant_text({"content": "plain"}) == "plain"
    assert _extract_assistant_text({"content": None}) == ""
    ids, labels, _ = exact(BYTES, "q", "one two")
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]
    assert build_labels(ids[None], [messages], Plain(BYTES))[0].tolist() == labels.tolist()


def test_space_around_an_answer_may_be_cut_by_the_template() -> None:
    ids, labels, messages = exact(BYTES, "q", "answer")
    messages[1]["content"] = "  answer\n"
    assert build_labels(ids[None], [messages], Plain(BYTES))[0].tolist() == labels.tolist()
