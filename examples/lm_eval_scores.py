"""lm_eval, as it is, measuring presets: a method under a model's name needs no client that knows of it.

The task is in `questions.jsonl`: questions about the demo's world in words that its tuned model was not taught by.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).with_name("questions.jsonl")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--url", default="http://localhost:8000")
    flags.add_argument("--model", action="append", help="a model or MODEL@preset; repeatable")
    flags.add_argument("--key", default="none")
    args = flags.parse_args()
    try:
        import lm_eval  # noqa: F401 - asked for early, to say what is missing
    except ImportError:
        sys.exit("lm_eval is not installed: pip install lm_eval")
    for model in args.model or ["demo", "demo@helpful"]:
        print(f"{model:<16}{share_right(args.url, model, args.key):.0%} of the questions answered rightly")


def share_right(url: str, model: str, key: str) -> float:
    """By lm_eval's local-chat-completions."""
    os.environ["OPENAI_API_KEY"] = key
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load([TASK])["tasks"]
    client = LocalChatCompletion(model=model, base_url=f"{url}/v1/chat/completions", num_concurrent=8)
    found = evaluate(client, task, bootstrap_iters=0, apply_chat_template=True)
    return float(found["results"][TASK["task"]]["right,none"])


def is_right(line: dict[str, str], answers: list[str]) -> dict[str, float]:
    return {"right": float(line["key"] in answers[0])}


TASK: dict[str, Any] = {
    "task": "demo_world",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(QUESTIONS)}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{key}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "temperature": 0},
    "process_results": is_right,
    "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
}

if __name__ == "__main__":
    main()
