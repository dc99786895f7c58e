"""What Iterable, or a server in its place, may answer, and what it means for a call.

The tables are run on the functions that interpret answers, and through the client:

ANSWERED     answers to a single call
ON_THE_WAY   answers that do not arrive
BULK         answers to a bulk call for the users of GROUP
BULK_USERID  the same for the users of USERID_GROUP
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from iterable_client import CallResult, IdentifyBy, Identity
from lab.standin_handle import USERS_BULK_UPDATE, USERS_UPDATE
from lab.standin_project import make_document

RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_KEPT_TEXT = 500  # characters of an answer that a result keeps

# What a person reads

CHECK_URL = "check ITERABLE_API_BASE_URL and the network"
NOT_ITERABLE = (
    "this is not Iterable's API: check ITERABLE_API_BASE_URL, and any proxy between"
)
REDIRECT = f"a redirect, which is never followed: {NOT_ITERABLE}"
IN_TROUBLE = (
    "Iterable is in trouble: run again later, and see https://status.iterable.com"
)
THROTTLED = (
    "the project's rate limit was used up: lower ITERABLE_RATE_LIMIT,"
    " or run when less else writes"
)
CHECK_KEY = (
    "check ITERABLE_API_KEY (a server-side key of this project, not disabled),"
    " and that ITERABLE_API_BASE_URL is that of its region:"
    " https://api.iterable.com (US) or https://api.eu.iterable.com (EU)"
)
KEY_REFUSED = f'Iterable refused the API key ("Invalid API key"): {CHECK_KEY}'
BAD_ADDRESS = (
    "Iterable refuses the address as invalid: correct it in the customers table"
)
SAME_IDENTITY = (
    "another user of the project has this identity: merge the two in Iterable"
)
NO_ROOM = "the project has no room for new fields: delete unused ones in Iterable"
NOT_TRACKED = (
    "tracking is switched off for this user or event: see the project's settings"
    " in Iterable"
)
CORRECT_TYPE = "correct the column, or the field's type in Iterable"
SILENT_REFUSAL = "Iterable does not say why"
DOUBTFUL = "the answer does not add up"
TOO_SLOW = (
    "no answer in time: Iterable is slow or out of reach;"
    " ITERABLE_TIMEOUT is the time it gets"
)
BROKEN = f"the connection broke before the answer was whole: {CHECK_URL}"

# Bodies

PAGE = "<html>\n <h1>Sign\tin</h1>\r\n</html>"
OTHER_JSON = '{"error":"forbidden"}'


def make_body(code: str, msg: str = "", params: Any = None) -> str:
    """Return a body of Iterable's single endpoints."""
    return json.dumps(make_document(code, msg, params))


SUCCESS = make_body("Success")


@dataclass(frozen=True)
class Answer:
    """One answer, and the result of a call whose first attempt gets it.

    Attributes:
        name: Names the case in a test's report.
        fault: Keywords of `StandIn.fault`.
        result: What the first attempt results in.
    """

    name: str
    fault: dict[str, Any]
    result: CallResult

    def __str__(self) -> str:
        return self.name

    @property
    def status(self) -> int:
        """The HTTP status."""
        status: int = self.fault["status"]
        return status

    @property
    def body(self) -> str:
        """The text that follows the headers."""
        body: str = self.fault["body"]
        return body

    def result_after(self, max_attempts: int) -> CallResult:
        """Return the result of a call that gets nothing but this answer.

        A 429 uses up no attempt, so this is not for that.
        """
        attempts = max_attempts if self.result.is_retryable else 1
        return replace(self.result, attempts=attempts)


# Answers to a single call


def succeed(status: int, *, message: str = "", params: Any = None) -> Answer:
    """Return an answer that delivers the user."""
    result = CallResult(
        endpoint=USERS_UPDATE,
        ok=True,
        status=status,
        code="Success",
        message=message,
    )
    body = make_body("Success", message, params)
    return Answer(f"{status} Success", {"status": status, "body": body}, result)


def fail(
    status: int,
    body: str,
    reason: str,
    *,
    name: str = "",
    code: str | None = None,
    message: str = "",
) -> Answer:
    """Return an answer that does not deliver the user. Its status says if it is final.

    Without a name the case is named after its status.
    """
    result = CallResult(
        endpoint=USERS_UPDATE,
        ok=False,
        status=status,
        code=code,
        message=message,
        reason=reason,
        body=body[:MAX_KEPT_TEXT],
        is_retryable=status in RETRIED_STATUSES,
    )
    name = name or str(status)
    return Answer(name, {"status": status, "body": body}, result)


def refuse(
    status: int, code: str, message: str, reason: str, *, name: str = ""
) -> Answer:
    """Return a refusal in Iterable's own words."""
    return fail(
        status,
        make_body(code, message),
        reason,
        name=name or f"{status} {code}",
        code=code,
        message=message,
    )


def refuse_key(status: int, code: str, message: str) -> Answer:
    """Return a refusal of the API key, which ends the run."""
    words = f' ("{message}")' if message else ""
    reason = f"Iterable refused the API key{words}: {CHECK_KEY}"
    name = f"{status} {code} {message}"
    answer = refuse(status, code, message, reason, name=name)
    result = replace(answer.result, is_refused_key=True)
    return replace(answer, result=result)


def clash(status: int, *fields: str) -> Answer:
    """Return a refusal because of the types of these fields. It is always final."""
    code = "RequestFieldsTypesMismatched"
    error = {
        "expectedType": "long",
        "incomingTypes": ["string", "keyword"],
        "offendingValue": "pro",
    }
    errors = dict.fromkeys(fields, error)
    words = [
        f"field {field}: Iterable expects long, but string or keyword was sent"
        for field in fields
    ]
    what = "; ".join(words)
    answer = fail(
        status,
        make_body(code, "Types!", {"validationErrors": errors}),
        f"{what}: {CORRECT_TYPE}",
        name=f"{status} clash of {', '.join(fields)}",
        code=code,
        message="Types!",
    )
    result = replace(answer.result, is_retryable=False)
    return replace(answer, result=result)


def clash_of_unnamed_fields(status: int) -> Answer:
    """Return the same without the names of the fields."""
    code = "RequestFieldsTypesMismatched"
    reason = f"a field has another type: {CORRECT_TYPE}"
    answer = refuse(status, code, "Types!", reason)
    result = replace(answer.result, is_retryable=False)
    return replace(answer, result=result)


SUCCESSES = [
    succeed(200),
    succeed(299, message="Event 1 tracked.", params={"id": "1"}),
]

UNUSABLE_SUCCESSES = [
    refuse(
        200,
        "Success",
        "Event e is disallowed from tracking.",
        NOT_TRACKED,
        name="200 that is not tracked",
    ),
    refuse(200, "BadParams", "no such campaign", "no such campaign"),
    refuse(200, "success", "", SILENT_REFUSAL, name="200 in another case"),
    fail(200, PAGE, NOT_ITERABLE, name="200 with a page"),
    fail(200, '{"msg":"","code":"Suc', NOT_ITERABLE, name="200 cut short"),
    fail(200, '["Success"]', NOT_ITERABLE, name="200 with a list"),
    fail(
        200,
        '{"msg":5,"code":["Success"]}',
        NOT_ITERABLE,
        name="200 with other types",
    ),
    fail(204, "", NOT_ITERABLE),
]

REDIRECTS = [
    fail(300, "", REDIRECT),
    fail(301, "", REDIRECT),
    fail(302, SUCCESS, REDIRECT, name="302 Success", code="Success"),
    fail(308, "", REDIRECT),
]

REFUSALS = [
    refuse(400, "InvalidEmailAddressError", "Invalid email: 000", BAD_ADDRESS),
    refuse(400, "Success", "an error all the same", "an error all the same"),
    refuse(400, "UniqueFieldsLimitExceeded", "too many", NO_ROOM),
    clash(400, "plan_type"),
    clash(500, "plan_type", "first_name"),
    clash_of_unnamed_fields(500),
    refuse(409, "ForgottenUserError", "User x is forgotten", "User x is forgotten"),
    refuse(409, "ExternalKeyConflict", "", SAME_IDENTITY),
    refuse(409, "EmailAlreadyExists", "", SAME_IDENTITY),
    refuse(409, "UserIdAlreadyExists", "", SAME_IDENTITY),
]

REFUSED_KEYS = [
    refuse_key(401, "BadApiKey", "Invalid API key"),
    refuse_key(401, "BadApiKey", "IP address 1.2.3.4 is not allowed"),
    refuse_key(401, "InvalidJwtPayload", "JWT token is missing"),
    refuse_key(401, "Success", ""),
    refuse_key(403, "Forbidden", "Insufficient privileges"),
]

# A firewall or a proxy answers, perhaps because of what one user is called.
REFUSALS_OF_OTHERS = [
    fail(401, "", NOT_ITERABLE),
    fail(401, OTHER_JSON, NOT_ITERABLE, name="401 with other JSON"),
    fail(403, "", NOT_ITERABLE),
    fail(403, PAGE, NOT_ITERABLE, name="403 with a page"),
    fail(403, OTHER_JSON, NOT_ITERABLE, name="403 with other JSON"),
    fail(404, PAGE, NOT_ITERABLE, name="404 with a page"),
    fail(413, "", NOT_ITERABLE),
    fail(501, "", NOT_ITERABLE),
    fail(505, "", NOT_ITERABLE),
]

TROUBLES = [
    fail(408, "", IN_TROUBLE),
    fail(500, "", IN_TROUBLE),
    fail(502, PAGE, IN_TROUBLE, name="502 with a page"),
    refuse(503, "Success", "", IN_TROUBLE),
    fail(504, "", IN_TROUBLE),
    refuse(429, "RateLimitExceeded", "Rate limit exceeded", THROTTLED),
    fail(429, PAGE, THROTTLED, name="429 with a page"),
]

ANSWERED = [
    *SUCCESSES,
    *UNUSABLE_SUCCESSES,
    *REDIRECTS,
    *REFUSALS,
    *REFUSED_KEYS,
    *REFUSALS_OF_OTHERS,
    *TROUBLES,
]


# Answers that do not arrive


def lose(name: str, reason: str, action: str, **keywords: Any) -> Answer:
    """Return an answer that does not arrive. The call is made again."""
    result = CallResult(
        endpoint=USERS_UPDATE,
        ok=False,
        message=reason,
        reason=reason,
        is_retryable=True,
    )
    return Answer(name, {"action": action, **keywords}, result)


BROKEN_OFF = [
    lose("reset before the call was processed", BROKEN, "reset_before"),
    lose("reset after the call was processed", BROKEN, "reset_after"),
    lose("closed before the last byte", BROKEN, "cut"),
    lose("closed without an answer", BROKEN, "raw"),
    lose("another protocol", BROKEN, "raw", body="SSH-2.0-OpenSSH_9.2\r\n"),
]
# Each attempt takes the whole ITERABLE_TIMEOUT.
TIMED_OUT = [
    lose("silence", TOO_SLOW, "silence"),
    lose("a body that drips", TOO_SLOW, "drip_body", interval=0.1),
]
ON_THE_WAY = [*BROKEN_OFF, *TIMED_OUT]


# Answers to a bulk call

ONE = "user1@example.com"
TWO = "user2@example.com"
THREE = "user3@example.com"
GROUP = (
    Identity(IdentifyBy.EMAIL, ONE),
    Identity(IdentifyBy.EMAIL, TWO),
    Identity(IdentifyBy.EMAIL, THREE),
)
USERID_GROUP = (
    Identity(IdentifyBy.USER_ID, "a"),
    Identity(IdentifyBy.USER_ID, "A"),
    Identity(IdentifyBy.USER_ID, "7"),
)


@dataclass(frozen=True)
class GroupAnswer(Answer):
    """One answer to users/bulkUpdate, and the result of the call.

    Attributes:
        name: Names the case in a test's report.
        fault: Keywords of `StandIn.fault`.
        result: What the first attempt results in.
        identities: The users of the call.
    """

    result: CallResult
    identities: Sequence[Identity] = GROUP


def confirm(
    name: str,
    *confirmed: str,
    failed: int = 0,
    status: int = 200,
    dropped_fields: Sequence[str] = (),
    identities: Sequence[Identity] = GROUP,
    **lists: Any,
) -> GroupAnswer:
    """Return an answer that delivers the `confirmed` users of the group, and no other.

    `failed` is its failCount, `lists` are further keys of its document.
    """
    document = {"successCount": len(confirmed), "failCount": failed, **lists}
    body = json.dumps(document)
    result = CallResult(
        endpoint=USERS_BULK_UPDATE,
        ok=True,
        status=status,
        confirmed=frozenset(confirmed),
        dropped_fields=frozenset(dropped_fields),
    )
    return GroupAnswer(name, {"status": status, "body": body}, result, identities)


def confuse(
    name: str,
    successes: Any,
    failures: Any,
    *,
    identities: Sequence[Identity] = GROUP,
    **more: Any,
) -> GroupAnswer:
    """Return an answer that does not add up, and so says nothing about any user."""
    document = {"successCount": successes, "failCount": failures, **more}
    body = json.dumps(document)
    result = CallResult(
        endpoint=USERS_BULK_UPDATE,
        ok=False,
        status=200,
        message=more.get("msg", ""),
        reason=DOUBTFUL,
        body=body,
    )
    return GroupAnswer(name, {"status": 200, "body": body}, result, identities)


def refuse_group(answer: Answer) -> GroupAnswer:
    """Return the same answer to a bulk call: it is refused as a whole.

    The code is left out, because it says nothing about a single user.
    """
    single = answer.result
    is_success = answer.status < 300
    result = CallResult(
        endpoint=USERS_BULK_UPDATE,
        ok=False,
        status=answer.status,
        message=single.message,
        reason=DOUBTFUL if is_success else single.reason,
        body=answer.body[:MAX_KEPT_TEXT],
        is_retryable=single.is_retryable,
        is_refused_key=single.is_refused_key,
    )
    return GroupAnswer(answer.name, answer.fault, result)


COUNTS = '{"successCount":3,"failCount":0}'

CONFIRMATIONS = [
    confirm(
        "all",
        *(ONE, TWO, THREE),
        invalidEmails=[],
        failedUpdates={"invalidEmails": []},
        disallowedEventNames=[],
    ),
    confirm(
        "all, with a new field",
        *(ONE, TWO, THREE),
        status=202,
        createdFields=["plan_type"],
        failedUpdates=None,
    ),
    confirm(
        "all, without fields that are dropped",
        *(ONE, TWO, THREE),
        dropped_fields=["candidate", "plan_type"],
        filteredOutFields=["candidate", "plan_type"],
    ),
    confirm(
        "one failed, in another case",
        *(ONE, THREE),
        failed=1,
        failedUpdates={"forgottenEmails": [TWO.upper()]},
    ),
    confirm(
        "one failed, in both lists",
        *(ONE, THREE),
        failed=1,
        invalidEmails=[TWO],
        failedUpdates={"invalidEmails": [TWO]},
    ),
    confirm(
        "one failed, twice in a list of another name",
        *(ONE, THREE),
        failed=1,
        failedUpdates=[TWO, TWO.title()],
    ),
    confirm(
        "one failed, and a stranger",
        *(TWO, THREE),
        failed=1,
        failedUpdates={"notFoundEmails": ["old@example.com", ONE]},
    ),
    confirm(
        "two failed",
        TWO,
        failed=2,
        invalidEmails=[THREE],
        failedUpdates={"forgottenEmails": [ONE]},
    ),
    confirm(
        "all failed",
        failed=3,
        failedUpdates={"invalidEmails": [ONE, TWO, THREE]},
    ),
]

CONFUSIONS = [
    confuse("a disallowed event", 3, 0, disallowedEventNames=["page_view"]),
    confuse(
        "a disallowed event, in words",
        3,
        0,
        msg="Event page_view is disallowed from tracking",
    ),
    confuse("a refusal beside counts that add up", 3, 0, code="BadParams"),
    confuse("one failed, unnamed", 2, 1, failedUpdates={"invalidEmails": []}),
    confuse("one failed in a conflict", 2, 1, failedUpdates={"conflictEmails": [TWO]}),
    confuse("one failed, a field is named", 2, 1, invalidEmails=["pro", None, 2]),
    confuse("one failed, in a text", 2, 1, failedUpdates=TWO),
    confuse("one failed, two are named", 2, 1, invalidEmails=[ONE, TWO]),
    confuse("none failed, one is named", 3, 0, invalidEmails=[ONE]),
    confuse("one more failed than was sent", 3, 1),
    confuse("too many", 4, 0),
    confuse("too few", 2, 0),
    confuse("fewer than none", 4, -1),
    confuse("counts the other way round", 1, 2, invalidEmails=[TWO]),
    confuse("a failCount of null", 3, None),
    confuse("counts in texts", "3", "0"),
    confuse("lists for counts", [3], []),
]

REFUSED_GROUPS = [
    refuse_group(fail(200, '{"invalidEmails":[]}', "", name="neither count")),
    refuse_group(succeed(200)),
    refuse_group(fail(200, PAGE, "", name="200 with a page")),
    refuse_group(fail(200, COUNTS[:-1], "", name="200 cut short")),
    refuse_group(fail(200, f"[{COUNTS}]", "", name="200 with a list")),
    refuse_group(fail(307, COUNTS, REDIRECT, name="307 with counts")),
    refuse_group(fail(400, COUNTS, NOT_ITERABLE, name="400 with counts")),
    refuse_group(refuse(400, "BatchTooLarge", "too many users", "too many users")),
    refuse_group(refuse(409, "ForgottenUserError", "forgotten", "forgotten")),
    refuse_group(clash(400, "plan_type")),
    refuse_group(refuse_key(401, "BadApiKey", "Invalid API key")),
    refuse_group(fail(403, PAGE, NOT_ITERABLE, name="403 with a page")),
    refuse_group(fail(404, PAGE, NOT_ITERABLE, name="404 with a page")),
    refuse_group(fail(413, "<h1>too large</h1>", NOT_ITERABLE)),
    refuse_group(fail(503, COUNTS, IN_TROUBLE, name="503 with counts")),
]

BULK = [*CONFIRMATIONS, *CONFUSIONS, *REFUSED_GROUPS]

BULK_USERID = [
    confirm("all user IDs", *("a", "A", "7"), identities=USERID_GROUP),
    confirm(
        "one user ID failed",
        *("a", "7"),
        failed=1,
        identities=USERID_GROUP,
        failedUpdates={"forgottenUserIds": ["A"]},
    ),
    confirm(
        "one user ID failed, in both lists",
        *("a", "A"),
        failed=1,
        identities=USERID_GROUP,
        invalidUserIds=["7"],
        failedUpdates={"invalidUserIds": ["7"]},
    ),
    confuse(
        "one failed, an address is named",
        2,
        1,
        identities=USERID_GROUP,
        failedUpdates={"invalidEmails": ["7"]},
    ),
    confuse(
        "one user ID failed in a conflict",
        2,
        1,
        identities=USERID_GROUP,
        failedUpdates={"conflictUserIds": ["a"]},
    ),
    confuse(
        "one user ID failed, a number is named",
        2,
        1,
        identities=USERID_GROUP,
        failedUpdates={"invalidUserIds": [7]},
    ),
]
