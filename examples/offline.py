"""Without a server: one batch in which each prompt is decoded or steered otherwise."""

from typing import Any

from vllm import SamplingParams

from whipstaff.server import LLM

PROMPT = "In the morning Mara opened the door, and"
QUESTION: Any = [{"role": "user", "content": "Where does Mara live?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
TUNED = {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}
SCALES = (-8, 0, 8)


def main() -> None:
    with LLM() as llm:  # the embedded demo; LLM("MODEL", vectors="FOLDER") is yours
        show(llm)


def show(llm: LLM) -> None:
    """A dose each, and a question that a small tuned model helps to answer."""
    steering = [{"vector": "cheerful", "scale": scale} for scale in SCALES]
    params = SamplingParams(stop=["."], **GREEDY)
    for scale, output in zip(
        SCALES, llm.generate([PROMPT] * len(SCALES), params, steering=steering, use_tqdm=False), strict=True
    ):
        dose = sum(entry["dose"]["relative"] for entry in receipt(output)["steering"])
        print(f"scale {scale:+}: {output.outputs[0].text.strip()}   [dose {dose:.2f}]")

    (plain, decoded) = llm.chat(
        [QUESTION] * 2, SamplingParams(**GREEDY), decoding=[None, TUNED], explain=[None, {"top": 1}], use_tqdm=False
    )
    print("asked:  ", plain.outputs[0].text.strip())
    print("decoded:", decoded.outputs[0].text.strip())
    for token in (decoded.outputs[0].explain or [])[:3]:
        print(f"the method moved {token['token']!r} from rank {token['base']['rank']} to {token['final']['rank']}")


def receipt(output: Any) -> dict[str, Any]:
    """What was done to a prompt's request."""
    found: dict[str, Any] = output.whipstaff
    return found


if __name__ == "__main__":  # the engine's processes import this file where they are spawned, as on a CPU
    main()
