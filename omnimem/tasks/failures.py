"""Predictions without an answer: failure messages of tools and APIs, and refusals; no rule set reads a letter there.

Sources: VLMEvalKit ("Failed to obtain answer via API.", and the refusals of its `can_infer_option`), lmms-eval
("[LMMS_EVAL_REQUEST_FAILED after 5 retries] ..."), the error classes of API clients, and HTTP status lines.
"""

import re

FAILURES = (
    r"\W*(nan|none|null|nat|<na>|n/a)\W*$",  # a missing value, written as text
    r"\W*(([a-z]+[ _])?(error|exception|fail(ed|ure)?)|(no|empty) (response|answer|output|prediction))\W*$",
    r"\W*[\[<({]\W*(error|exception|failed|failure)\b",  # [ERROR] ...
    r"\W*(error|exception|failed|failure|something went wrong)\s*[:.]",
    r"\W*(LMMS_EVAL_REQUEST_FAILED|FAILED_INFER)\b",
    r"\W*(we |I )?(fail(ed|ure)?|unable|could not|couldn't|cannot|can't) (to |in )?"
    r"(obtain|get|generat|fetch|retriev|receiv|call|process|load|connect|decod|pars)(e|ing|ting)?\b",
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
SIGNS = (  # anywhere, in a text that names no option by its letter
    r"\bvia API\b",
    r"\bAPI[ _-]?(key|error|call|request|response)\b",
    r"\b[a-z]+(?-i:Error|Exception)\b",
    r"\b(an?|this) (error|exception)\s*:",
    r"\bHTTPS?ConnectionPool\b",
    r"\b(max retries|current quota|bad gateway|internal server error|server disconnected|access denied|unauthorized)\b",
    r"\b(gateway time-?out|operation timed out|safety filter|finish_reason|failed to generate)\b",
    r"\b(server|service|model) (is |was |currently )*(overloaded|unavailable|had an error)\b",
)
REFUSALS = (
    r"\W*(I'm|I am|we are|we're) (very |really |so )?(sorry|unable|not able|afraid)\b",
    r"\W*((I|we) apologi[sz]e|sorry|apologies|my apologies|unfortunately)\b[,.]? (but )?(I|we)\b",
    r"\W*(it is|it's) (not possible|impossible) to (answer|determine|tell|say|identify)\b",
    r"\W*there (is|was|isn't) (not )?(insufficient|not enough|enough|no) (information|context|evidence)\b",
    r"\W*(the|this) (answer|question) (can ?not|can't) be (determined|answered)\b",
    r"\W*(I|we) (can ?not|can't|could not|couldn't|am unable to|won't|will not) "
    r"(answer|determine|help|assist|process|view|see|watch|hear|access|provide|tell|identify|comply)\b",
    r"\W*as an? (AI|artificial|large language|language)\b",
    r"\W*(can ?not|can't|unable to) (answer|determine the answer)\b",
)
# a letter by itself, which answers after all; not the word I, nor an article before a word
LETTER = re.compile(r"\b(?-i:[B-HJ-Z]\b|A\b(?! +[a-z]))")
_FAILURE = re.compile("|".join(FAILURES), re.IGNORECASE)
_SIGN = re.compile("|".join(SIGNS), re.IGNORECASE)
_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)


def is_failure(prediction: str) -> bool:
    """Whether a tool wrote a failure message, or the text of a missing value, in place of a prediction."""
    text = prediction.strip()
    lower = text.lower()
    if any(phrase in lower for phrase in ANYWHERE) or _FAILURE.match(text):
        return True
    return _SIGN.search(text) is not None and LETTER.search(text) is None


def is_refusal(prediction: str) -> bool:
    """Whether the model declines to answer and names no option."""
    text = prediction.strip().replace("\u2019", "'")
    return _REFUSAL.match(text) is not None and LETTER.search(text) is None
