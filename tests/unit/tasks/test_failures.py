"""Failure messages and refusals are no answers under any rule set; answers that look like them are."""

import pytest

from omnimem.data import Item, Question
from omnimem.tasks import LVBenchOptions, LVOmniBenchOptions, OwnOptions, StreamingBenchOptions, VideoMMEOptions
from omnimem.tasks.failures import is_failure, is_refusal
from omnimem.tasks.rules import RuleSet

TASKS = (VideoMMEOptions, LVBenchOptions, LVOmniBenchOptions, StreamingBenchOptions, OwnOptions)
RULE_SETS = [
    pytest.param(rule_set, id=f"{task.__name__}-{name}") for task in TASKS for name, rule_set in task.rule_sets.items()
]
FAILURES = (
    "Failed to obtain answer via API.",
    "Failed to obtain answer via API. ",
    "\nFailed to obtain answer via API.\n",
    "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 400 - A bad request",
    "[FAILED_INFER] CUDA error",
    "Error code: 429 - {'error': {'message': 'Rate limit reached for A'}}",
    "openai.APIConnectionError: Connection error.",
    "RateLimitError('B exceeded')",
    "Error: 503 Service Unavailable",
    "An error occurred: Connection aborted",
    "Traceback (most recent call last):\n  File A",
    '{"error": {"code": 500, "status": "DEADLINE"}}',
    "HTTP 502 Bad Gateway",
    "429 Client Error: Too Many Requests",
    "500 Internal Server Error. A retry may help",
    "API Error: Claude returned nothing",
    "The API call failed after C attempts",
    "Request timed out.",
    "Connection error.",
    "Rate limit exceeded for Account A",
    "CUDA out of memory. Tried to allocate 2 GiB",
    "Response was blocked by DALL safety filters",
    "[ERROR] A failure",
    "API_ERROR",
    "FAILED",
    "Failed: A",
    "Something went wrong. A retry may help",
    "Unable to obtain answer via API",
    "Failure to obtain the answer",
    "Failed in obtaining answer via API.",
    "Answer could not be obtained via API",
    "HTTPSConnectionPool(host='api', port=443): Max retries exceeded",
    "ConnectionError",
    "Bad Gateway",
    "Gemini failed to generate content: BLOCKED",
    "Thrown an error: ('Connection aborted.')",
    "Unauthorized: Invalid API key",
    "Access denied",
    "finish_reason: SAFETY",
    "You exceeded your current quota, please check your plan",
    "No response",
    "Video ['/data/videos/B1.mp4'] can not load, check the source",
    "Error Decoder A in loading video",
    "Skipped: video A1.mp4 could not be decoded",
    "All 5 retries failed. Last: Abort",
    "Max retry attempts reached for Account",
    "Input data may contain inappropriate content. DataInspectionFailed",
    "The engine is currently overloaded, please try again later. Contact Admin",
    "504 Deadline Exceeded",
    "RESOURCE_EXHAUSTED",
    "Insufficient quota: Account",
    "<!DOCTYPE html><html>Cloudflare</html>",
    "FinishReason.PROHIBITED_CONTENT",
    "[SKIPPED]",
    "**Error** Audio",
    "This model's maximum context length is 8192 tokens. Cut them",
    "'NoneType' object has no attribute 'Audio'",
    "The model did not return a response. Again",
    "The response.text quick accessor requires a valid Part. Check it",
    "Request was rejected as a result of our safety system. Contact Admin",
    "API调用失败",
    "请求超时 API",
    "错误\uff1aAPI",
    "服务器繁忙\uff0c请稍后再试 API",
    "エラー: API",
    "API リクエストに失敗しました",
    "API 호출에 실패했습니다",
    "Error al obtener la respuesta: API",
    "Erro ao obter a resposta. API",
    "Errore: API",
    "Erreur: API",
    "Fehler: API",
    "Ошибка API",
    "N/A",
    "nan",
    "None",
    "<NA>",
    "null",
)
REFUSALS = (
    "I cannot answer",
    "I can't answer this question.",
    "I can\u2019t process this file.",
    "Sorry, I can't help with images of people yet.",
    "I'm sorry, but without the image provided",
    "I am unable to watch videos. Describe it first.",
    "As an AI language model, I do not watch videos",
    "Cannot determine the answer",
    "I apologize, but I cannot see it",
    "It is not possible to determine the answer.",
    "There is insufficient information to decide",
    "The answer cannot be determined",
    "I don't have access to video Content",
    "I did not receive any video. Can you share it?",
    "There is no video attached. Could you attach it?",
    "Could you please provide the video? Also the audio",
    "The video does not provide enough information. Could be anything",
    "Unfortunately, the video does not show it. Alas",
    "I'm just an AI",
    "As a text-based AI model",
    "抱歉\uff0c我是AI助手\uff0c无法观看视频",
    "根据提供的视频\uff0c无法判断 AI",
    "申し訳ありませんが、AIとして動画を見ることができません",
    "죄송합니다. AI 모델로서",
    "Lo siento, no puedo ayudar con eso. API",
    "De\u0301sole\u0301, je ne peux pas répondre",
    "Es tut mir leid, das kann ich nicht beantworten. API",
    "Desculpe, não posso ajudar. API",
    "Mi dispiace, non posso rispondere. API",
    "Извините, я не могу. AI",
)
ANSWERS = (
    ("B", "B"),
    ("B. Connection error", "B"),
    ("The answer is B.", "B"),
    ("I'm sorry, but the best choice is B", "B"),
    ("I am unable to see it clearly; the answer is (B)", "B"),
    ("(B) None", "B"),
    ("B: API error rate", "B"),
    ("B) Failed", "B"),
    ("Bad Gateway is what (B) says", "B"),
    ("B, for the sign reads access denied", "B"),
    ("选B\uff0c抱歉", "B"),
    ("正解はBです。エラー: ", "B"),
    ("Je suis désolé; la réponse est B", "B"),
    ("Bad Gateway: I cannot tell more; 答案是B", "B"),
    ("B. The video could not be loaded", "B"),
    ("B. An error message", "B"),
)


def question(answer: str) -> Question:
    """A question with eleven options, so that `I` is one of them."""
    item = Item(id="q", options=tuple("abcdefghijk"))
    return Question(index=0, text="?", answer=answer, at=None, kind="", loss=False, item=item)


@pytest.mark.parametrize("text", FAILURES)
@pytest.mark.parametrize("rule_set", RULE_SETS)
def test_a_failure_message_counts_as_an_empty_prediction(text, rule_set: RuleSet) -> None:
    for letter in "ABCDEFGHIJK":
        verdict, empty = rule_set.judge(question(letter), text), rule_set.judge(question(letter), "")
        assert (verdict.answer, verdict.correct, verdict.failed) == (None, False, True)
        assert (verdict.counted, verdict.bare) == (empty.counted, False)


@pytest.mark.parametrize("text", REFUSALS)
@pytest.mark.parametrize("rule_set", RULE_SETS)
def test_a_refusal_is_a_prediction_without_an_answer(text, rule_set: RuleSet) -> None:
    verdict = rule_set.judge(question("C"), text)
    assert (verdict.answer, verdict.correct, verdict.failed) == (None, False, False)
    assert verdict.counted is (rule_set.denominator != "answered")


@pytest.mark.parametrize(("text", "letter"), ANSWERS)
def test_an_answer_that_mentions_a_failure_is_an_answer(text, letter) -> None:
    assert not is_failure(text)
    assert not is_refusal(text)
    assert VideoMMEOptions.rule_sets["official"].judge(question(letter), text).correct


@pytest.mark.parametrize("text", ["A dog barks", "Apple", "Because", "a", "An apple", "A", "E", "I", "", " "])
def test_the_strict_rule_takes_no_article_and_no_first_letter_of_a_word(text) -> None:
    answer = OwnOptions.rule_sets["letter"].judge(question("A"), text).answer
    assert answer == (text.upper() if len(text.strip()) == 1 else None)
