"""A running server as what `whipstaff fit` reads activations from."""

import time
import weakref
from typing import Any

import httpx

from whipstaff.server.errors import reason_in
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.served import Ask, ServedModel
from whipstaff.steering.shape import config_shape

PARALLEL = 4  # requests at once
_PATIENCE = httpx.Timeout(30, read=600)  # a busy server answers late
_TRIES = 5  # of a request that the server has no room for
_LONGEST_WAIT = 30.0  # seconds, whatever a server says


def served(
    url: str,
    api_key: str | None,
    tokenizer: str | None,
    batch_size: int,
    parallel: int,
    transport: httpx.BaseTransport | None = None,
) -> ServedModel:
    """The model of a server.

    Args:
        tokenizer: a folder or a name on the hub; None: where the server loaded its model from.

    Raises: SteeringError where the server cannot be asked, or its tokenizer is not to be had here.
    """
    from transformers import AutoConfig, AutoTokenizer

    ask = asking(url, api_key, parallel, transport)
    card = ask("GET", "/v1/models", None)["data"][0]
    name = tokenizer or card.get("root") or card["id"]
    try:
        config = AutoConfig.from_pretrained(name)
        found: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SteeringError(
            f"{name}: no tokenizer and config that transformers loads; say where the server's are: {error}", "tokenizer"
        ) from error
    experts = int(getattr(config.get_text_config(), "num_experts_per_tok", 0) or 0)
    most = card.get("max_model_len")  # of which one token is generated
    room = None if most is None else int(most) - 1
    return ServedModel(ask, card["id"], found, config_shape(config), experts, batch_size, parallel, room)


def asking(
    url: str, api_key: str | None, parallel: int = PARALLEL, transport: httpx.BaseTransport | None = None
) -> Ask:
    """A way to ask a server, from so many threads at once. One that has no room is asked again when it says."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel)
    client = httpx.Client(base_url=url, headers=headers, timeout=_PATIENCE, limits=limits, transport=transport)

    def ask(method: str, path: str, body: Any) -> Any:
        try:
            answer = client.request(method, path, json=body)
            for _ in range(_TRIES - 1):
                if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    break
                time.sleep(_wait(answer))
                answer = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise SteeringError(f"{url}: {error or type(error).__name__}", "server") from error
        if answer.is_success:
            return answer.json()
        raise SteeringError(f"{url} answers {answer.status_code}: {reason_in(answer.text)}", "server")

    weakref.finalize(ask, client.close)  # whoever asks no more leaves no connection open
    return ask


def _wait(answer: httpx.Response) -> float:
    """Seconds, as the server says."""
    try:
        return min(max(float(answer.headers.get("retry-after", "1")), 0.1), _LONGEST_WAIT)
    except ValueError:
        return 1.0
