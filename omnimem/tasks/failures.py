"""Predictions without an answer: failure messages of tools and APIs, and refusals; no rule set reads a letter there.

Sources: VLMEvalKit ("Failed to obtain answer via API.", and the refusals of its `can_infer_option`), lmms-eval
("[LMMS_EVAL_REQUEST_FAILED after 5 retries] ..."), the error classes of API clients, and HTTP status lines.
"""

import re

FAILURES = (
    r"\W*(nan|none|null|nat|<na>)\W*$",  # a missing value, written as text
    r"\W*(LMMS_EVAL_REQUEST_FAILED|FAILED_INFER)\b",
    r"\W*failed to (obtain|get|generate|fetch|retrieve|receive|call|process|load|connect|decode|parse)\b",
    r"\W*((an?|the|internal|unknown|unexpected|server|network) )*(error|exception)\b"
    r"( (code|occurred|message|while)\b|:)",
    r"\W*([a-z_]+\.)*[a-z_]*(error|exception)\s*[:(]",  # openai.RateLimitError: ...
    r"\W*traceback \(most recent call last\)",
    r"\W*[\"']?error[\"']?\s*:",  # {"error": ...}
    r"\W*(HTTP|status|status code|HTTP status)\W*(code|error)?\W*[45]\d\d\b",
    r"\W*[45]\d\d\W+(client|server|too many|bad|unauthorized|forbidden|not found|internal|service|gateway|request)",
    r"\W*((the|an?|[a-z]+) )?API\b.{0,40}\b(error|fail(ed|ure)?|timed? ?out|timeout|limit|unavailable|exceeded)\b",
    r"\W*((the|your|model|api|http|read) )*(request|response|connection|inference|generation|call)\W+"
    r"((was|has been) )?(failed|failure|error|timed out|timeout|refused|reset|aborted|blocked|rejected|filtered)\b",
    r"\W*(request )?(timed out|timeout|rate limit|too many requests|quota exceeded|service unavailable)",
    r"\W*(max(imum)? )?retries (exceeded|exhausted)",
    r"\W*((cuda|cpu|gpu) )?out of memory\b",
    r"\W*(content|prompt|output|response) (was |is )?(blocked|filtered|flagged)\b",
)
ANYWHERE = ("failed to obtain answer via api", "lmms_eval_request_failed")
REFUSALS = (
    r"\W*(I'm|I am|we are|we're) (very |really |so )?(sorry|unable|not able|afraid)\b",
    r"\W*(sorry|apologies|my apologies|unfortunately)\b[,.]? (but )?(I|we)\b",
    r"\W*(I|we) (can ?not|can't|could not|couldn't|am unable to|won't|will not) "
    r"(answer|determine|help|assist|process|view|see|watch|hear|access|provide|tell|identify|comply)\b",
    r"\W*as an? (AI|artificial|large language|language)\b",
    r"\W*(can ?not|can't|unable to) (answer|determine the answer)\b",
)
# a letter by itself, which answers after all; not the word I, nor an article before a word
LETTER = re.compile(r"\b(?-i:[B-HJ-Z]\b|A\b(?! +[a-z]))")
_FAILURE = re.compile("|".join(FAILURES), re.IGNORECASE)
_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)


def is_failure(prediction: str) -> bool:
    """Whether a tool wrote a failure message, or the text of a missing value, in place of a prediction."""
    text = prediction.strip()
    lower = text.lower()
    return any(phrase in lower for phrase in ANYWHERE) or _FAILURE.match(text) is not None


def is_refusal(prediction: str) -> bool:
    """Whether the model declines to answer and names no option."""
    text = prediction.strip().replace("\u2019", "'")
    return _REFUSAL.match(text) is not None and LETTER.search(text) is None
