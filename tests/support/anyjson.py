"""JSON that a client might put into the extra fields: anything at all, and what is nearly right."""

from hypothesis import strategies as st

WORDS = st.text(st.characters(), max_size=8)  # surrogates too: JSON can escape what UTF-8 cannot hold
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    *("vector", "method", "layers", "where", "when", "schedule", "normalize", "renorm", "scale", "strength"),
    *("prompt", "generation", "exclude", "tokens", "messages", "role", "index", "whole"),
    *("probe", "above", "below", "release", "decide", "layer"),
    *("shape", "from", "to", "half_life", "low", "high"),
    *("features", "feature", "set", "add", "only_if_active", "activation", "k", "value", "angle", "adaptive"),
    *("operator", "location", "row", "insert", "mode", "experts", "off", "on", "heads", "spans", "alpha", "edits"),
    *("expert", "antiexpert"),
)
KNOWN = st.sampled_from(FIELDS)
NAMES = (
    *("push", "calm", "late", "iti", "lofit", "ablate", "knob", "turn", "sae", "rows", "angular", "plane", "probe"),
    *("probes", "loreft", "soft", "prefix", "router", "misfit", "wide", "absent"),
)
NEARLY_RIGHT = st.recursive(
    st.sampled_from([*NAMES, "all", "none", "proxy_tuning", "mote", "pasta", "expert", "anti", 2, [[0, 2]]]) | JSON,
    lambda inner: st.dictionaries(KNOWN, inner, max_size=6) | st.lists(inner, max_size=3),
    max_leaves=12,
)
SCALES = st.sampled_from([0, 1, -2.5, 1e4, 1e5, float("nan"), "3", None, 10**30])
TOKENS = st.sampled_from([[5], [5, 6], [-1], [], ["\n"], ["no such token"], ["\ud800"]])
REGIONS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["all", "none", [[-2, None]], [[9, 8]], [[0, 9**30]]]),
        "generation": st.sampled_from(["all", [[0, 1]], [[1, None]]]),
        "tokens": TOKENS,
        "messages": st.sampled_from([[{}], [{"role": "user"}], [{"index": -1, "whole": True}], {"role": 3}]),
    },
)
CLAUSES = st.sampled_from(["all", "prompt", "generation", "last_prompt", "each_last"]) | st.builds(
    lambda region, hole: region if hole is None else region | {"exclude": hole}, REGIONS, st.none() | REGIONS
)
NUMBERS = st.sampled_from([0, 0.5, -1, 1e300, -1e-300, float("inf"), None, "1"])
WHENS = st.fixed_dictionaries(
    {"probe": st.sampled_from(["probe", "probes", "push", "misfit", "absent", None])},
    optional={
        "above": NUMBERS,
        "below": NUMBERS,
        "release": NUMBERS,
        "decide": st.sampled_from(["prompt", "step", "never"]),
        "layer": st.integers(-1, 4),
    },
)
SCHEDULES = st.fixed_dictionaries(
    {"shape": st.sampled_from(["constant", "linear", "cosine", "exponential", "entropy", "square"])},
    optional={name: NUMBERS | st.just(7) for name in ("from", "to", "tokens", "half_life", "low", "high")},
)
OWN = st.fixed_dictionaries(
    {},
    optional={
        "scale": SCALES,
        "strength": SCALES,
        "features": st.lists(
            st.fixed_dictionaries(
                {"feature": st.integers(-1, 6)},
                optional={"set": NUMBERS, "scale": NUMBERS, "add": NUMBERS, "only_if_active": st.booleans()},
            ),
            max_size=3,
        ),
        "activation": st.sampled_from(["linear", "relu", "jumprelu", "topk", "tanh"]),
        "normalize_activations": st.sampled_from(["none", "constant_norm_rescale", "layer_norm"]),
        "k": st.integers(0, 9),
        "value": NUMBERS | st.lists(NUMBERS, max_size=3),
        "angle": st.sampled_from([0, 90, -360, 1e9]),
        "location": st.sampled_from(["front", "back", -1, 2, -40]),
        "row": st.integers(-1, 3),
        "insert": st.sampled_from([0, -1, 99, {"message": {"role": "user"}}, "end"]),
        "tokens": st.integers(0, 9),
        "mode": st.sampled_from(["pre", "zero", "zero_renorm", "force"]),
        "experts": st.dictionaries(
            st.sampled_from(["0", "1", "2", "x"]),
            st.dictionaries(st.sampled_from(["off", "on"]), st.lists(st.integers(-1, 4), max_size=4), max_size=2),
            max_size=2,
        ),
        "heads": st.dictionaries(st.sampled_from("019"), st.lists(st.integers(-1, 4), max_size=2), max_size=2),
        "spans": st.lists(st.tuples(st.integers(-3, 3), st.none() | st.integers(-3, 3)), max_size=2),
        "alpha": NUMBERS,
        "edits": st.lists(
            st.fixed_dictionaries(
                {
                    **{name: st.integers(-1, 4) for name in ("layer", "head")},
                    "keys": st.lists(st.integers(-9, 9), max_size=2),
                }
            ),
            max_size=2,
        ),
    },
)  # fmt: skip
STEERING = st.builds(
    lambda named, own, keep, common: {**named, **{name: own[name] for name in own if name in keep}, **common},
    st.fixed_dictionaries({"vector": st.sampled_from(NAMES)})
    | st.fixed_dictionaries({"method": st.sampled_from(["mote", "pasta", "attention_override", "caa", "magic"])}),
    OWN,
    st.sets(st.sampled_from(FIELDS), max_size=3) | st.just(FIELDS),
    st.fixed_dictionaries(
        {},
        optional={
            "where": CLAUSES | JSON,
            "when": WHENS | JSON,
            "schedule": SCHEDULES | JSON,
            "layers": st.lists(st.integers(-1, 4), max_size=3) | JSON,
            "normalize": st.booleans() | JSON,
            "renorm": st.booleans(),
        },
    ),
)
PROXY = st.fixed_dictionaries(
    {"method": st.just("proxy_tuning"), "expert": st.sampled_from(["expert", "short", "absent"])},
    optional={"antiexpert": st.sampled_from(["anti", "expert"]), "alpha": SCALES},
)
CONTENTS = st.sampled_from(["", "a", [5], [], [-1], [10**9], [{"role": "user", "content": "a"}], [{"role": 3}], None])
WINDOWS = {"from": NUMBERS | st.just(2), "until": st.integers(-1, 4), "fade": st.sampled_from(["linear", "square"])}
STREAM = st.fixed_dictionaries(
    {"weight": NUMBERS},
    optional={
        "model": st.sampled_from(["expert", "short", "absent"]),
        "prompt": CONTENTS,
        "adapter": st.just("absent"),
        "steering": st.lists(STEERING, max_size=2) | JSON,
        "temperature": NUMBERS,
    },
)
COUPLED = st.fixed_dictionaries(
    {
        "method": st.sampled_from(
            ["cfg", "cad", "instructive", "prompt_ensemble", "adapter_ensemble", "streams", "forced"]
        )
    },
    optional={
        "guidance_scale": SCALES,
        "negative_prompt": CONTENTS,
        "context": CONTENTS,
        "prompt_without": CONTENTS,
        "noisy_prompt": CONTENTS,
        "prompts": st.lists(CONTENTS, max_size=3),
        "weights": st.lists(NUMBERS, max_size=3) | st.dictionaries(st.just("absent"), NUMBERS),
        "streams": st.lists(STREAM, max_size=3),
        "space": st.sampled_from(["log", "probability", "logits"]),
        "ids": st.lists(st.integers(-1, 9), max_size=3),
        "centres": st.sampled_from(["centres", "elsewhere", "absent", None]),
        "feature": st.lists(NUMBERS, min_size=3, max_size=3) | JSON,
        "top_m": st.integers(-1, 4),
        **WINDOWS,
    },
)
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "steering": st.lists(STEERING, max_size=3) | STEERING | NEARLY_RIGHT,
        "decoding": st.lists(PROXY | COUPLED, max_size=2) | NEARLY_RIGHT,
        "guidance_scale": SCALES,
        "negative_prompt": CONTENTS | JSON,
        "on_unavailable": st.sampled_from(["ignore", "error"]) | JSON,
        "on_unknown": st.sampled_from(["warn", "error"]) | JSON,
        "dynatemp_low": SCALES,
        "dynatemp_high": SCALES,
        "dynamic_temperature": st.booleans() | JSON,
        "dry_sequence_breakers": JSON,
        "dry_multiplier": SCALES,
        "repeat_penalty": SCALES | JSON,
        "nobody_knows": JSON,
    },
)
