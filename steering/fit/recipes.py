"""The table of recipes: which method's files are made of what data, and how."""

from collections.abc import Callable
from typing import Any

from whipstaff.steering.fit import autoencoder, contrast, experts, icl, learned, learned_heads, refusal, truth
from whipstaff.steering.fit.data import Item
from whipstaff.steering.fit.job import Fitted, Job, Recipe
from whipstaff.steering.fit.render import Rendered

_TRUTH_FORM = "Q: {prompt} A: {response}"


def _contrast(method: str, about: str, fit: Callable[[Job], Fitted], *takes: str, **said: Any) -> Recipe:
    kinds = said.pop("kinds", contrast.KINDS)
    return Recipe(method, about, kinds, fit, said.pop("example", contrast.example), takes=frozenset(takes), **said)


def _last_prompt(job: Job, item: Item) -> list[tuple[Rendered, str]]:
    return [(shown.rendered, "last-prompt") for shown in contrast.texts_of(job, item)]


_DIRECTION = ("read", "aggregate", "unit")
_OF_LAYERS = frozenset({"layers", "scale"})
RECIPES: dict[str, Recipe] = {
    recipe.method: recipe
    for recipe in (
        _contrast("caa", "mean difference of pairs, at the layer where they differ most", contrast.caa, *_DIRECTION),
        _contrast("shift_vector", "mean difference over whole answers", contrast.shift, *_DIRECTION),
        _contrast("repe", "first component of shuffled differences of pairs", contrast.repe, *_DIRECTION),
        _contrast(
            "control_vector", "first component of pairs about their midpoints", contrast.control_vector, *_DIRECTION
        ),
        _contrast("actadd", "states of one pair, token by token", contrast.actadd, kinds=("pairs",)),
        _contrast("angular", "the plane of a behaviour", contrast.angular, "read"),
        _contrast("probe", "a condition for `when`", contrast.probe, "aggregate", example=_last_prompt),
        _contrast("add_direction", "one direction that brings a behaviour", refusal.add_direction, "marks"),
        _contrast(
            "directional_ablation", "one direction that carries a behaviour", refusal.directional_ablation, "marks"
        ),
        _contrast(
            "mote", "experts of one class of prompts, switched off", experts.mote, "experts", example=_last_prompt
        ),
        _contrast(
            "sae",
            "features of one layer, first those that tell the classes apart",
            autoencoder.sae,
            *("features", "tokens", "steps", "lr", "l1"),
        ),
        _contrast(
            "lf_steering",
            "the same features, those that tell the classes apart raised where they are active",
            autoencoder.lf_steering,
            *("features", "num_features", "tokens", "steps", "lr", "l1"),
        ),
        Recipe(
            "iti",
            "heads that tell right answers from wrong ones",
            ("questions",),
            truth.iti,
            truth.example,
            takes=frozenset({"num_heads", "folds", "read"}),
            template=_TRUTH_FORM,
        ),
        Recipe(
            "function_vector",
            "what the heads that carry a task write",
            ("demos",),
            icl.function_vector,
            icl.example,
            takes=frozenset({"num_heads", "shots", "trials", "corrupted"}),
            template=icl.FORM,
            needs="weights",
        ),
        Recipe(
            "task_vector",
            "the state that demonstrations leave",
            ("demos",),
            icl.task_vector,
            icl.example,
            takes=frozenset({"shots", "trials"}),
            template=icl.FORM,
            needs="answers",
        ),
        Recipe(
            "head_scale",
            "heads that a task needs, replaced by their means",
            ("demos",),
            icl.head_scale,
            icl.example,
            takes=frozenset({"num_heads", "shots", "trials"}),
            template=icl.FORM,
            needs="answers",
        ),
        Recipe(
            "site",
            "heads moved towards what demonstrations make of them, by gradients",
            ("demos",),
            learned.site,
            icl.example,
            takes=frozenset({"shots", "trials", "steps", "lr"}),
            template=icl.FORM,
            needs="weights",
        ),
        Recipe(
            "lofit",
            "heads chosen, then what is added to them, by gradients",
            learned.KINDS,
            learned.lofit,
            learned.example,
            takes=frozenset({"num_heads", "epochs", "steps", "lr", "l1"}),
            needs="weights",
        ),
        *(
            Recipe(
                method,
                "a low-rank edit of some prompt tokens, by gradients",
                learned.KINDS,
                learned.reft(method),
                learned.example,
                takes=frozenset({"rank", "positions", "epochs", "steps", "lr"}),
                needs="weights",
            )
            for method in learned.REFT
        ),
        Recipe(
            "soft_prompt",
            "rows before a prompt, by gradients",
            learned.KINDS,
            learned.soft_prompt,
            learned.example,
            takes=frozenset({"rows", "text", "epochs", "steps", "lr"}),
            without=_OF_LAYERS,
            needs="weights",
        ),
        Recipe(
            "prefix_classifier",
            "whether an answer is as it should be up to its last token, for `kwd` and `kcts`",
            ("grounded",),
            learned_heads.prefix_classifier,
            learned_heads.grounded_example,
            without=_OF_LAYERS,
            needs="weights",
        ),
        Recipe(
            "token_classifier",
            "which next token is as it should be, for `kwd`",
            ("grounded",),
            learned_heads.token_classifier,
            learned_heads.grounded_example,
            takes=frozenset({"steps", "lr"}),
            without=_OF_LAYERS,
            needs="weights",
        ),
        Recipe(
            "defer_head",
            "where an assistant should say the next token, for `co_llm`",
            ("responses", "demos"),
            learned_heads.defer_head,
            learned.example,
            takes=frozenset({"assistant", "steps", "lr"}),
            without=_OF_LAYERS,
            needs="weights",
        ),
    )
}
