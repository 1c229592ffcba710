"""Predictions without an answer: failure messages of tools and APIs, and refusals; no rule set reads a letter there.

They are recognised in English, Chinese, Japanese, Korean, Spanish, Portuguese, Italian, French, German and Russian.
Sources: VLMEvalKit ("Failed to obtain answer via API.", and the refusals of its `can_infer_option`), lmms-eval
("[LMMS_EVAL_REQUEST_FAILED after 5 retries] ...", "Video ... can not load, check the source"), the error classes of
API clients, and HTTP status lines.
"""

import re
from unicodedata import normalize

FAILURES = (
    r"\W*(nan|none|null|nat|<na>|n/a)\W*$",  # a missing value, written as text
    r"\W*(([a-z]+[ _])?(error|exception|fail(ed|ure)?)|(no|empty) (response|answer|output|prediction))\W*$",
    r"\W*[\[<({]\W*(error|exception|failed|failure)\b",  # [ERROR] ...
    r"\W*(error|exception|failed|failure|something went wrong)\s*[:.]",
    r"\W*(LMMS_EVAL_REQUEST_FAILED|FAILED_INFER)\b",
    r"\W*(we )?(fail(ed|ure)?|unable|could not|couldn't|cannot|can't) (to |in )?"
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
    r"\W*((max(imum)?|all) )?(\d+ )?(retr(y|ies)|attempts)( attempts)? (failed|exceeded|exhausted|reached)",
    r"\W*((error|failed|skipped)\b.{0,20} )?(the |this |input )?(video|audio|image|file|media)\b.{0,300}"
    r"\b(can ?not|can't|could not|couldn't|failed to|unable to) (be )?(load|read|open|decod|process)",
    r"\W*(error|failed|cannot|can't|could not) (in |to |while )?(load|read|open|decod|process)(ed|ing)?\b",
    r"\W*((cuda|cpu|gpu) )?out of memory\b",
    r"\W*(content|prompt|output|response) (was |is )?(blocked|filtered|flagged)\b",
)
ANYWHERE = ("failed to obtain answer via api", "lmms_eval_request_failed")
SIGNS = (  # anywhere, in a text that names no option by its letter
    r"\bvia API\b",
    r"\bAPI[ _-]?(key|error|call|request|response)\b",
    r"\b[a-z]+(?-i:Error|Exception)\b",
    r"\b(an?|this|internal|server|cuda|runtime|network|last) (error|exception)\b(\s*:| [A-Z]|$)",
    r"\W(error|exception)\W+in \w+ing\b|^\W*error\b.{0,30}\bin (load|read|open|decod|process)ing\b",
    r"\bHTTPS?ConnectionPool\b",
    r"<html|<!doctype",
    r"\b(max retries|current quota|bad gateway|internal server error|server disconnected|access denied|unauthorized)\b",
    r"\b(gateway time-?out|operation timed out|read timed out|safety (filter|system)|finish_?reason|blocked_?reason)\b",
    r"\b(failed to generate|permission denied|bad request|invalid request|index out of range|has no attribute)\b",
    r"\b(server|service|model|engine) (is |was |currently )*(overloaded|unavailable|had an error)\b",
    r"\b(deadline|context length|(token|rate) limit|quota)[ _]exceeded\b|\bexceed(ed|s) (the )?max",
    r"\b(resources?|quota)[ _](has been |is )?exhausted\b|\binsufficient[ _](quota|balance|credits?)\b",
    r"\b(maximum context length|prompt is too long|inappropriate content|prohibited_content|blocked by)\b",
    r"\b(did|does) not (respond|(return|generate|produce) (an?|any) (answer|response|text|output))\b",
    r"\bno (answer|text|output|response)s? (was |were )?(generated|returned|produced|available)\b",
    r"\b(prediction|response|answer|output) (is )?not available\b|\bvalid Part\b|\bexpecting value: line\b",
    r"^\W*(blocked|skipped|safety|forbidden|empty|oom|timeout|out_of_memory|invalid_argument)\W*$",
    r"^\W*(\[|\*\*|skipped:)\W*(error|skipped|oom|timeout|blocked|empty|video|audio|image)\b",
    # the same in Chinese, Japanese, Korean, Spanish, Portuguese, Italian, French, German, Russian
    r"失败|超时|错误[:\uff1a]|(发生|出现|网络|系统|服务器?|内部|请求)(错误|异常|繁忙)|内容审核|不当内容|敏感内容",
    r"エラー|失敗しました|タイムアウト|오류|실패|시간 ?초과",
    r"\b(error|erro|errore) (al|de|ao|na|no|nel|di|durante)\b|\b(errore|erro|erreur|fehler|ошибка)( api\b|\s*:)",
    r"\b(no se pudo|não foi possível|impossibile|échec (de|du)|fehlgeschlagen|zeitüberschreitung|не удалось)\b",
)
REFUSALS = (
    r"\W*(I'm|I am|we are|we're) (very |really |so )?(sorry|unable|not able|afraid)\b",
    r"\W*((I|we) apologi[sz]e|sorry|(my )?apologies|unfortunately)\b[,.]? (but )?(I|we|as|the|there|this|no)\b",
    r"\W*(it is|it's) (not possible|impossible) to (answer|determine|tell|say|identify)\b",
    r"\W*there (is|was|isn't) (not )?(insufficient|not enough|enough|no) (information|context|evidence)\b",
    r"\W*(the|this) (answer|question) (can ?not|can't) be (determined|answered)\b",
    r"\W*(I|we) (can ?not|can't|could not|couldn't|am unable to|won't|will not) "
    r"(answer|determine|help|assist|process|load|open|obtain|view|see|watch|hear|access|provide|tell|identify|comply)\b",
    r"\W*as an? (AI|artificial|large language|language)\b",
    r"\W*(can ?not|can't|unable to) (answer|determine the answer)\b",
    r"\W*(I|we) (do not|don't|did not|didn't|have no|must decline)\b.{0,40}"
    r"\b(know|see|have|received?|decline|access|ability|way|answer)\b",
    r"\W*(no|there is no) (video|audio|image|frames?)\b.{0,20}\b(provided|attached|given|available|uploaded)\b",
    r"\W*(could you |can you )?please (provide|upload|attach|share)\b",
    r"\W*((not enough|insufficient) information|unable to determine|cannot be determined)\b",
)
REFUSAL_SIGNS = (  # anywhere, as SIGNS
    r"\b(as|I'm|I am|just) (just )?an? ([\w-]+ )?AI\b",
    r"\b(not|n't) (provide|contain|give|show|include|offer) (enough |sufficient |any )?information\b",
    r"\b(impossible|not possible|unable|not enough information) to (determine|answer|tell|identify)\b",
    r"\bnot (attached|provided|uploaded|shared|included) (the|a|any) (video|audio|image|file|frame)",
    r"抱歉|对不起|很遗憾|(无法|不能)(回答|确定|判断|查看|观看|处理|提供|访问|看到|得知)|(作为|是)(一个|一名)?(AI|人工智能)|语言模型",
    r"申し訳|すみません|できません|わかりません|分かりません|AIとして|죄송|수 없습니다|모르겠|AI ?모델",
    r"\b(lo siento|no puedo|mi dispiace|non posso|desculpe|não posso|désolée?|je ne (peux|sais))\b",
    r"\b(tut mir (sehr )?leid|kann ich\b.{0,60}\bnicht|ich kann\b.{0,60}\bnicht|извините|к сожалению|не могу)\b",
)
# a letter by itself, which answers after all; not the word I, nor an article before a word; 选B names it too
LETTER = re.compile(r"(?<![A-Za-z0-9_À-ɏ])([B-HJ-Z]|A(?! +[a-z]))(?![A-Za-z0-9_À-ɏ])")
_FAILURE = re.compile("|".join(FAILURES), re.IGNORECASE)
_SIGN = re.compile("|".join(SIGNS), re.IGNORECASE)
_REFUSAL = re.compile(f"^(?:{'|'.join(REFUSALS)})|{'|'.join(REFUSAL_SIGNS)}", re.IGNORECASE)


def is_failure(prediction: str) -> bool:
    """Whether a tool wrote a failure message, or the text of a missing value, in place of a prediction."""
    text = _plain(prediction)
    lower = text.lower()
    if any(phrase in lower for phrase in ANYWHERE) or _FAILURE.match(text):
        return True
    return _SIGN.search(text) is not None and LETTER.search(text) is None


def is_refusal(prediction: str) -> bool:
    """Whether the model declines to answer and names no option."""
    text = _plain(prediction)
    return _REFUSAL.search(text) is not None and LETTER.search(text) is None


def _plain(prediction: str) -> str:
    """The text with composed accents and straight apostrophes."""
    return normalize("NFC", prediction).strip().replace("\u2019", "'")
