"""The one table of answers: what Iterable, or whoever stands in its place, does with a call, and what it means.

Test files run it where it makes a difference: on interpret() and interpret_bulk(), through the client, through main.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from iterable_client import CallResult
from lab.standin_handle import USERS_BULK_UPDATE, USERS_UPDATE

AGAIN = (408, 429, 500, 502, 503, 504)
SUCCESS = '{"msg":"","code":"Success","params":null}'
CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
NOT_ITERABLE = "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
REDIRECT = f"a redirect, which is never followed: {NOT_ITERABLE}"
IN_TROUBLE = "Iterable is in trouble: run again later, and see https://status.iterable.com"
KEY_REFUSED = (
    "Iterable refused the API key: check ITERABLE_API_KEY (a server-side key of this project, not disabled), and that "
    "ITERABLE_API_BASE_URL is that of its region: https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
THROTTLED = "the project's rate limit was used up: lower ITERABLE_RATE_LIMIT, or run when less else writes"
BAD_ADDRESS = "Iterable refuses the address as invalid: correct it in the customers table"
IDENTITY = "another user of the project has this identity: merge the two in Iterable"
NO_ROOM = "the project has no room for new fields: delete unused ones in Iterable"
NO_TRACKING = "tracking is switched off for this user or event: see the project's settings in Iterable"
NO_WORD = "Iterable does not say why"
TOO_SLOW = "no answer in time: Iterable is slow or out of reach; ITERABLE_TIMEOUT is the time it gets"
BROKEN = f"the connection broke before the answer was whole: {CHECK_URL}"
CURE = "correct the column, or the field's type in Iterable"
NOT_ADDED_UP = "the answer does not add up"


def document(code: str | None, msg: str = "", params: Any = None) -> str:
    """A body of the single endpoints."""
    return json.dumps({"msg": msg, "code": code, "params": params})


@dataclass(frozen=True)
class Answer:
    """`fault` are keywords of StandIn.fault(), `result` is what the first try of users/update makes of it.

    `result` has all that is told: ok, status, code, message (results file), reason (summary), body (log, after
    "Response: "), headline (log), and `retryable`.
    """

    id: str
    fault: dict[str, Any]
    result: CallResult

    def after(self, most: int, endpoint: str = USERS_UPDATE) -> CallResult:
        """What comes of a call that meets nothing else and may be tried `most` times. A 429 is no try."""
        return replace(self.result, endpoint=endpoint, attempts=most if self.result.retryable else 1)


def success(id: str, status: int, text: str, message: str = "") -> Answer:
    return Answer(id, {"status": status, "body": text}, CallResult(USERS_UPDATE, True, status, "Success", message))


def failure(id: str, status: int, text: str, reason: str, code: str | None = None, message: str = "") -> Answer:
    """Tried again when its status says so."""
    body = " ".join(text.split())[:500]
    result = CallResult(USERS_UPDATE, False, status, code, message, reason, body, retryable=status in AGAIN)
    return Answer(id, {"status": status, "body": text}, result)


def refusal(status: int, code: str, message: str, reason: str, id: str = "") -> Answer:
    return failure(id or f"{status} {code}", status, document(code, message), reason, code, message)


def mismatch(status: int, id: str, params: Any, words: str) -> Answer:
    """Never tried again: the same payload would clash with the same type."""
    code, text = "RequestFieldsTypesMismatched", document("RequestFieldsTypesMismatched", "Types!", params)
    answer = failure(id, status, text, f"{words}: {CURE}", code, "Types!")
    return replace(answer, result=replace(answer.result, retryable=False))


def no_answer(id: str, words: str, action: str, **rule: Any) -> Answer:
    result = CallResult(USERS_UPDATE, False, message=words, reason=words, retryable=True)
    return Answer(id, {"action": action, **rule}, result)


PAGE = "<html>\n <h1>Sign\tin</h1>\r\n</html>"
CLASH = {"expectedType": "long", "incomingTypes": ["string", "keyword"], "offendingValue": "pro"}
CLASHES = "field plan_type: Iterable expects long, but string or keyword was sent"

ANSWERED = [
    success("200 Success", 200, SUCCESS),
    success("201 Success", 201, document("Success", "Event with id: 1234 tracked."), "Event with id: 1234 tracked."),
    success("299 Success", 299, document("Success", "", {"id": "1234"})),
    refusal(200, "Success", "Event e is disallowed from tracking.", NO_TRACKING, "200 that is not tracked"),
    refusal(200, "BadParams", "no such campaign", "no such campaign"),
    refusal(200, "success", "", NO_WORD, "200 in another case"),
    failure("200 with a page", 200, PAGE, NOT_ITERABLE),
    failure("200 cut short", 200, '{"msg":"","code":"Suc', NOT_ITERABLE),
    failure("200 without a body", 200, "", NOT_ITERABLE),
    failure("200 with a list", 200, '["Success"]', NOT_ITERABLE),
    failure("200 with other types", 200, '{"msg":5,"code":["Success"]}', NOT_ITERABLE),
    failure("204", 204, "", NOT_ITERABLE),
    *(failure(f"{status}", status, "", REDIRECT) for status in (300, 301, 302, 303, 307, 308)),
    failure("302 Success", 302, SUCCESS, REDIRECT, "Success"),
    refusal(400, "InvalidEmailAddressError", "Invalid email: 000", BAD_ADDRESS),
    refusal(400, "BadJsonBody", "[/api/users/update] Invalid JSON body", "[/api/users/update] Invalid JSON body"),
    refusal(400, "UniqueFieldsLimitExceeded", "too many", NO_ROOM),
    refusal(400, "Success", "an error all the same", "an error all the same"),
    mismatch(400, "400 with a type that clashes", {"validationErrors": {"plan_type": CLASH}}, CLASHES),
    mismatch(
        500,
        "500 with two types that clash",
        {"validationErrors": {"plan_type": CLASH, "first_name": CLASH}},
        f"{CLASHES}; {CLASHES.replace('plan_type', 'first_name')}",
    ),
    mismatch(500, "500 with types that clash", None, "a field has another type"),
    refusal(401, "BadApiKey", "Invalid API key", KEY_REFUSED),
    refusal(401, "Success", "", KEY_REFUSED),
    failure("401 without a body", 401, "", KEY_REFUSED),
    refusal(403, "Forbidden", "", KEY_REFUSED),
    failure("404 with a page", 404, PAGE, NOT_ITERABLE),
    failure("405", 405, "", NOT_ITERABLE),
    refusal(409, "ForgottenUserError", "User x has been forgotten", "User x has been forgotten"),
    refusal(409, "ExternalKeyConflict", "", IDENTITY),
    refusal(409, "EmailAlreadyExists", "", IDENTITY),
    refusal(409, "UserIdAlreadyExists", "", IDENTITY),
    failure("413", 413, "too large", NOT_ITERABLE),
    failure("501", 501, "", NOT_ITERABLE),
    failure("505", 505, "", NOT_ITERABLE),
    *(failure(f"{status} without a body", status, "", IN_TROUBLE) for status in (408, 500, 502, 503, 504)),
    failure("502 with a page", 502, PAGE, IN_TROUBLE),
    refusal(500, "GenericError", "try later", IN_TROUBLE),
    refusal(503, "Success", "", IN_TROUBLE),
    refusal(429, "RateLimitExceeded", "Rate limit exceeded", THROTTLED),
    failure("429 with a page", 429, PAGE, THROTTLED),
]
ON_THE_WAY = [
    no_answer("reset before the call is processed", BROKEN, "reset_before"),
    no_answer("reset after the call was processed", BROKEN, "reset_after"),
    no_answer("connection closed in mid-answer", BROKEN, "cut"),
    no_answer("connection closed without an answer", BROKEN, "raw"),
    no_answer("not HTTP", BROKEN, "raw", body="SSH-2.0-OpenSSH_9.2\r\n"),
    no_answer("silence", TOO_SLOW, "silence"),
    no_answer("the body drips", TOO_SLOW, "drip_body", interval=0.1),
]  # the last two take the whole ITERABLE_TIMEOUT at each try


@dataclass(frozen=True)
class Passing:
    """Faults, one for each try, after which the call succeeds."""

    id: str
    faults: list[dict[str, Any]]

    @property
    def attempts(self) -> int:
        return len(self.faults) + 1


SOON = {"headers": {"Retry-After": "0"}}
PASSING = [
    Passing("503", [{"status": 503}]),
    Passing("reset, 503", [{"action": "reset_before"}, {"status": 503, **SOON}]),
    Passing("429, lost answer", [{"status": 429, **SOON}, {"action": "reset_after"}]),
    Passing("lost answer, 502 with a page", [{"action": "cut"}, {"status": 502, "body": PAGE, **SOON}]),
    Passing("429, 429, 500, 429", [{"status": status, **SOON} for status in (429, 429, 500, 429)]),
]


GROUP = ("user1@example.com", "user2@example.com", "user3@example.com")  # as conftest's customers(3) has them
ONE, TWO, THREE = GROUP


@dataclass(frozen=True)
class BulkAnswer:
    """`fault` is answered to a bulk call for GROUP; `result` is what the first try of users/bulkUpdate makes of it."""

    id: str
    fault: dict[str, Any]
    result: CallResult

    @property
    def confirmed(self) -> tuple[str, ...]:
        """Who was told by it; everyone else gets a single call."""
        return tuple(email for email in GROUP if self.result.ok and email not in self.result.named)


def bulk(
    id: str, successes: Any, failures: Any, believed: bool, named: tuple[str, ...] = (), status: int = 200, **more: Any
) -> BulkAnswer:
    """`named`: those of the group who are not confirmed by an answer that is believed."""
    counts = {"successCount": successes, "failCount": failures}
    answer = {key: value for key, value in {**counts, **more}.items() if value is not None}
    reason = "" if believed else NOT_ADDED_UP
    result = CallResult(USERS_BULK_UPDATE, believed, status, reason=reason, named=frozenset(named))
    return BulkAnswer(id, {"status": status, "body": json.dumps(answer)}, result)


def whole(answer: Answer) -> BulkAnswer:
    """Refused or lost as a whole, in the same words as a single call."""
    return BulkAnswer(answer.id, answer.fault, replace(answer.result, endpoint=USERS_BULK_UPDATE))


NONE_FAILED: dict[str, Any] = {"invalidEmails": [], "invalidUserIds": [], "failedUpdates": {"invalidEmails": []}}
BULK = [
    bulk("all", 3, 0, True, **NONE_FAILED),
    bulk("all, in 202", 3, 0, True, status=202),
    bulk("all, and new fields", 3, 0, True, createdFields=["plan_type"], filteredOutFields=[], failedUpdates=None),
    bulk("one failed", 2, 1, True, (TWO,), failedUpdates={"invalidDataEmails": [TWO]}),
    bulk("one failed, in another case", 2, 1, True, (TWO,), failedUpdates={"forgottenEmails": [TWO.upper()]}),
    bulk("one failed, in the deprecated list", 2, 1, True, (TWO,), invalidEmails=[TWO]),
    bulk("one failed, in both lists", 2, 1, True, (TWO,), invalidEmails=[TWO], failedUpdates={"invalidEmails": [TWO]}),
    bulk("one failed, in a list of another name", 2, 1, True, (TWO,), failedUpdates=[TWO]),
    bulk("one failed, twice in a list", 2, 1, True, (TWO,), failedUpdates={"notFoundEmails": [TWO, TWO.title()]}),
    bulk("one failed, and a stranger", 2, 1, True, (ONE,), failedUpdates={"notFoundEmails": ["old@example.com", ONE]}),
    bulk("two failed", 1, 2, True, (ONE, THREE), invalidEmails=[THREE], failedUpdates={"forgottenEmails": [ONE]}),
    bulk("all failed", 0, 3, True, GROUP, failedUpdates={"invalidEmails": [*GROUP]}),
    bulk("no event is disallowed", 3, 0, True, disallowedEventNames=[]),
    bulk("an event is disallowed", 3, 0, False, disallowedEventNames=["page_view"]),
    bulk("an event is disallowed, in words", 3, 0, False, msg="Event page_view is disallowed from tracking"),
    bulk("a refusal beside counts that add up", 3, 0, False, code="BadParams"),
    bulk("one failed, unnamed", 2, 1, False, **NONE_FAILED),
    bulk("one failed, a stranger is named", 2, 1, False, failedUpdates={"conflictEmails": ["old@example.com"]}),
    bulk("one failed, whom another is named for", 2, 1, False, failedUpdates={"conflictEmails": [TWO]}),
    bulk("one failed, something else is named", 2, 1, False, invalidEmails=["pro", None, 2], failedUpdates=TWO),
    bulk("one failed, two are named", 2, 1, False, invalidEmails=[ONE, TWO]),
    bulk("none failed, one is named", 3, 0, False, invalidEmails=[ONE]),
    bulk("too many", 4, 0, False),
    bulk("too few", 2, 0, False),
    bulk("fewer than none", 4, -1, False),
    bulk("counts the other way round", 1, 2, False, invalidEmails=[TWO]),
    bulk("no failCount", 3, None, False),
    bulk("counts in texts", "3", "0", False),
    bulk("a failCount that is no number", 3, False, False),
    bulk("a successCount that is no number", True, 2, False, invalidEmails=[ONE, TWO]),
    bulk("lists for counts", [3], [], False),
    whole(failure("neither count", 200, json.dumps(NONE_FAILED), NOT_ITERABLE)),
    BulkAnswer("the Success of a single call", ANSWERED[0].fault, CallResult(USERS_BULK_UPDATE, False, 200, "Success")),
    whole(failure("200 with a page", 200, PAGE, NOT_ITERABLE)),
    whole(failure("200 without a body", 200, "", NOT_ITERABLE)),
    whole(failure("200 cut short", 200, '{"successCount":3,"failCount":0', NOT_ITERABLE)),
    whole(failure("200 with a list", 200, '[{"successCount":3,"failCount":0}]', NOT_ITERABLE)),
    whole(failure("307", 307, '{"successCount":3,"failCount":0}', REDIRECT)),
    whole(failure("400 that counts", 400, '{"successCount":3,"failCount":0}', NOT_ITERABLE)),
    whole(refusal(400, "BatchTooLarge", "too many users", "too many users")),
    whole(refusal(400, "InvalidEmailAddressError", "Emails invalid: ", BAD_ADDRESS)),
    whole(mismatch(400, "400 with a type that clashes", {"validationErrors": {"plan_type": CLASH}}, CLASHES)),
    whole(failure("404 with a page", 404, PAGE, NOT_ITERABLE)),
    whole(failure("413", 413, "<h1>too large</h1>", NOT_ITERABLE)),
    whole(failure("503 that counts", 503, '{"successCount":3,"failCount":0}', IN_TROUBLE)),
    whole(refusal(500, "GenericError", "try later", IN_TROUBLE)),
]
BULK_ON_THE_WAY = [whole(answer) for answer in ON_THE_WAY]
