"""Writes beam_groups.json: diverse beam search by the last transformers that has it in its library.

    python -m venv /tmp/groups && /tmp/groups/bin/pip install torch transformers==4.55.4 safetensors
    /tmp/groups/bin/python tests/golden/decoding/beam_groups.py

The model is models/base. Padding is a token that no beam would say, so that a group that is done weighs on nothing.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "length_penalty": 0.0},
    {"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 2.0, "early_stopping": True},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.8, "length_penalty": -1.0},
]


def main() -> None:
    model = LlamaForCausalLM.from_pretrained(HERE / "models" / "base").eval()
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 256, (4,), generator=random).tolist() for _ in range(8)]
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in prompts])
    often = logits.mean(0).topk(12).indices[::3].tolist()  # tokens that beams say now and then: they end answers
    unlikely = int(logits.amax(0).argmin())
    cases = []
    for index, prompt in enumerate(prompts):
        for setting in SETTINGS:
            eos = often[: index % 4] or [1]
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_return_sequences=setting["num_beams"],
                max_new_tokens=12,
                do_sample=False,
                use_cache=False,
                eos_token_id=eos,
                pad_token_id=unlikely,
                return_dict_in_generate=True,
                output_scores=True,
                **setting,
            )
            answers = [[t for t in row if t != unlikely] for row in out.sequences[:, len(prompt) :].tolist()]
            scores = out.sequences_scores.tolist()
            cases.append({"prompt": prompt, "eos": eos, **setting, "answers": answers, "scores": scores})
    said = {
        "provenance": f"transformers {transformers.__version__}, generate; an answer ends in the first of eos, "
        "whichever ended it",
        "max_tokens": 12,
        "cases": cases,
    }
    (HERE / "beam_groups.json").write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
