"""Requests and responses of OpenAI's completions API, as dicts.

https://platform.openai.com/docs/api-reference/completions, plus `top_k` and `return_token_ids`.
"""

import math
import secrets
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from brisk.errors import UserError
from brisk.generation.prompt import encode_prompt
from brisk.generation.text_stream import TextStream
from brisk.serving.scheduler import Sample

PROMPT_TOKENS = 2**16
INTERVAL = 0.003  # seconds between chunks of all streams; one costs about as much as a token
NUMBER, WHOLE, FLAG = "a number from {} to {}", "a whole number from {} to {}", "true or false"
TYPES = {NUMBER: (int, float), WHOLE: (int,), FLAG: (bool,)}
FIELDS = {  # name: default, type, lowest, highest
    "max_tokens": (16, WHOLE, 1, math.inf),
    "temperature": (1.0, NUMBER, 0, 2),
    "top_p": (1.0, NUMBER, 0, 1),
    "top_k": (0, WHOLE, 0, 2**31),
    "n": (1, WHOLE, 1, math.inf),
    "seed": (None, WHOLE, -(2**63), 2**63),
    "logprobs": (None, WHOLE, 0, 20),
    "stream": (False, FLAG, False, True),
    "return_token_ids": (False, FLAG, False, True),
}
ALLOWED = {  # name: supported values; the first is the default
    **{"presence_penalty": [0], "frequency_penalty": [0], "logit_bias": [{}], "suffix": [""]},
    **{"echo": [False], "best_of": [1]},
    "stream_options": [{}, *({"include_usage": usage} for usage in (False, True, None))],
}
OTHERS = {"model", "prompt", "stop", "user"}
KINDS = {401: "authentication_error", 429: "rate_limit_exceeded"}  # OpenAI's "type" of an error
KINDS |= {500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An error response. `param` is the invalid field of the request."""

    def __init__(self, status, message, param=None, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = KINDS.get(status, "invalid_request_error")
        self.body = {"error": dict(message=message, type=kind, param=param, code=None)}


class Served(NamedTuple):
    """A model's name, tokenizer and limits."""

    name: str
    tokenizer: object
    documents: bool  # whether texts begin and end with an end-of-text token
    rows: int
    max_tokens: int


class Completion:
    """A validated request. Raises `ApiError` for an unknown field or a value out of range."""

    def __init__(self, body, served):
        check(isinstance(body, dict), "the body is not a JSON object")
        given = {key: value for key, value in body.items() if value is not None}
        self.served = served
        for key, value in given.items():
            name = ascii(key)[1:-1][:50]  # JSON may have half a character
            check(key in {*FIELDS, *ALLOWED, *OTHERS}, f"{name} is not supported", name)
            allowed = ALLOWED.get(key, [value])
            check(value in allowed, f"{key} must be one of {allowed}", key)
        if given.get("model", served.name) != served.name:
            raise ApiError(404, f"model must be {served.name}, or left out", "model")
        limits = {"max_tokens": served.max_tokens, "n": served.rows}
        for key, (default, kind, low, high) in FIELDS.items():
            value, high = given.get(key, default), limits.get(key, high)
            right = type(value) in TYPES[kind] and low <= value <= high
            check(key not in given or right, f"{key} is {kind.format(low, high)}", key)
            setattr(self, key, value)
        self.include_usage = bool(given.get("stream_options", {}).get("include_usage"))
        stop = given.get("stop", [])
        self.stop = [stop] if isinstance(stop, str) else stop
        known = are(str, self.stop) and len(self.stop) <= 4 and "" not in self.stop
        check(known, "stop is a text, or a list of up to 4", "stop")
        prompt = given.get("prompt", "")
        prompts = prompt if isinstance(prompt, list) and not are(int, prompt) else [prompt]
        check(len({*map(type, prompts)}) == 1, "prompts are all texts or all token ids", "prompt")
        few = len(prompts) * self.n <= served.rows
        check(few, f"a request has at most {served.rows} samples", "n")
        self.prompts = [prompt_ids(prompt, served) for prompt in prompts]
        self.lengths = [0] * len(prompts) * self.n  # characters of the tokens returned so far

    def samples(self, put):
        """Yield the `Sample`s. The engine's thread calls `put(index, text, tokens, finish)`."""
        tokenizer, due = self.served.tokenizer, 0 if self.stream else math.inf
        seed = secrets.randbits(63) if self.seed is None else self.seed
        settings = self.temperature, self.top_k or None, self.top_p
        ends = [tokenizer.eot] if self.served.documents else []
        for index in range(len(self.prompts) * self.n):
            ids, number = [*self.prompts[index // self.n]], index % self.n
            stream = TextStream(tokenizer, self.stop, ends)
            drawing = ids, self.max_tokens, settings, seed, number, self.logprobs
            chunks = {"put": partial(put, index), "due": due, "interval": INTERVAL}
            yield Sample(*drawing, stream=stream, **chunks)

    def choice(self, index, text, tokens, finish):
        """An entry of "choices": the next part of sample `index`."""
        found = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
        if self.logprobs is not None:
            names = [self.token_name(token.id) for token in tokens]
            *starts, end = accumulate(map(len, names), initial=self.lengths[index])
            self.lengths[index] = end
            found["logprobs"] = {
                "tokens": names,
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{self.token_name(i): p for i, p in t.top} for t in tokens],
                "text_offset": starts,
            }
        if self.return_token_ids:
            found["prompt_token_ids"] = self.prompts[index // self.n]
            found["token_ids"] = [token.id for token in tokens]
            found["top_token_ids"] = [[i for i, _ in token.top] for token in tokens]
        return found

    def token_name(self, token_id):
        """The text of a token, or its bytes in OpenAI's notation if they are not valid UTF-8."""
        token = self.served.tokenizer.token_bytes(token_id)
        try:
            return token.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def check(condition, message, param=None):
    if not condition:
        raise ApiError(400, message, param)


def are(kind, values):
    return isinstance(values, list) and all(type(value) is kind for value in values)


def prompt_ids(prompt, served):
    """The token ids of a prompt, a text or a list of ids."""
    ids, highest = prompt, served.tokenizer.vocab_size - 1
    if isinstance(prompt, str):
        try:
            ids = encode_prompt(prompt, served.tokenizer, served.documents)
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from error
    known = ids and are(int, ids) and min(ids) >= 0 and max(ids) <= highest
    check(known, f"a prompt is a text, or token ids from 0 to {highest}", "prompt")
    check(len(ids) <= PROMPT_TOKENS, f"the prompt has more than {PROMPT_TOKENS} tokens", "prompt")
    return ids
