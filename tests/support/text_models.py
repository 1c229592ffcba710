"""A tiny random language model of plain text with a tokenizer, wrapped for streams of text."""

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omnimem.backbones.text import TextModel
from support.models import SIZES

CONTROL = ["<s>", "</s>"]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}<s>"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character, and two control tokens."""
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate([*CONTROL, "?!", *letters])}
    pipeline = Tokenizer(WordLevel(vocabulary, unk_token="?!"))
    pipeline.pre_tokenizer = Split("", "isolated")  # type: ignore[assignment]
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    made = PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="</s>", unk_token="?!")
    made.chat_template = template
    return made


def causal_model(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama, in evaluation mode."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def text_lm(**settings: object) -> TextModel:
    """The model and its tokenizer."""
    return TextModel(causal_model(), tokenizer(), **settings)  # type: ignore[arg-type]
