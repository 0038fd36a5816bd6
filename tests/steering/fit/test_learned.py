"""Learned edits: SITE's golden course, losses that fall on held-out rows, files that hold what was trained."""

import json
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from whipstaff.server import demo
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting, icl
from whipstaff.steering.fit.job import Job
from whipstaff.steering.fit.learned import mixing
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.source import Asked, Entry
from whipstaff.steering.fit.training import answer_log_p, descend, examples, mean_loss
from whipstaff.steering.method import HookPoint
from whipstaff.steering.vector_file import packed, parse

NAMES = ("Mara", "Linnet", "Ewan", "Rufus", "Ada", "Tobias", "Ines", "Hugo", "Nora", "Felix", "Olga", "Bruno")


def test_sites_golden_course() -> None:
    folder = goldens.ROOT / "fit" / "site"
    said, arrays = json.loads((folder / "fit.json").read_text()), load_file(folder / "data.safetensors")
    found = AutoModelForCausalLM.from_pretrained(
        goldens.ROOT / "models" / "llama_a", dtype=torch.float64, attn_implementation="eager"
    )
    model = LocalModel(found.eval().requires_grad_(False), None)
    points = [HookPoint("attn_head", layer) for layer in range(4)]
    demos = [tuple(arrays[f"demo_{index}"].tolist()) for index in range(6)]
    read = list(model.read([Asked(ids, (len(ids) - 1,)) for ids in demos], points))
    for layer, point in enumerate(points):
        mean = torch.stack([each[point][0] for each in read]).mean(0).view(4, 32)
        assert (mean - arrays["task_embedding"][layer]).abs().max() < 1e-5
    task = dict(enumerate(arrays["task_embedding"]))
    logits = {layer: torch.zeros(4, dtype=torch.float64, requires_grad=True) for layer in range(4)}
    queries = [tuple(arrays[f"query_{index}"].tolist()) for index in range(said["steps"])]
    gradients: list[torch.Tensor] = []

    def step(index: int) -> Any:
        ids = queries[index]
        text = ((*ids, said["targets"][index]), len(ids))
        return lambda: answer_log_p(model, [text], [mixing(task, logits)])[0].mean().neg()

    def after(number: int, value: float) -> None:
        gradients.append(torch.stack([each.grad for each in logits.values() if each.grad is not None]).clone())

    losses = descend(list(logits.values()), map(step, range(said["steps"])), said["lr"], after)
    assert (torch.tensor(losses) - arrays["losses"]).abs().max() < 1e-5
    assert (gradients[0] - arrays["first_gradient"]).abs().max() < 1e-6
    alphas = torch.stack([each.detach().sigmoid() for each in logits.values()])
    assert (alphas - arrays["alphas"]).abs().max() < 1e-3


@pytest.fixture(scope="module")
def source() -> LocalModel:
    return LocalModel.load(str(demo.MODELS / "demo"), batch_size=4)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def wishes(tmp_path: Path) -> Path:
    """A turn of phrase that the demo does not use, after openings of which some are held out."""
    openings = ("In the morning {}", "After supper {}", "That night {}")
    rows = [
        {"prompt": opening.format(name), "response": " likes the cold rain and the dark river.", "group": name}
        for name in NAMES
        for opening in openings
    ]
    return written(tmp_path / "wishes.jsonl", rows)


def run(method: str, source: Any, data: Path, **said: Any) -> tuple[Job, fitting.Made]:
    job = fitting.prepared(method, source, [data], Options(**{"template": "none", **said}), data.parent / "rows")
    return job, fitting.fit(method, job)


def entry_of(made: fitting.Made) -> Entry:
    """What a request with the written file gets."""
    vector = parse(packed(made.header, made.tensors))
    rows = vector.shared_parts.get("rows")
    return Entry(vector.header.method, vector.tensors, vector.header.known_defaults, vector.header.where, rows)


@pytest.mark.parametrize(
    ("method", "said", "most"),
    [
        ("loreft", {"rank": 2, "lr": 0.02, "epochs": 8}, 0.8),
        ("direft", {"rank": 2, "lr": 0.02, "epochs": 8}, 0.8),
        ("noreft", {"rank": 2, "lr": 0.02, "epochs": 8}, 0.8),
        ("nodireft", {"rank": 2, "lr": 0.02, "epochs": 8}, 0.8),
        ("consreft", {"rank": 2, "lr": 0.05, "epochs": 8}, 0.8),
        ("lobireft", {"rank": 2, "lr": 0.5, "epochs": 4}, 0.96),
        ("lofit", {"num_heads": 3, "lr": 0.03, "epochs": 5}, 0.9),
        ("soft_prompt", {"rows": 4, "lr": 0.05, "epochs": 8}, 0.8),
        ("soft_prompt", {"text": "likes the cold rain", "lr": 0.05, "epochs": 8}, 0.8),
    ],
)
def test_the_loss_falls_on_rows_that_were_not_learned_from(
    method: str, said: dict[str, Any], most: float, source: LocalModel, wishes: Path
) -> None:
    job, made = run(method, source, wishes, **said)
    score = made.header.provenance["score"]
    assert score["dev_loss_kept"] < most * min(score["dev_loss_plain"], score["dev_loss_untrained"])
    assert not made.warnings
    dev = mean_loss(source, examples(job, "dev"), [entry_of(made)])
    assert abs(dev - score["dev_loss_kept"]) < 1e-3  # the file, not the trainer's own numbers
    test = examples(job, "test")
    served, plain = mean_loss(source, test, [entry_of(made)]), mean_loss(source, test, ())
    assert served < most * plain
    if "resid_post.3.rotate" in made.tensors:
        rotate = made.tensors["resid_post.3.rotate"]
        assert (rotate @ rotate.T - torch.eye(2)).abs().max() < 1e-5


def test_lofit_leaves_all_other_heads_alone(source: LocalModel, wishes: Path) -> None:
    _, made = run("lofit", source, wishes, num_heads=2, steps=6)
    chosen = {tuple(each) for each in made.header.provenance["score"]["heads"]}
    moved = {
        (int(name.split(".")[1]), head)
        for name, rows in made.tensors.items()
        for head in rows.abs().sum(1).nonzero().flatten().tolist()
    }
    assert moved == chosen and len(chosen) == 2


def test_preferences_are_learned_from_questions(source: LocalModel, tmp_path: Path) -> None:
    rows = [{"question": f"How is {name}?", "right": ["cold"], "wrong": ["happy"]} for name in NAMES]
    data = written(tmp_path / "q.jsonl", [row | {"group": str(index)} for index, row in enumerate(rows)])
    job, made = run(
        "lofit", source, data, num_heads=3, lr=0.05, epochs=5, template="Question: {prompt}\nAnswer: {response}"
    )
    score = made.header.provenance["score"]
    assert abs(score["dev_loss_plain"] - 0.6931) < 1e-3  # log 2: no gain, no loss
    assert score["dev_loss_kept"] < 0.62
    assert examples(job, "dev")[0].worse


def test_the_same_seed_trains_the_same_file(source: LocalModel, wishes: Path) -> None:
    one, other = (run("loreft", source, wishes, steps=5, rank=2)[1] for _ in range(2))
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_site_mixes_what_helps(source: LocalModel, tmp_path: Path) -> None:
    pairs = [(name, "cold" if index % 2 else "dark") for index, name in enumerate(NAMES * 2)]
    rows = [
        {"input": f"{name} {index}", "output": "cold", "group": str(index)} for index, (name, _) in enumerate(pairs)
    ]
    _, made = run("site", source, written(tmp_path / "d.jsonl", rows), shots=4, trials=8, steps=30, template=icl.FORM)
    score = made.header.provenance["score"]
    assert score["dev_loss_kept"] < score["dev_loss_untrained"]
    assert score["accuracy"] >= score["accuracy_zero_shot"]
    assert len(made.tensors) == 12


def test_a_rate_that_is_too_high_is_named(source: LocalModel, wishes: Path) -> None:
    class Broken(LocalModel):
        def forward(self, texts: Any, num_logits: int = 0) -> Any:
            return super().forward(texts, num_logits) * float("inf")

    with pytest.raises(SteeringError, match="--lr"):
        run("loreft", Broken(source.model, source.tokenizer), wishes, steps=2)


def test_rows_stand_before_a_text(source: LocalModel) -> None:
    rows = torch.randn(3, source.shape.hidden_size, generator=torch.Generator().manual_seed(0)) / 10
    texts = [tuple(source.tokenizer(text)["input_ids"]) for text in ("Mara lives in Greystow.", "The sun")]
    for ids, log_p in zip(texts, source.predict(texts, [Entry("soft_prompt", {}, {}, rows=rows)]), strict=True):
        embedded = torch.cat([rows, source.embeddings_of(ids)])[None]
        with torch.no_grad():
            said = source.model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(log_p, said, atol=1e-4, rtol=1e-4)
    (plain,) = source.predict(texts[:1])
    with torch.no_grad():
        assert (plain - source.model(torch.tensor([texts[0]])).logits[0, -1].log_softmax(-1)).abs().max() < 1e-4
