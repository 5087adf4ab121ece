"""OpenAI's words: bodies of requests in, objects of answers out. Source: the types of openai 3.57.

Not here: HTTP (``app``), and who computes (``engine``).
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.runtime.decoding import Alternative, Generation, Token
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.prompts import ids_of, separate
from mythos_edge.runtime.request_values import Within, flag, real, shown, texts, whole
from mythos_edge.runtime.session import Session

# The share of the trained depth that each word stands for; nothing is the least, one loop step.
EFFORTS = {"none": 0.0, "minimal": 0.0, "low": 0.25, "medium": 0.5, "high": 1.0, "xhigh": 1.0, "max": 1.0}
_FINISHED = {"stop_id": "stop", "stop_string": "stop", "length": "length", "context": "length"}
_MOST_CHOICES = Within(least=1, most=16)
_BIAS = Within(least=-100, most=100)
_BOUNDED = Within(least=1)
_MOST_PROMPTS = 128
_MOST_STOPS = 16
_LONGEST_STOP = 1000
_ALTERNATIVES = Within(least=0, most=20)
# Options of ours by their own names, which win over OpenAI's.
_OURS = (
    *("max_depth", "min_depth", "threshold", "policy", "draft_depth", "draft_tokens", "max_lag"),
    *("top_k", "min_p", "repetition_penalty"),
)
_SHARED = (
    *("model", "stream", "stream_options", "n", "stop", "seed", "max_tokens", "temperature", "top_p", "logit_bias"),
    *("logprobs", "reasoning_effort", "user", *_OURS),
)
_CHAT = (*_SHARED, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")
_COMPLETION = (*_SHARED, "prompt")
FIELDS = frozenset((*_CHAT, *_COMPLETION))
# Rows that a prompt is run in at once: more would make those who wait for their next token wait longer.
_CHUNK = 128


@dataclass(frozen=True)
class Wanted:
    """A body that was understood: ``n`` answers to each of ``prompts`` (token ids).

    ``ignored`` are the fields that mean nothing here.
    """

    chat: bool
    prompts: list[list[int]]
    options: Options
    n: int
    logit_bias: dict[int, float]
    stream: bool
    include_usage: bool
    logprobs: bool
    ignored: tuple[str, ...]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def options_of(self, choice: int) -> Options:
        """The options of one choice: with a seed, each of several has its own, counted from it."""
        seed = self.options.seed
        if choice == 0 or seed is None:
            return self.options
        values = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        return Options(**{**values, "seed": seed + choice})


def chat_wanted(
    body: Mapping[str, Any], session: Session, template: ChatTemplate, defaults: Mapping[str, Any], context: int
) -> Wanted:
    """The body of a chat completion. ``defaults`` are options where it sets none; where it bounds its answer by none,
    prompt and answer have ``context`` positions. Raises UsageError."""
    if session.tokenizer is None:
        raise UsageError("this model has no tokenizer, which a talk needs: ask for /v1/completions with token ids")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"messages is {shown(messages)}, expected a list of at least one message")
    more = body.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise UsageError(f"chat_template_kwargs is {shown(more)}, expected an object")
    taken = {"messages", "add_generation_prompt", "bos_token", "eos_token"} & set(more)
    if taken:
        raise UsageError(f"chat_template_kwargs has {', '.join(sorted(taken))}, which are not for the caller to say")
    ids = template.ids(session.tokenizer, [_message(number, one) for number, one in enumerate(messages)], **more)
    tokens = [body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    most = tokens[0] if tokens else max(1, min(context, session.max_context) - len(ids))
    return _wanted(body, session, [ids], most, template.stops, defaults, chat=True)


def completion_wanted(body: Mapping[str, Any], session: Session, defaults: Mapping[str, Any]) -> Wanted:
    """The body of a completion: text, token ids, or a list of either. Raises UsageError."""
    if "prompt" not in body:
        raise UsageError("prompt is missing, expected text, token ids, or a list of either")
    prompts, _ = separate(body["prompt"])
    if len(prompts) > _MOST_PROMPTS:
        raise UsageError(f"prompt is a list of {len(prompts)}, expected at most {_MOST_PROMPTS}: ask more often")
    ids = [ids_of(prompt, session.model, session.tokenizer, first=True) for prompt in prompts]
    # OpenAI's own default is 16.
    tokens = body.get("max_tokens")
    return _wanted(body, session, ids, 16 if tokens is None else tokens, (), defaults, chat=False)


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message with its content as one text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UsageError(f"messages[{number}] is {shown(message)}, expected an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise UsageError(f"messages[{number}] has content that is no text, which this model cannot take")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise UsageError(f"messages[{number}].content is {shown(content)}, expected text")
    return {**message, "content": content}


def _wanted(
    body: Mapping[str, Any],
    session: Session,
    prompts: list[list[int]],
    max_tokens: Any,
    stops: Sequence[str],
    defaults: Mapping[str, Any],
    chat: bool,
) -> Wanted:
    if any(not ids for ids in prompts):
        raise UsageError("prompt is empty, expected at least one token")
    given = {name: value for name, value in body.items() if value is not None}
    values: dict[str, Any] = {"temperature": 1.0, "chunk": _CHUNK, **defaults}
    values["max_new_tokens"] = whole("max_tokens", max_tokens, _BOUNDED)
    values |= {name: given[name] for name in ("temperature", "top_p", "seed") if name in given}
    if "reasoning_effort" in given:
        values["max_depth"] = _depth_of(given["reasoning_effort"], session.model.deepest)
    values |= {name: given[name] for name in _OURS if name in given}
    if "auto" in (values.get("draft_depth"), values.get("draft_tokens")) or (
        "draft_depth" in values and "draft_tokens" not in values
    ):
        raise UsageError("draft_depth needs draft_tokens, both as numbers: a server measures no single sequence")
    values["stop_strings"] = (*stops, *_stops(given.get("stop", ())))
    logprobs, values["top_logprobs"] = _logprobs(given, chat)
    include = given.get("stream_options") or {}
    if not isinstance(include, dict):
        raise UsageError(f"stream_options is {shown(include)}, expected an object")
    return Wanted(
        chat=chat,
        prompts=prompts,
        options=Options(**values),
        n=whole("n", given.get("n", 1), _MOST_CHOICES),
        logit_bias=_bias(given.get("logit_bias", {})),
        stream=flag("stream", given.get("stream", False)),
        include_usage=flag("stream_options.include_usage", include.get("include_usage") or False),
        logprobs=logprobs,
        ignored=tuple(sorted(set(given) - set(_CHAT if chat else _COMPLETION))),
    )


def _logprobs(given: Mapping[str, Any], chat: bool) -> tuple[bool, int]:
    """Whether log-probabilities are asked for, and of how many of the likeliest tokens beside the chosen one."""
    if not chat:
        return "logprobs" in given, whole("logprobs", given.get("logprobs", 0), _ALTERNATIVES)
    asked = flag("logprobs", given.get("logprobs", False))
    top = whole("top_logprobs", given.get("top_logprobs", 0), _ALTERNATIVES)
    if top and not asked:
        raise UsageError(f"top_logprobs is {top}, which needs logprobs: true")
    return asked, top


def _depth_of(effort: Any, trained: int) -> int:
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise UsageError(f"reasoning_effort is {shown(effort)}, expected one of {', '.join(EFFORTS)}")
    return max(1, round(EFFORTS[effort] * trained))


def _stops(given: Any) -> tuple[str, ...]:
    """Texts that end an answer. Every token is searched for all of them, while all others wait."""
    stops = texts("stop", given)
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        raise UsageError(
            f"stop has {len(stops)} texts of up to {max(map(len, stops))} characters, expected at most {_MOST_STOPS} "
            f"of at most {_LONGEST_STOP}"
        )
    return stops


def _bias(given: Any) -> dict[int, float]:
    """Reads the number to add to the logit of each token, by its id. JSON writes ids as texts."""
    if not isinstance(given, dict):
        raise UsageError(f"logit_bias is {shown(given)}, expected an object of token ids and numbers")
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit()) or len(name) > 18:
            raise UsageError(f"logit_bias has {shown(name)}, expected a token id")
        bias[int(name)] = real("logit_bias", value, _BIAS)
    return bias


class Choice:
    """One answer as it comes: tokens in, pieces of text with the depth of their tokens out."""

    def __init__(self, wanted: Wanted, session: Session) -> None:
        self._wanted, self._session = wanted, session
        self._ids: list[int] = []
        self._depths: list[int] = []
        self._logprobs: list[dict[str, Any]] = []
        self._offset = 0

    def piece(self, token: Token) -> dict[str, Any] | None:
        """The fields of a chunk's choice, where the token has made text final; None while it is held back."""
        self._ids.append(token.id)
        self._depths.append(token.depth)
        if self._wanted.logprobs:
            self._logprobs.append(self._logprob(token.id, token.logprob, token.top_logprobs))
        return self.rest(token.text or "") if token.text or self._session.tokenizer is None else None

    def rest(self, text: str = "") -> dict[str, Any]:
        """The fields of a chunk with ``text`` and what was not given out yet."""
        ids, depths, logprobs = self._ids, self._depths, self._logprobs
        self._ids, self._depths, self._logprobs = [], [], []
        made: dict[str, Any] = {"token_ids": ids, "depths": depths}
        made["logprobs"] = self._told(logprobs) if self._wanted.logprobs else None
        return {**made, "delta": {"content": text}} if self._wanted.chat else {**made, "text": text}

    def whole(self, result: Generation) -> dict[str, Any]:
        """The fields of a whole answer's choice."""
        text = "" if result.text is None else result.text
        logprobs = None
        if self._wanted.logprobs:
            tops = result.top_logprobs or [()] * len(result.ids)
            tokens = zip(result.ids, result.logprobs, tops, strict=True)
            logprobs = self._told([self._logprob(*token) for token in tokens])
        made: dict[str, Any] = {"finish_reason": finish_reason(result), "logprobs": logprobs}
        made |= {"token_ids": result.ids, "depths": result.depths}
        if self._wanted.chat:
            return {**made, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**made, "text": text}

    def _logprob(self, token_id: int, logprob: float, top: Sequence[Alternative]) -> dict[str, Any]:
        tokenizer = self._session.tokenizer
        text = None if tokenizer is None else tokenizer.text_alone(token_id)
        return {
            **_entry(token_id, text, logprob),
            "top_logprobs": [_entry(one.id, one.text, one.logprob) for one in top],
        }

    def _told(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        if self._wanted.chat:
            return {"content": entries, "refusal": None}
        tokens = [entry["token"] for entry in entries]
        offsets = list(accumulate(map(len, tokens), initial=self._offset))
        self._offset = offsets.pop()
        tops = [{one["token"]: one["logprob"] for one in (*entry["top_logprobs"], entry)} for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": tops if self._wanted.options.top_logprobs else None,
            "text_offset": offsets,
        }


def _entry(token_id: int, text: str | None, logprob: float) -> dict[str, Any]:
    """A token as OpenAI tells it; one that is a part of a character alone has no bytes of its own here."""
    shown = str(token_id) if text is None else text
    return {"token": shown, "logprob": logprob, "bytes": None if "\ufffd" in shown else list(shown.encode())}


def finish_reason(result: Generation) -> str:
    """OpenAI's word for why a text ended."""
    return _FINISHED[result.finish_reason]


def usage_of(wanted: Wanted, results: Sequence[Generation], cached: int, seconds: float) -> dict[str, Any]:
    """The usage of a request. The prompt cache had ``cached`` tokens of its prompts."""
    prompt, made = sum(map(len, wanted.prompts)), sum(len(result.ids) for result in results)
    depths = [depth for result in results for depth in result.depths]
    accepted = sum(result.accepted for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(result.drafted for result in results) - accepted,
        },
        "mean_depth": sum(depths) / max(1, len(depths)),
        "block_calls": sum(result.block_calls for result in results),
        "time_s": seconds,
    }


def envelope(wanted: Wanted, model: str, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
    """An answer, or a chunk of one, around its choices."""
    kind = "chat.completion" if wanted.chat else "text_completion"
    prefix = "chatcmpl" if wanted.chat else "cmpl"
    return {
        "id": f"{prefix}-{wanted.id}",
        "object": f"{kind}.chunk" if chunk and wanted.chat else kind,
        "created": wanted.created,
        "model": model,
        "choices": choices,
    }
