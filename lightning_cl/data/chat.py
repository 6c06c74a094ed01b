# SPDX-License-Identifier: Apache-2.0
"""Conversations as text: what a chat template writes, and which characters of it are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_cl.data.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template writes it.

    Attributes:
        text: the text, with every special token the template writes.
        learned: the character spans of the assistant's turns, each with its end-of-turn token.
        cut: the characters that may be cut from a row that is too long: from the first user's words to the last words
            before the final answer. What stands around them (BOS, system, tools, the final header) is kept.
    """

    text: str
    learned: tuple[Span, ...]
    cut: Span


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds the assistant's words in the result.

    The words of a turn are what the template adds between the prompt for it (``add_generation_prompt=True``) and its
    end, so tool calls count, and the turn's header does not. Templates that rewrite earlier turns later on (those that
    drop old reasoning) break that rule; for them the turn's content itself is looked for. What a template writes of its
    own between header and content (an empty reasoning block) belongs to the prompt.

    Args:
        tokenizer: a tokenizer with a ``chat_template``.

    Raises:
        DataError: by :meth:`render`, for a conversation that the template refuses, or whose turns cannot be found.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        specials = {str(token) for token in tokenizer.all_special_tokens}
        specials.update(str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special)
        self._specials = sorted(specials, key=len, reverse=True)
        self._end: str | None = None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The whole conversation; every assistant's turn is learned."""
        text = self._apply(messages, tools)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        spans: list[Span] = []
        for turn in turns:
            span = self._span_by_prefix(text, messages, tools, turn)
            span = span or self._span_by_content(text, messages, tools, turn)
            if span is None:
                raise DataError(
                    f"the chat template rewrites turn {turn} ({messages[turn].get('content')!r:.60}) so that it cannot "
                    "be found in the conversation. Train on a row that ends with this turn, or give another "
                    "`chat_template`"
                )
            spans.append(self._with_end_token(text, span))
        last = spans[-1]
        if turns[-1] == len(messages) - 1:
            text = text[: last[1]]  # a line break after the end token is never generated
            if not self._ends_turn(text[last[0] :]):
                end = str(self._tokenizer.eos_token or "")
                text, spans[-1] = text + end, (last[0], last[1] + len(end))
        return Rendered(text, tuple(spans), self._cut(text, messages, spans[-1][0]))

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The conversation before an answer, up to where the words of an answer begin; nothing in it is learned."""
        rendered = self.render([*messages, {"role": "assistant", "content": "answer"}], tools)
        text = rendered.text[: rendered.learned[-1][0]]
        return Rendered(text, (), rendered.cut)

    def end_of_turn(self) -> str:
        """What the template writes after an assistant's words: its end-of-turn token, or the tokenizer's EOS."""
        if self._end is None:
            probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
            rendered = self.render(probe)
            words = rendered.text[slice(*rendered.learned[-1])]
            self._end = words[words.rindex("answer") + len("answer") :]
        return self._end

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any] | None, **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tools=tools or None, tokenize=False, **options)
        except Exception as error:  # jinja's TemplateError, and whatever a template's own code raises
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the chat template refuses a conversation with the roles {roles} ({type(error).__name__}: {error})"
            ) from error

    def _span_by_prefix(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int
    ) -> Span | None:
        if turn == 0:
            return None
        head = self._apply(messages[:turn], tools, add_generation_prompt=True)
        whole = text if turn == len(messages) - 1 else self._apply(messages[: turn + 1], tools)
        if not (whole.startswith(head) and text.startswith(whole)):
            return None
        start = len(head)
        content = messages[turn].get("content")
        if isinstance(content, str) and content.strip() and not messages[turn].get("tool_calls"):
            found = text.find(content.strip(), start, len(whole))
            lead_in = text[start:found] if found >= 0 else ""
            # Leading blanks of the content are its own; anything else there was written by the template.
            if lead_in.strip():
                start = found
        return start, len(whole)

    def _span_by_content(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int
    ) -> Span | None:
        content = messages[turn].get("content")
        if not isinstance(content, str) or not content.strip():
            return None
        marker = "\u2063turn\u2063"  # invisible separators: no template and no text holds this
        marked = self._apply([*messages[:turn], {**messages[turn], "content": marker}, *messages[turn + 1 :]], tools)
        if marked.count(marker) != 1:
            return None
        before, after = marked.split(marker)
        if not (text.startswith(before) and text.endswith(after)):
            return None
        start, stop = len(before), len(text) - len(after)
        if text[start:stop].strip() != content.strip():
            return None
        end = next((after[: len(s)] for s in self._specials if after.lstrip().startswith(s)), "")
        blanks = len(after) - len(after.lstrip()) if end else 0
        return start, stop + blanks + len(end)

    def _with_end_token(self, text: str, span: Span) -> Span:
        start, stop = span
        return start, start + len(text[start:stop].rstrip()) if self._ends_turn(text[start:stop].rstrip()) else stop

    def _ends_turn(self, text: str) -> bool:
        return any(text.endswith(special) for special in self._specials)

    def _cut(self, text: str, messages: Sequence[Message], answer_start: int) -> Span:
        """From the first user's words to the last words before the answer."""
        start, stop = None, None
        position = 0
        for message in messages:
            content = message.get("content")
            words = content.strip() if isinstance(content, str) else ""
            found = text.find(words, position, answer_start) if words else -1
            if found < 0:
                continue
            position = found + len(words)
            if message["role"] not in ("system", "developer"):
                start = found if start is None else start
                stop = position
        return (answer_start, answer_start) if start is None or stop is None else (start, stop)
