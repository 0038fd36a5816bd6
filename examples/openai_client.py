"""OpenAI's own client: Whipstaff's fields go into `extra_body`, and what was done comes back as `whipstaff`."""

import argparse
from typing import Any

from openai import OpenAI

PROMPT = "In the morning Mara opened the door, and"
MESSAGES: Any = [{"role": "user", "content": "Where does Mara live?"}]
GLOOMY: dict[str, Any] = {"steering": {"vector": "cheerful", "scale": -8}}
TUNED: dict[str, Any] = {"decoding": {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--url", default="http://localhost:8000")
    flags.add_argument("--model", default="demo")
    flags.add_argument("--key", default="none")
    args = flags.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key=args.key)

    print("plain:   ", complete(client, args.model, {}))
    print("steered: ", complete(client, args.model, GLOOMY))
    print("asked:   ", chat(client, args.model, {}))
    print("decoded: ", chat(client, args.model, TUNED))
    print("both:    ", chat(client, args.model, TUNED | GLOOMY))
    print("streamed:", end="", flush=True)
    stream(client, args.model, TUNED)


def complete(client: OpenAI, model: str, extra: dict[str, Any]) -> str:
    answer = client.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=24, stop=["."], extra_body=extra
    )
    said = answer.choices[0].text.strip()
    for entry in receipt(answer).get("steering", []):
        said += f"   [{entry['vector']} on {entry['edited_tokens']} tokens]"
    return said


def chat(client: OpenAI, model: str, extra: dict[str, Any]) -> str:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=48, extra_body=extra
    )
    return (answer.choices[0].message.content or "").strip()


def receipt(answer: Any) -> dict[str, Any]:
    """What the server did; of a plain request it says nothing. The client keeps fields that it does not know."""
    said: dict[str, Any] = getattr(answer, "whipstaff", {})
    return said


def stream(client: OpenAI, model: str, extra: dict[str, Any]) -> None:
    """With `explain`, every chunk says by how much the method moved each token."""
    chunks: Any = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=48,
        stream=True,
        extra_body=extra | {"explain": {"top": 1}},
    )
    moved: list[tuple[float, str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            for record in getattr(choice, "explain", []):
                moved.append((record["kl"], record["token"]))
    print()
    if moved:
        kl, token = max(moved)
        print(f"the method moved {token!r} most: {kl:.2f} nats")


if __name__ == "__main__":
    main()
