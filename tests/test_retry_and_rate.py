"""How soon calls are made again, how fast they start, and what a stop cuts short.

Nearly all of it in virtual time, so nothing depends on how fast the machine is.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import iterable_client
from iterable_client import (
    ENDPOINTS,
    EVENTS_TRACK,
    EVENTS_TRACK_BULK,
    USERS_BULK_UPDATE,
    USERS_GET_FIELDS,
    USERS_UPDATE,
    Call,
    CallResult,
    Endpoint,
    HttpAnswer,
    IterableClient,
    KeyRefused,
    NoConnection,
    RateLimiter,
    RetryPolicy,
    RunControl,
    TurnCancelled,
)
from lab.clients import (
    LOST,
    OUTAGE,
    PROMPT,
    SUCCESS,
    Reply,
    build_client,
    make_answer,
    make_event,
    make_update,
    script_client,
)

THROTTLED_40_S = make_answer(429, "RateLimitExceeded", retry_after="40")
THROTTLED = make_answer(429, "RateLimitExceeded", retry_after="0")
REFUSED_KEY = make_answer(401, "BadApiKey", "Invalid API key")


# The retry policy


@pytest.mark.parametrize(
    ("failed_attempts", "longest"),
    [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (100, 30)],
)
def test_waits_double_up_to_30_seconds(failed_attempts: int, longest: float) -> None:
    policy = RetryPolicy()

    with mock.patch("random.uniform") as uniform:
        wait = policy.compute_wait(failed_attempts, None)

    uniform.assert_called_once_with(0, longest)
    assert wait is uniform.return_value


def test_waits_have_full_jitter() -> None:
    waits = [RetryPolicy().compute_wait(4, None) for _ in range(500)]

    assert 0 <= min(waits) < 0.4
    assert 3.6 < max(waits) <= 4


def test_a_wait_is_as_long_as_the_server_asks() -> None:
    assert RetryPolicy().compute_wait(1, 77.0) == 77.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (" 7 ", 7),
        ("120", 120),
        ("86400", 120),
        ("9" * 400, 120),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 120),
    ],
)
def test_retry_after_is_honoured_up_to_two_minutes(header: str, seconds: float) -> None:
    assert RetryPolicy().parse_retry_after(header) == seconds


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "soon",
        "0",
        "-5",
        "1, 2",
        "\xb2",
        "32 Dec 2026",
        "Wed, 21 Oct 2015 07:28:00 GMT",
    ],
)
def test_another_retry_after_is_none(header: str | None) -> None:
    assert RetryPolicy().parse_retry_after(header) is None


@pytest.mark.parametrize(
    "form",
    ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"],
)
def test_retry_after_may_be_a_date_in_utc(form: str) -> None:
    then = datetime.now(timezone.utc) + timedelta(seconds=100)

    seconds = RetryPolicy().parse_retry_after(then.strftime(form))

    assert seconds is not None
    assert 50 < seconds <= 100


# Virtual time


class Clock:
    """Virtual time, which passes while something waits. Each wait ends a little `late`.

    Attributes:
        now: Seconds.
    """

    def __init__(self, late: Sequence[float] = (0.0,)) -> None:
        self.now = 1000.0
        self._late = itertools.cycle(late)

    def let_pass(self, seconds: float) -> None:
        """Wait."""
        self.now += seconds + next(self._late)

    def make_event(self) -> threading.Event:
        """Return an event for which something waits in this time. It never comes."""
        event = threading.Event()

        def wait(timeout: float | None = None) -> bool:
            self.let_pass(timeout or 0.0)
            return False

        event.wait = wait  # type: ignore[method-assign]
        return event


@pytest.fixture
def clock() -> Iterator[Clock]:
    """The clock that the client sees."""
    clock = Clock()
    with mock.patch("iterable_client.monotonic", side_effect=lambda: clock.now):
        yield clock


def start_calls(limiter: RateLimiter, clock: Clock, seconds: float) -> list[float]:
    """Start calls as soon as they may, for so long. Return when they started."""
    end = clock.now + seconds
    starts: list[float] = []
    while clock.now < end:
        limiter.wait_for_turn(clock.make_event())
        starts.append(clock.now)
    return starts


def assert_never_too_many(starts: list[float], rate: float) -> None:
    """Check that no more than `rate` calls start in any second."""
    for first, later in zip(starts, starts[math.ceil(rate) :], strict=False):
        assert later - first >= 1 - 1e-9


# The rate limiter

RATES = st.integers(1, 60) | st.floats(0.2, 10)
DELAYS = st.lists(
    st.sampled_from([0.0, 0.0, 0.001, 0.02]) | st.floats(0, 3), min_size=1, max_size=20
)
# The Retry-After of a 429, None for a success.
REPLIES = st.lists(
    st.sampled_from([None, None, 0.001, 0.1, 2.5]), min_size=1, max_size=9
)


@settings(deadline=None, max_examples=100)
@given(
    rate=RATES,
    latencies=DELAYS,
    late=DELAYS,
    replies=REPLIES,
    stop_after=st.floats(0, 20),
)
def test_no_second_has_more_calls_than_the_rate(
    rate: float,
    latencies: list[float],
    late: list[float],
    replies: list[float | None],
    stop_after: float,
) -> None:
    clock = Clock(late)
    run_is_ending = clock.make_event()
    limiter = RateLimiter(rate, run_is_ending)
    starts: list[float] = []
    pauses: list[tuple[float, float]] = []

    with mock.patch("iterable_client.monotonic", side_effect=lambda: clock.now):
        for latency, retry_after in zip(
            itertools.cycle(latencies), itertools.cycle(replies), strict=False
        ):
            limiter.wait_for_turn(clock.make_event())
            started = clock.now
            starts.append(started)
            clock.now += latency
            if started - starts[0] > 20:
                break
            if started - starts[0] > stop_after:
                run_is_ending.set()
            elif retry_after is not None:
                limiter.slow_down(started, retry_after)
                pauses.append((clock.now, clock.now + retry_after))

    assert_never_too_many(starts, rate)
    if not run_is_ending.is_set():
        for begin, end in pauses:
            assert not [start for start in starts if begin < start < end - 1e-9]


@pytest.mark.parametrize(
    ("rate", "margin"), [(2.5, 1.05), (10, 1.05), (10.5, 1.02), (150, 1.02)]
)
def test_calls_start_evenly(clock: Clock, rate: float, margin: float) -> None:
    limiter = RateLimiter(rate, clock.make_event())

    starts = start_calls(limiter, clock, 20)

    gaps = [after - before for before, after in itertools.pairwise(starts[1:])]
    assert gaps == pytest.approx([margin / rate] * len(gaps))


def test_a_late_thread_does_not_start_calls_together() -> None:
    clock = Clock(late=[0.5, 0.0, 0.0, 0.0])
    limiter = RateLimiter(10, clock.make_event())

    with mock.patch("iterable_client.monotonic", side_effect=lambda: clock.now):
        starts = start_calls(limiter, clock, 20)

    gaps = [after - before for before, after in itertools.pairwise(starts[1:])]
    assert min(gaps) >= 1.05 / 10 - RateLimiter.SLACK - 1e-9


def test_a_429_lowers_the_rate_which_climbs_again(clock: Clock) -> None:
    limiter = RateLimiter(100, clock.make_event())
    speeds = []

    for second in range(40):
        if second == 2:
            limiter.slow_down(clock.now, 0.001)
        speeds.append(len(start_calls(limiter, clock, 1)))

    assert speeds == pytest.approx([98, 98, *range(69, 98), *[98] * 9], abs=2)


def test_refusals_of_one_second_lower_the_rate_once(clock: Clock) -> None:
    limiter = RateLimiter(100, clock.make_event())

    for _ in range(3):
        limiter.slow_down(clock.now, 0.001)

    assert len(start_calls(limiter, clock, 1)) == pytest.approx(69, abs=2)


def test_refusals_from_before_a_pause_are_no_news(clock: Clock) -> None:
    limiter = RateLimiter(50, clock.make_event())
    sent_at = clock.now

    for _ in range(3):
        limiter.slow_down(sent_at, None)
        clock.now += 0.05
    [start, *_] = start_calls(limiter, clock, 1)

    assert start == pytest.approx(sent_at + 0.25)


def test_a_pause_is_as_long_as_the_server_asks(clock: Clock) -> None:
    limiter = RateLimiter(50, clock.make_event())
    refused_at = clock.now

    limiter.slow_down(clock.now, 40.0)
    [start, *_] = start_calls(limiter, clock, 1)

    assert start == pytest.approx(refused_at + 40)


def test_the_end_of_a_run_cuts_a_pause(clock: Clock) -> None:
    run_is_ending = clock.make_event()
    limiter = RateLimiter(50, run_is_ending)
    refused_at = clock.now
    limiter.slow_down(clock.now, 40.0)

    run_is_ending.set()
    [start, *_] = start_calls(limiter, clock, 1)

    assert start == refused_at


def test_a_cancelled_call_gets_no_turn() -> None:
    limiter = RateLimiter(50, threading.Event())
    cancelled = threading.Event()
    cancelled.set()

    with pytest.raises(TurnCancelled):
        limiter.wait_for_turn(cancelled)


def test_each_endpoint_has_the_same_share_of_its_limit() -> None:
    with mock.patch("iterable_client.RateLimiter") as limiter:
        build_client(rate=450)

    rates = [call.args[0] for call in limiter.call_args_list]
    assert dict(zip(ENDPOINTS, rates, strict=True)) == {
        USERS_UPDATE: 450,
        EVENTS_TRACK: 1800,
        USERS_BULK_UPDATE: 4.5,
        EVENTS_TRACK_BULK: 9,
        USERS_GET_FIELDS: pytest.approx(2.7),
    }


# What a run costs


@pytest.mark.parametrize(("users", "seconds"), [(0, 0), (1, 0.004), (1001, 4.004)])
def test_the_seconds_of_single_calls(users: int, seconds: float) -> None:
    client = build_client(rate=250)

    assert client.estimate_seconds(users, bulk=False) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("users", "seconds"), [(0, 0), (1, 0.4), (1000, 0.4), (1001, 0.8)]
)
def test_the_seconds_of_groups(users: int, seconds: float) -> None:
    client = build_client(rate=250)

    assert client.estimate_seconds(users, bulk=True) == pytest.approx(seconds)


def test_the_number_of_single_calls() -> None:
    assert build_client().count_calls(1001, 999, bulk=False) == 2000


@pytest.mark.parametrize(
    ("updates", "events", "calls"),
    [(0, 0, 0), (1, 0, 1), (1000, 1000, 2), (1001, 1000, 3)],
)
def test_the_number_of_groups(updates: int, events: int, calls: int) -> None:
    assert build_client().count_calls(updates, events, bulk=True) == calls


# How often a call is made


@pytest.mark.parametrize("failure", [OUTAGE, LOST], ids=["503", "no answer"])
@pytest.mark.parametrize("failures", [0, 1, 4])
def test_a_call_is_made_until_it_succeeds(failures: int, failure: Reply) -> None:
    client, transport = script_client(*[failure] * failures, SUCCESS, max_attempts=5)

    result = client.post([make_update()])

    assert result == CallResult(
        "users/update",
        ok=True,
        status=200,
        code="Success",
        attempts=failures + 1,
    )
    assert len(transport.calls) == failures + 1


def test_a_call_is_made_so_often_at_most() -> None:
    client, transport = script_client(OUTAGE, max_attempts=5)

    result = client.post([make_update()])

    assert result.attempts == 5
    assert len(transport.calls) == 5


def test_a_429_uses_up_no_attempt() -> None:
    client, transport = script_client(
        THROTTLED, OUTAGE, THROTTLED, OUTAGE, max_attempts=2
    )

    result = client.post([make_update()])

    assert result.status == 503
    assert result.attempts == 4
    assert len(transport.calls) == 4


def test_a_final_answer_is_not_asked_for_again() -> None:
    client, transport = script_client(make_answer(400, "BadParams"))

    client.post([make_update()])

    assert len(transport.calls) == 1


def test_attempts_and_retries_are_counted() -> None:
    client, _ = script_client(OUTAGE, THROTTLED, SUCCESS)

    client.post([make_update(1)])
    client.post([make_update(2)])

    assert client.attempts_made == 4
    assert client.retries_made == 2


def make_virtual(clock: Clock) -> RunControl:
    """Return a control, a wait for the end of which lets the clock go on."""
    control = RunControl()
    control.no_new_users = clock.make_event()
    control.nothing_more = clock.make_event()
    return control


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_call_waits_as_long_as_the_server_asks(clock: Clock, status: int) -> None:
    client, _ = script_client(
        make_answer(status, "GenericError", retry_after="40"),
        SUCCESS,
        control=make_virtual(clock),
    )
    began = clock.now

    result = client.post([make_update()])

    assert result.attempts == 2
    assert clock.now - began == pytest.approx(40)


def test_a_call_that_meets_nothing_but_429_ends_after_5_minutes(clock: Clock) -> None:
    client, transport = script_client(
        make_answer(429, "RateLimitExceeded", retry_after="30"),
        control=make_virtual(clock),
        longest_throttling=RetryPolicy().longest_throttling,
    )
    began = clock.now

    result = client.post([make_update()])

    assert result.status == 429
    assert clock.now - began == pytest.approx(300)
    assert len(transport.calls) == 11


def test_another_answer_ends_the_5_minutes(clock: Clock) -> None:
    throttled = make_answer(429, "RateLimitExceeded", retry_after="100")
    client, _ = script_client(
        throttled,
        throttled,
        LOST,
        throttled,
        throttled,
        SUCCESS,
        control=make_virtual(clock),
    )

    result = client.post([make_update()])

    assert result.ok
    assert result.attempts == 6


@pytest.mark.parametrize("endpoint", [EVENTS_TRACK, USERS_BULK_UPDATE])
def test_a_429_pauses_no_other_endpoint(clock: Clock, endpoint: Endpoint) -> None:
    client, _ = script_client(
        THROTTLED_40_S,
        SUCCESS,
        control=make_virtual(clock),
        longest_throttling=0,
    )
    began = clock.now

    client.post([make_update()])
    make_call(client, endpoint)

    assert clock.now - began < 1


def test_a_429_pauses_the_other_calls_of_its_endpoint(clock: Clock) -> None:
    client, _ = script_client(
        THROTTLED_40_S,
        SUCCESS,
        control=make_virtual(clock),
        longest_throttling=0,
    )
    began = clock.now

    client.post([make_update(1)])
    client.post([make_update(2)])

    assert clock.now - began == pytest.approx(40)


# How a run ends


class SlowControl(RunControl):
    """A control that takes a while to look whether the run has ended."""

    @property
    def _error(self) -> Exception | None:
        found = self.__dict__.get("found")
        threading.Event().wait(0.01)
        return found

    @_error.setter
    def _error(self, error: Exception | None) -> None:
        self.__dict__["found"] = error


def test_all_threads_see_one_ending() -> None:
    control = SlowControl()
    barrier = threading.Barrier(4)

    def end(number: int) -> Exception | None:
        barrier.wait()
        control.end(ValueError(number))
        return control.close()

    with ThreadPoolExecutor(4) as threads:
        seen = set(threads.map(end, range(4)))

    assert len(seen) == 1


def test_a_later_ending_does_not_count() -> None:
    control = RunControl()
    first = ValueError("first")

    control.end(first)
    control.abort(ValueError("second"))

    assert control.close() is first
    assert control.nothing_more.is_set()


def test_a_closed_run_is_not_ended_any_more() -> None:
    control = RunControl()

    assert control.close() is None
    control.end(ValueError("too late"))

    assert control.close() is None
    assert not control.no_new_users.is_set()


def test_an_ending_lets_started_users_go_on() -> None:
    control = RunControl()

    control.end(ValueError())

    assert control.no_new_users.is_set()
    assert not control.nothing_more.is_set()


def test_an_aborted_run_abandons_started_users() -> None:
    control = RunControl()

    control.abort(ValueError())

    assert control.no_new_users.is_set()
    assert control.nothing_more.is_set()


@given(endings=st.lists(st.booleans(), max_size=5))
def test_any_endings_leave_the_first(endings: list[bool]) -> None:
    control = RunControl()
    errors = [ValueError(number) for number in range(len(endings))]

    for error, aborts in zip(errors, endings, strict=True):
        end = control.abort if aborts else control.end
        end(error)

    assert control.close() is (errors[0] if errors else None)
    assert control.no_new_users.is_set() == bool(errors)
    assert control.nothing_more.is_set() == any(endings)


# What a stop cuts short

UPDATES = [USERS_UPDATE, USERS_BULK_UPDATE]
EVENTS = [EVENTS_TRACK, EVENTS_TRACK_BULK]


def find_path(endpoint: Endpoint) -> str:
    return endpoint.path


EACH_UPDATE = pytest.mark.parametrize("endpoint", UPDATES, ids=find_path)
EACH_EVENT = pytest.mark.parametrize("endpoint", EVENTS, ids=find_path)
EACH_ENDPOINT = pytest.mark.parametrize("endpoint", UPDATES + EVENTS, ids=find_path)


def make_call(client: IterableClient, endpoint: Endpoint) -> CallResult | None:
    """Make a call of any endpoint. None if the run ended before it was sent."""
    calls: list[Call] = [make_update(1), make_update(2)]
    if endpoint in EVENTS:
        calls = [make_event(1), make_event(2)]
    try:
        return client.post(calls if endpoint.items_key else calls[:1])
    except TurnCancelled:
        return None


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(9) as pool:
        yield pool


@EACH_ENDPOINT
@pytest.mark.parametrize(
    "failure",
    [
        LOST,
        OUTAGE,
        make_answer(503, "GenericError", retry_after="40"),
        THROTTLED_40_S,
    ],
    ids=["no answer", "503", "503 for 40 s", "429 for 40 s"],
)
def test_a_stop_cuts_the_wait_before_a_retry(
    threads: ThreadPoolExecutor, failure: Reply, endpoint: Endpoint
) -> None:
    client, transport = script_client(failure, longest_wait=1e9)
    calling = threads.submit(make_call, client, endpoint)
    transport.wait_for_calls(1)

    client.control.end(ValueError("stop"))
    result = calling.result(PROMPT)

    assert result is not None
    assert not result.ok
    assert result.attempts == 1
    assert len(transport.calls) == 1


@EACH_UPDATE
def test_a_stop_cuts_the_wait_for_a_turn(
    threads: ThreadPoolExecutor, endpoint: Endpoint
) -> None:
    client, transport = script_client(rate=0.02)
    make_call(client, endpoint)
    calling = [threads.submit(make_call, client, endpoint) for _ in range(8)]

    client.control.end(ValueError("stop"))

    assert [future.result(PROMPT) for future in calling] == [None] * 8
    assert len(transport.calls) == 1


@EACH_EVENT
def test_a_stop_cuts_the_pause_before_an_event(
    threads: ThreadPoolExecutor, endpoint: Endpoint
) -> None:
    client, transport = script_client(THROTTLED_40_S, SUCCESS, longest_throttling=0)
    make_call(client, endpoint)
    calling = threads.submit(make_call, client, endpoint)

    client.control.end(ValueError("stop"))

    assert calling.result(PROMPT) is not None
    assert len(transport.calls) == 2


@EACH_EVENT
def test_an_abandoned_event_does_not_wait_for_its_turn(
    threads: ThreadPoolExecutor, endpoint: Endpoint
) -> None:
    client, transport = script_client(rate=0.002)
    make_call(client, endpoint)
    calling = [threads.submit(make_call, client, endpoint) for _ in range(8)]

    client.control.abort(ValueError("outage"))

    assert [future.result(PROMPT) for future in calling] == [None] * 8
    assert len(transport.calls) == 1


@EACH_ENDPOINT
def test_after_a_stop_events_alone_are_sent(endpoint: Endpoint) -> None:
    client, transport = script_client()
    client.control.end(ValueError("stop"))

    result = make_call(client, endpoint)

    assert client.control.get_stop(endpoint).is_set() == (endpoint in UPDATES)
    if endpoint in EVENTS:
        assert result is not None
        assert result.ok
    else:
        assert result is None
        assert transport.calls == []


@EACH_EVENT
def test_after_a_stop_an_event_is_not_sent_again(endpoint: Endpoint) -> None:
    client, transport = script_client(OUTAGE)
    client.control.end(ValueError("stop"))

    result = make_call(client, endpoint)

    assert result is not None
    assert result.status == 503
    assert len(transport.calls) == 1


@EACH_ENDPOINT
@pytest.mark.parametrize(
    ("failure", "is_untouched"),
    [(LOST, False), (NoConnection("no connection"), True)],
    ids=["no answer", "no connection"],
)
def test_a_call_that_a_stop_kept_from_being_sent_has_no_result(
    failure: Reply, is_untouched: bool, endpoint: Endpoint
) -> None:
    def script(*_: object) -> Reply:
        client.control.end(ValueError("stop"))
        return failure

    client, _ = script_client(script=script)

    assert (make_call(client, endpoint) is None) is is_untouched


@EACH_ENDPOINT
def test_nothing_more_means_no_call(endpoint: Endpoint) -> None:
    client, transport = script_client()
    client.control.abort(ValueError("outage"))

    assert make_call(client, endpoint) is None
    assert transport.calls == []
    assert client.control.get_stop(endpoint).is_set()


# A refused key


@EACH_ENDPOINT
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run(status: int, endpoint: Endpoint) -> None:
    client, transport = script_client(
        make_answer(status, "Forbidden", "Not allowed"), SUCCESS
    )

    result = make_call(client, endpoint)

    assert result is not None
    assert result.status == status
    reason = client.control.close()
    assert isinstance(reason, KeyRefused)
    assert str(reason) == result.reason
    assert 'Iterable refused the API key ("Not allowed")' in str(reason)
    assert make_call(client, endpoint) is None
    assert len(transport.calls) == 1


def test_a_refused_key_after_a_stop_forbids_events_too() -> None:
    client, _ = script_client(REFUSED_KEY)
    stop = ValueError("stop")
    client.control.end(stop)

    client.post([make_event()])

    assert client.control.nothing_more.is_set()
    assert client.control.close() is stop


def test_the_page_of_a_firewall_does_not_end_the_run() -> None:
    page = HttpAnswer(403, "<html>blocked</html>", None, sent_at=0.0)
    client, _ = script_client(page)

    client.post([make_update()])

    assert client.control.close() is None


def test_a_refused_key_lets_the_calls_in_flight_end(
    threads: ThreadPoolExecutor,
) -> None:
    control = RunControl()

    def script(endpoint: str, users: Sequence[str]) -> HttpAnswer:
        if endpoint == USERS_UPDATE.path:
            return REFUSED_KEY
        control.nothing_more.wait(PROMPT)
        return SUCCESS

    client, transport = script_client(script=script, control=control)
    in_flight = threads.submit(client.post, [make_event(1)])
    transport.wait_for_calls(1)

    client.post([make_update(2)])
    result = in_flight.result(PROMPT)

    assert result.ok


# Whether Iterable is there


def test_a_good_call_is_made_again_to_ask() -> None:
    client, transport = script_client()

    assert client.is_available(make_update(7))
    assert transport.calls == ["users/update user7@example.com"]


def test_without_a_good_call_the_fields_are_asked_for() -> None:
    client, transport = script_client()

    assert client.is_available(None)
    assert transport.calls == ["users/getFields"]


@pytest.mark.parametrize("failure", [OUTAGE, LOST])
def test_iterable_is_asked_twice(failure: Reply) -> None:
    client, transport = script_client(failure)

    assert not client.is_available(make_update())
    assert len(transport.calls) == 2


@pytest.mark.parametrize(
    "answer",
    [SUCCESS, make_answer(400, "BadParams"), REFUSED_KEY],
    ids=["200", "400", "401"],
)
def test_any_final_answer_shows_that_iterable_is_there(answer: HttpAnswer) -> None:
    client, transport = script_client(OUTAGE, answer)

    assert client.is_available(make_update())
    assert len(transport.calls) == 2


def test_a_run_that_ends_meanwhile_is_not_unavailable(
    threads: ThreadPoolExecutor,
) -> None:
    client, transport = script_client(OUTAGE, longest_wait=1e9)
    asking = threads.submit(client.is_available, make_update())
    transport.wait_for_calls(1)

    client.control.end(ValueError("stop"))

    assert asking.result(PROMPT)
    assert len(transport.calls) == 1


def test_a_stop_cuts_the_wait_for_the_turn_to_ask(threads: ThreadPoolExecutor) -> None:
    client, transport = script_client(rate=8)
    client.get_fields()
    asking = threads.submit(client.is_available, None)

    client.control.end(ValueError("stop"))

    assert asking.result(PROMPT)
    assert transport.calls == ["users/getFields"]


def test_a_run_that_is_over_asks_nothing() -> None:
    client, transport = script_client()
    client.control.abort(ValueError("outage"))

    assert client.is_available(make_update())
    assert transport.calls == []


# The key and the fields


def test_the_key_is_checked_without_a_user() -> None:
    client, transport = script_client(make_answer(400, "BadParams", "no user"))

    result = client.check_key()

    assert result.status == 400
    assert transport.calls == ["users/update"]


def test_the_fields_are_asked_for() -> None:
    client, transport = script_client()

    result = client.get_fields()

    assert result == iterable_client.CallResult(
        "users/getFields", ok=True, status=200, fields={}
    )
    assert transport.calls == ["users/getFields"]


@pytest.mark.parametrize("name", ["check_key", "get_fields"])
def test_a_refused_key_is_a_result_of_the_check(name: str) -> None:
    client, _ = script_client(REFUSED_KEY)

    result = getattr(client, name)()

    assert result.is_refused_key
    assert client.control.close() is None
