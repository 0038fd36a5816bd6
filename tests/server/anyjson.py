"""JSON that a client might put into the extra fields: anything at all, and what is nearly right."""

from hypothesis import strategies as st

WORDS = st.text(st.characters(), max_size=8)  # surrogates too: JSON can escape what UTF-8 cannot hold
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
KNOWN = st.sampled_from(
    ["vector", "scale", "strength", "layers", "where", "prompt", "generation", "exclude", "method", "expert", "alpha"]
)
NEARLY_RIGHT = st.recursive(
    st.sampled_from(["push", "calm", "all", "none", "proxy_tuning", "expert", "anti", 2, [[0, 2]]]) | JSON,
    lambda inner: st.dictionaries(KNOWN, inner, max_size=6) | st.lists(inner, max_size=3),
    max_leaves=12,
)
SCALES = st.sampled_from([0, 1, -2.5, 1e4, 1e5, float("nan"), "3", None, 10**30])
CLAUSES = st.sampled_from(
    ["all", "last_prompt", {"prompt": [[-2, None]]}, {"prompt": [[9, 8]]}, {"generation": [[0, 9**30]]}]
)
STEERING = st.fixed_dictionaries(
    {"vector": st.sampled_from(["push", "iti", "lofit", "misfit", "calm", "late", "wide"])},
    optional={"scale": SCALES, "where": CLAUSES | JSON, "layers": st.lists(st.integers(-1, 4), max_size=3) | JSON},
)
PROXY = st.fixed_dictionaries(
    {"method": st.just("proxy_tuning"), "expert": st.sampled_from(["expert", "short", "absent"])},
    optional={"antiexpert": st.sampled_from(["anti", "expert"]), "alpha": SCALES},
)
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "steering": st.lists(STEERING, max_size=3) | NEARLY_RIGHT,
        "decoding": st.lists(PROXY, max_size=2) | NEARLY_RIGHT,
        "on_unavailable": st.sampled_from(["ignore", "error"]) | JSON,
    },
)
