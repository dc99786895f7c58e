"""The one table of answers: what Iterable, or whoever stands in its place, does with a call, and what it means.

It is run on the pure functions, through the client and through main.py.
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
TAKEN = ("ExternalKeyConflict", "EmailAlreadyExists", "UserIdAlreadyExists")
NO_ROOM = "the project has no room for new fields: delete unused ones in Iterable"
NO_TRACKING = "tracking is switched off for this user or event: see the project's settings in Iterable"
TOO_SLOW = "no answer in time: Iterable is slow or out of reach; ITERABLE_TIMEOUT is the time it gets"
BROKEN = f"the connection broke before the answer was whole: {CHECK_URL}"


def document(code: str | None, msg: str = "", params: Any = None) -> str:
    """A body of the single endpoints."""
    return json.dumps({"msg": msg, "code": code, "params": params})


@dataclass(frozen=True)
class Answer:
    """`fault` are keywords of StandIn.fault(), `result` is what the first try of users/update makes of it."""

    id: str
    fault: dict[str, Any]
    result: CallResult

    def after(self, most: int) -> CallResult:
        """What comes of a call that meets nothing else and may be tried `most` times. A 429 is no try."""
        return replace(self.result, attempts=most if self.result.retryable else 1)


def success(id: str, status: int, text: str, message: str = "") -> Answer:
    return Answer(id, {"status": status, "body": text}, CallResult(USERS_UPDATE, True, status, "Success", message))


def failure(id: str, status: int, text: str, reason: str, code: str | None = None, message: str = "") -> Answer:
    """Tried again when its status says so."""
    result = CallResult(USERS_UPDATE, False, status, code, message, reason, text[:500], retryable=status in AGAIN)
    return Answer(id, {"status": status, "body": text}, result)


def refusal(status: int, code: str, message: str, reason: str, id: str = "", params: Any = None) -> Answer:
    return failure(id or f"{status} {code}", status, document(code, message, params), reason, code, message)


def mismatch(status: int, *fields: str) -> Answer:
    """Never tried again: the same payload would clash with the same type."""
    words = "; ".join(f"field {field}: Iterable expects long, but string or keyword was sent" for field in fields)
    params = {"validationErrors": dict.fromkeys(fields, CLASH)} if fields else None
    reason = f"{words or 'a field has another type'}: correct the column, or the field's type in Iterable"
    answer = refusal(status, "RequestFieldsTypesMismatched", "Types!", reason, f"{status}, clash of {fields}", params)
    return replace(answer, result=replace(answer.result, retryable=False))


def no_answer(id: str, words: str, action: str, **rule: Any) -> Answer:
    result = CallResult(USERS_UPDATE, False, message=words, reason=words, retryable=True)
    return Answer(id, {"action": action, **rule}, result)


PAGE = "<html>\n <h1>Sign\tin</h1>\r\n</html>"
CLASH = {"expectedType": "long", "incomingTypes": ["string", "keyword"], "offendingValue": "pro"}

ANSWERED = [
    success("200 Success", 200, SUCCESS),
    success("299 Success", 299, document("Success", "Event 1 tracked.", {"id": "1"}), "Event 1 tracked."),
    refusal(200, "Success", "Event e is disallowed from tracking.", NO_TRACKING, "200 that is not tracked"),
    refusal(200, "BadParams", "no such campaign", "no such campaign"),
    refusal(200, "success", "", "Iterable does not say why", "200 in another case"),
    failure("200 with a page", 200, PAGE, NOT_ITERABLE),
    failure("200 cut short", 200, '{"msg":"","code":"Suc', NOT_ITERABLE),
    failure("200 with a list", 200, '["Success"]', NOT_ITERABLE),
    failure("200 with other types", 200, '{"msg":5,"code":["Success"]}', NOT_ITERABLE),
    failure("204", 204, "", NOT_ITERABLE),
    *(failure(f"{status}", status, "", REDIRECT) for status in (300, 301, 308)),
    failure("302 Success", 302, SUCCESS, REDIRECT, "Success"),
    refusal(400, "InvalidEmailAddressError", "Invalid email: 000", BAD_ADDRESS),
    refusal(400, "Success", "an error all the same", "an error all the same"),
    refusal(400, "UniqueFieldsLimitExceeded", "too many", NO_ROOM),
    mismatch(400, "plan_type"),
    mismatch(500, "plan_type", "first_name"),
    mismatch(500),
    refusal(401, "BadApiKey", "Invalid API key", KEY_REFUSED),
    refusal(401, "Success", "", KEY_REFUSED),
    failure("403", 403, "", KEY_REFUSED),
    failure("404 with a page", 404, PAGE, NOT_ITERABLE),
    refusal(409, "ForgottenUserError", "User x has been forgotten", "User x has been forgotten"),
    *(refusal(409, code, "", IDENTITY) for code in TAKEN),
    *(failure(f"{status}", status, "", NOT_ITERABLE) for status in (413, 501, 505)),
    *(failure(f"{status}", status, "", IN_TROUBLE) for status in (408, 500, 502, 503, 504)),
    failure("502 with a page", 502, PAGE, IN_TROUBLE),
    refusal(503, "Success", "", IN_TROUBLE),
    refusal(429, "RateLimitExceeded", "Rate limit exceeded", THROTTLED),
    failure("429 with a page", 429, PAGE, THROTTLED),
]
ON_THE_WAY = [
    no_answer("reset before the call is processed", BROKEN, "reset_before"),
    no_answer("reset after the call was processed", BROKEN, "reset_after"),
    no_answer("connection closed in mid-answer", BROKEN, "cut"),
    no_answer("not HTTP", BROKEN, "raw", body="SSH-2.0-OpenSSH_9.2\r\n"),
    no_answer("silence", TOO_SLOW, "silence"),
]  # the last one takes the whole ITERABLE_TIMEOUT at each try


GROUP = ("user1@example.com", "user2@example.com", "user3@example.com")  # as conftest's customers(3) has them
ONE, TWO, THREE = GROUP


class BulkAnswer(Answer):
    """`fault` is answered to a bulk call for GROUP; `result` is what the first try of users/bulkUpdate makes of it."""

    @property
    def confirmed(self) -> tuple[str, ...]:
        """Who was told by it; everyone else gets a single call."""
        return tuple(email for email in GROUP if self.result.ok and email not in self.result.unconfirmed)


def believed(id: str, successes: int, named: tuple[str, ...] = (), status: int = 200, **more: Any) -> BulkAnswer:
    """An answer that confirms everyone of the group but those who are `named`."""
    text = json.dumps({"successCount": successes, "failCount": len(named), **more})
    result = CallResult(USERS_BULK_UPDATE, True, status, unconfirmed=frozenset(named))
    return BulkAnswer(id, {"status": status, "body": text}, result)


def doubtful(id: str, successes: Any, failures: Any, **more: Any) -> BulkAnswer:
    """An answer with counts, which does not add up and so tells nothing about anybody."""
    text = json.dumps({"successCount": successes, "failCount": failures, **more})
    reason, message = "the answer does not add up", more.get("msg", "")
    result = CallResult(USERS_BULK_UPDATE, False, 200, message=message, reason=reason, body=text)
    return BulkAnswer(id, {"status": 200, "body": text}, result)


def whole(answer: Answer) -> BulkAnswer:
    """Refused or lost as a whole, in the same words as a single call."""
    said: dict[str, Any] = {"reason": "the answer does not add up"} if answer.fault["status"] < 300 else {}
    result = replace(answer.result, endpoint=USERS_BULK_UPDATE, ok=False, code=None, **said)
    return BulkAnswer(answer.id, answer.fault, result)


COUNTS = '{"successCount":3,"failCount":0}'
BULK = [
    believed("all", 3, invalidEmails=[], failedUpdates={"invalidEmails": []}, disallowedEventNames=[]),
    believed("all, in 202, with new fields", 3, status=202, createdFields=["plan_type"], failedUpdates=None),
    believed("one failed, in another case", 2, (TWO,), failedUpdates={"forgottenEmails": [TWO.upper()]}),
    believed("one failed, in both lists", 2, (TWO,), invalidEmails=[TWO], failedUpdates={"invalidEmails": [TWO]}),
    believed("one failed, twice in a list of another name", 2, (TWO,), failedUpdates=[TWO, TWO.title()]),
    believed("one failed, and a stranger", 2, (ONE,), failedUpdates={"notFoundEmails": ["old@example.com", ONE]}),
    believed("two failed", 1, (ONE, THREE), invalidEmails=[THREE], failedUpdates={"forgottenEmails": [ONE]}),
    believed("all failed", 0, GROUP, failedUpdates={"invalidEmails": [*GROUP]}),
    doubtful("an event is disallowed", 3, 0, disallowedEventNames=["page_view"]),
    doubtful("an event is disallowed, in words", 3, 0, msg="Event page_view is disallowed from tracking"),
    doubtful("a refusal beside counts that add up", 3, 0, code="BadParams"),
    doubtful("one failed, unnamed", 2, 1, failedUpdates={"invalidEmails": []}),
    doubtful("one failed, whom another is named for", 2, 1, failedUpdates={"conflictEmails": [TWO]}),
    doubtful("one failed, something else is named", 2, 1, invalidEmails=["pro", None, 2], failedUpdates=TWO),
    doubtful("one failed, two are named", 2, 1, invalidEmails=[ONE, TWO]),
    doubtful("none failed, one is named", 3, 0, invalidEmails=[ONE]),
    doubtful("one more failed than was sent", 3, 1),
    doubtful("too many", 4, 0),
    doubtful("too few", 2, 0),
    doubtful("fewer than none", 4, -1),
    doubtful("counts the other way round", 1, 2, invalidEmails=[TWO]),
    doubtful("a failCount of null", 3, None),
    doubtful("counts in texts", "3", "0"),
    doubtful("lists for counts", [3], []),
    whole(failure("neither count", 200, '{"invalidEmails":[]}', NOT_ITERABLE)),
    whole(success("the Success of a single call", 200, SUCCESS)),
    whole(failure("200 with a page", 200, PAGE, NOT_ITERABLE)),
    whole(failure("200 cut short", 200, COUNTS[:-1], NOT_ITERABLE)),
    whole(failure("200 with a list", 200, f"[{COUNTS}]", NOT_ITERABLE)),
    whole(failure("307 that counts", 307, COUNTS, REDIRECT)),
    whole(failure("400 that counts", 400, COUNTS, NOT_ITERABLE)),
    whole(refusal(400, "BatchTooLarge", "too many users", "too many users")),
    whole(mismatch(400, "plan_type")),
    whole(failure("404 with a page", 404, PAGE, NOT_ITERABLE)),
    whole(failure("413", 413, "<h1>too large</h1>", NOT_ITERABLE)),
    whole(failure("503 that counts", 503, COUNTS, IN_TROUBLE)),
]
