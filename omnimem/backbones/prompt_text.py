"""Token ids of prompts in which a user's text cannot form a control token."""

import re
from typing import final

from transformers import PreTrainedTokenizerBase

from omnimem.errors import UserError, counted
from omnimem.limits import exceeds
from omnimem.textfile import whole_characters

CUT = "\ud800"  # within a control token that users wrote; no text holds this half of a character
KNOWN, SHORT = 1 << 14, 512  # texts whose ids are kept, and characters of each
SIGN = re.compile(r"<\|.+\|>")  # a control token, even if it is not marked as special (<|fim_prefix|>)


@final
class PromptText:
    """Encodes text for one tokenizer; `plain` marks what users wrote."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        tokens = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in tokens if token.special or SIGN.fullmatch(token.content)}
        self._known: dict[str, list[int]] = {}  # short texts: every epoch and arm asks the same questions
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")

    def ids(self, text: str) -> list[int]:
        """Token ids; the parts around a cut are encoded apart."""
        parts = text.split(CUT) if CUT in text else [text]
        return [token for part in parts for token in self._encoded(part)]

    def _encoded(self, text: str) -> list[int]:
        """Token ids of a text without cuts; those of short ones are computed once."""
        if text in self._known:
            return self._known[text]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(text) <= SHORT:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[text] = ids
        return ids

    def plain(self, text: str) -> str:
        """A user's text with a cut in every control token, which is then encoded as text.

        Raises UserError above `text_characters`.
        """
        text = whole_characters(text)
        if what := exceeds("text_characters", len(text)):
            raise UserError(f"a text of {counted(len(text), 'character')}, {text[:40]!a}...: {what}")
        return self._control.sub(lambda found: found[0][:1] + CUT + found[0][1:], text)
