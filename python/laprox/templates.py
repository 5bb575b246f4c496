"""Chat templates, with what is wrong with one told in a line."""

from __future__ import annotations

import traceback
from typing import Any

import jinja2
from llama_cpp import llama_chat_format
from llama_cpp.llama_chat_format import ChatFormatterResponse, Jinja2ChatFormatter

# Templates that are known by name, as in llama.cpp.
NAMED = {
    "chatml": llama_chat_format.CHATML_CHAT_TEMPLATE,
    "llama3": llama_chat_format.LLAMA3_INSTRUCT_CHAT_TEMPLATE,
    "mistral": llama_chat_format.MISTRAL_INSTRUCT_CHAT_TEMPLATE,
}


def check(template: str) -> None:
    """Raises ValueError, with the line, if a template isn't one."""
    compiled(template)


def compiled(template: str, eos_token: str = "", bos_token: str = "") -> Jinja2ChatFormatter:
    """A template, ready to render.

    Raises:
        ValueError: It isn't one; says what is wrong in which line.
    """
    try:
        return Jinja2ChatFormatter(template=template, eos_token=eos_token, bos_token=bos_token)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken (line {error.lineno}: {_in_a_line(error)})") from None
    except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"the chat template is broken ({_in_a_line(error)})") from None


def rendered(formatter: Jinja2ChatFormatter, messages: list[Any]) -> ChatFormatterResponse:
    """Messages as a prompt.

    Raises:
        ValueError: The template fails, or refuses them; says why in which line.
    """
    try:
        return formatter(messages=messages)
    except Exception as error:  # a template can make Python raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        where = f"line {lines[-1]}: " if lines else ""
        raise ValueError(f"the chat template fails ({where}{_in_a_line(error)})") from None


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
