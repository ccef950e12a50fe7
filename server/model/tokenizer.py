"""Text to token ids and back for the base model: plain prompts, chats through its template, single tokens.

Knows no HTTP and no sampling. Everything here may be called from several threads at once.
"""

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.errors import InvalidRequestError, ModelLoadError
from server.model.detokenizer import IncrementalDetokenizer, TextDelta
from server.model.hidden_text import ControlTexts, HiddenText

__all__ = ["ChatTokenizer", "IncrementalDetokenizer", "TextDelta"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece vocabularies spell a token that is one byte."""

_SENTENCEPIECE_SPACE = "\u2581"


class ChatTokenizer:
    """A fast tokenizer with its chat template.

    Control tokens (`<|im_start|>` and kin) are honoured in plain prompts, as vLLM does for /v1/completions, whose
    callers write the whole prompt; in chats only where the template puts them, never inside a message, so that
    what a user typed cannot open a turn of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        # The Rust tokenizer itself: transformers' wrapper sets truncation on every call, which threads must not share.
        self._backend = tokenizer.backend_tokenizer
        self._literal = copy.deepcopy(self._backend)
        self._literal.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        marked_special = {token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(marked_special.union(tokenizer.all_special_ids))
        """Control tokens: dropped from text by default, never read from message contents."""
        spelled = (self._backend.id_to_token(token_id) for token_id in sorted(self.special_ids))
        self._control = ControlTexts([text for text in spelled if text])
        self.is_byte_level = type(self._backend.decoder).__name__ == "ByteLevel"

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Load the tokenizer files of a model folder. Raises ModelLoadError."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # Foreign files; config.json is read and validated here as well.
            raise ModelLoadError(
                f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelLoadError(
                f"the tokenizer in {folder} has no tokenizer.json and transformers cannot make one; add it"
            )
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's logits may be wider."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        return self._token_id("eos_token_id")

    @property
    def bos_token_id(self) -> int | None:
        return self._token_id("bos_token_id")

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a plain prompt; control tokens spelled out in it are honoured."""
        return list(self._encode(text, "prompt", add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, without the clean-up of spaces that some tokenizers ask for: it cannot be streamed.

        Raises InvalidRequestError for ids that are no 32-bit number; ids without a token decode to nothing.
        """
        try:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        except (OverflowError, TypeError) as error:
            raise InvalidRequestError(f"token ids must lie in 0 to {self.vocab_size - 1}", param="tokens") from error

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a chat: exactly `apply_chat_template` as long as no message spells out a control token.

        Raises InvalidRequestError when there is no template or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequestError("the base model has no chat template; use /v1/completions", param="messages")
        if not messages:
            raise InvalidRequestError("messages must hold at least one message", param="messages")
        hidden = HiddenText(self._control, [_with_text_content(message) for message in messages])
        try:
            rendered = self._tokenizer.apply_chat_template(
                hidden.messages,
                tokenize=False,
                # A generation prompt would open another turn after the one to be continued.
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = hidden.reveal(str(error))
            raise InvalidRequestError(
                f"the chat template refuses these messages: {reason}", param="messages"
            ) from error
        return self._encode_rendered(str(rendered), hidden)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token: exact for byte-level BPE, spaces and byte tokens resolved for SentencePiece."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            # Their text stands for itself; that is also what decoding makes of it.
            token = self._added[token_id]
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:
                return str(token).encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace(_SENTENCEPIECE_SPACE, " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _token_id(self, name: str) -> int | None:
        token_id = getattr(self._tokenizer, name, None)
        return None if token_id is None else int(token_id)

    def _encode(self, text: str, param: str, add_special_tokens: bool = False) -> Any:
        try:
            return _encoded(self._backend, text, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:  # the first is what the Rust side makes of a lone surrogate
            raise _not_unicode(param) from error

    def _encode_rendered(self, rendered: str, hidden: HiddenText) -> list[int]:
        encoding = self._encode(rendered, "messages")
        if not hidden:
            return list(encoding.ids)
        whole = self._encode(hidden.reveal(rendered), "messages")
        if [i for i in whole.ids if i in self.special_ids] == [i for i in encoding.ids if i in self.special_ids]:
            return list(whole.ids)  # what was hidden made no control token after all
        token_ids: list[int] = []
        found = encoding.ids  # a new list every time
        piece_start = 0  # first token of the current piece between two control tokens
        text_start = 0
        for index, (token_id, (start, end)) in enumerate(zip(found, encoding.offsets, strict=True)):
            if token_id in self.special_ids:
                token_ids += self._piece(found[piece_start:index], rendered[text_start:start], hidden)
                token_ids.append(token_id)
                piece_start, text_start = index + 1, end
        return token_ids + self._piece(found[piece_start:], rendered[text_start:], hidden)

    def _piece(self, token_ids: list[int], text: str, hidden: HiddenText) -> list[int]:
        """Ids of text between two control tokens; where something is hidden in it, that is spelled out literally."""
        revealed = hidden.reveal(text)
        if revealed == text:
            return token_ids
        return list(_encoded(self._literal, revealed, False).ids)


def _encoded(backend: Any, text: str, add_special_tokens: bool) -> Any:
    """One text's encoding. As a batch, since for those alone the library lets go of the GIL: a text of some MB takes
    seconds, in which nothing else would run."""
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _with_text_content(message: dict[str, Any]) -> dict[str, Any]:
    """Content given as a list of text parts becomes one string, which is what templates of text models expect."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part for part in map(_text_of_part, content) if part is not None]
    if len(texts) != len(content):
        raise InvalidRequestError("content parts must have type 'text': this server is text-only", param="messages")
    return {**message, "content": "\n".join(texts)}


def _text_of_part(part: Any) -> str | None:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else None


def _not_unicode(param: str) -> InvalidRequestError:
    return InvalidRequestError("the text holds half of a surrogate pair, which is not Unicode text", param=param)


def _byte_alphabet() -> Iterable[tuple[str, int]]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest follows U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    yield from ((chr(byte), byte) for byte in sorted(printable))
    yield from ((chr(0x100 + index), byte) for index, byte in enumerate(others))


_BYTE_OF_CHARACTER = dict(_byte_alphabet())
