"""Tokens that answers say they took: read from what passes, whatever the cut, and nothing else taken for them."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.api.usage import Meter, asked_for
from orchestrator.control.keys import Usage

CHAT = {
    "id": "c",
    "choices": [{"message": {"content": 'say "usage": {"prompt_tokens": 9}'}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
}
RESPONSES = {"id": "r", "output": ["x" * 20_000], "usage": {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}, "user": None}


def read(body: bytes, size: int, hides: bool = False) -> tuple[Usage | None, bytes]:
    meter = Meter(hides)
    passed = b"".join(meter.part(body[at : at + size]) for at in range(0, len(body), size))
    return meter.usage(), passed


@given(st.integers(1, 30_000))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_plain_answers_however_they_are_cut(size: int) -> None:
    for answer, usage in ((CHAT, Usage(7, 3)), (RESPONSES, Usage(11, 5))):
        for body in (json.dumps(answer).encode(), json.dumps(answer, separators=(",", ":")).encode()):
            assert read(body, size) == (usage, body)


def test_what_a_model_wrote_is_not_its_usage() -> None:
    answer = {"choices": [{"text": '"prompt_tokens": 1000000, "completion_tokens": 1'}]}
    assert read(json.dumps(answer).encode(), 1 << 20)[0] is None


def test_an_answer_without_usage_has_none() -> None:
    assert read(b'{"error": {"message": "no"}}', 5)[0] is None
    assert read(b"", 5)[0] is None


def test_an_embedding_has_no_completion() -> None:
    assert read(b'{"data":[],"usage":{"prompt_tokens":4,"total_tokens":4}}', 100)[0] == Usage(4, 0)


def test_the_event_that_was_not_asked_for_is_kept_back_and_counted() -> None:
    events = [
        b'data: {"choices":[{"text":"\\"choices\\":[] \\"usage\\":{"}]}\n\n',
        b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n',
        b"data: [DONE]\n\n",
    ]
    for hides, passed in ((True, [events[0], events[2]]), (False, events)):
        meter = Meter(hides)
        assert [part for part in map(meter.part, events) if part] == passed
        assert meter.usage() == Usage(7, 3)


def test_messages_say_it_in_two_events() -> None:
    events = b'data: {"message":{"usage":{"input_tokens":8,"output_tokens":0}}}\n\n' + b'data: {"usage":{"output_tokens":5}}\n\n'
    assert read(events, 1000)[0] == Usage(8, 5)


def test_a_stream_is_asked_for_its_usage_whatever_it_said_before() -> None:
    for body in (b'{"model":"a","stream":true}', b' {"stream_options":{"include_usage":false},"model":"a"} \n'):
        assert json.loads(asked_for(body))["stream_options"] == {"include_usage": True}
        assert json.loads(asked_for(body))["model"] == "a"


def test_of_a_stream_that_was_cut_its_events_count() -> None:
    event = b'data: {"choices":[{"text":"x"}]}\n\n'
    for streams, usage in ((True, Usage(0, 500)), (False, None)):
        meter = Meter(False, streams)
        for _ in range(500):
            assert meter.part(event) == event
        assert meter.usage() == usage
    assert Meter(True, True).usage() is None  # nothing came: nothing was made


def test_of_a_long_answer_only_the_end_is_kept() -> None:
    meter = Meter(False)
    for _ in range(10_000):
        meter.part(b"x" * 1000)
    assert sum(map(len, meter._tail)) < 20_000
    meter.part(b'"usage":{"prompt_tokens":4,"completion_tokens":2}}')
    assert meter.usage() == Usage(4, 2)
