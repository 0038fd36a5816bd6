"""Settings are checked before anything is loaded, and the layout keeps compiled graphs apart."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.server.engine import UnsupportedEngine, check_version
from whipstaff.server.engine.frontend import launch
from whipstaff.server.engine.frontend.launch import Setup, configure


def config_of(model: str, **flags: Any) -> Any:
    args = AsyncEngineArgs(model=model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, **flags)
    return args.create_engine_config()


NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("llama", Path(tmp_path_factory.mktemp("base")))


def test_the_layout_enters_the_compile_cache_key(model: str, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path, seed=1)
    plain, steered, small, with_aux = (config_of(model) for _ in range(4))
    configure(steered)
    configure(small, Setup(num_slots=3))
    configure(with_aux, Setup([("other", other)]))
    assert len({config.compute_hash() for config in (plain, steered, small, with_aux)}) == 4


@pytest.mark.parametrize("is_async", [True, False])
def test_the_scheduler_follows_the_engines_choice(model: str, is_async: bool) -> None:
    config = config_of(model)
    config.scheduler_config.async_scheduling = is_async
    configure(config)
    name = config.scheduler_config.get_scheduler_cls().__name__
    assert name == ("AsyncSteeredScheduler" if is_async else "SteeredScheduler")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
            "the method ngram_gpu .*; ngram is",
        ),
        (
            {
                "speculative_config": NGRAM
                | {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5, 0.2]}
            },
            "synthetic",
        ),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "--pipeline-parallel-size"),
    ],
)
def test_settings_that_would_lose_edits_are_refused(model: str, flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedEngine, match=reason):
        configure(config_of(model, **flags))


def test_an_auxiliary_model_with_too_few_tokens_is_refused(model: str, tmp_path: Path) -> None:
    small = tiny.save("llama", tmp_path, vocab_size=tiny.VOCABULARY - 1)
    with pytest.raises(UnsupportedEngine, match=f"{tiny.VOCABULARY - 1} entries, the base's {tiny.VOCABULARY}"):
        configure(config_of(model), Setup([("small", small)]))


def test_early_layers_are_kept_where_that_takes_little_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configure(config_of(model)).early_layers == (0, 1, 2)
    assert configure(config_of(model), Setup(early_layers=[2, 1])).early_layers == (1, 2)
    assert configure(config_of(model), Setup(early_layers=[])).early_layers == ()
    wide = config_of(model, max_num_batched_tokens=1 << 16)
    assert launch.EARLY_BUDGET < (1 << 16) * 96 * 4 * 11
    monkeypatch.setattr(launch, "EARLY_BUDGET", (1 << 16) * 96 * 4 * 3 - 1)
    assert configure(wide).early_layers == ()
    long = config_of(model, max_num_batched_tokens=1 << 16)
    assert configure(long, Setup(early_layers="all")).early_layers == (0, 1, 2)


def test_the_embeddings_are_a_site_only_where_they_may_be_kept(model: str) -> None:
    assert "resid_pre" in configure(config_of(model)).sites
    assert "resid_pre" not in configure(config_of(model), Setup(early_layers=[1])).sites


def test_a_layer_that_is_not_there_cannot_be_kept(model: str) -> None:
    with pytest.raises(UnsupportedEngine, match="--early-layers 3: the served model has 3 blocks"):
        configure(config_of(model), Setup(early_layers=[0, 3]))


def test_drafts_are_in_the_layout_and_not_on_model_runner_v2_nor_beside_lookahead(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configure(config_of(model)).num_drafts == 0
    assert configure(config_of(model, speculative_config=NGRAM)).num_drafts == 2
    with pytest.raises(UnsupportedEngine, match="--lookahead is not supported together with --speculative-config"):
        configure(config_of(model, speculative_config=NGRAM), Setup(lookahead=True))
    config = config_of(model, speculative_config=NGRAM)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UnsupportedEngine, match=r"on Model Runner V2 .*; VLLM_USE_V2_MODEL_RUNNER=0 chooses V1"):
        configure(config)


def test_lookahead_is_in_the_layout(model: str) -> None:
    assert configure(config_of(model), Setup(lookahead=True)).looks_ahead
    assert not configure(config_of(model)).looks_ahead


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_lookahead_is_refused_where_it_would_be_wrong(model: str, flags: dict[str, Any], reason: str) -> None:
    configure(config_of(model, **flags))
    with pytest.raises(UnsupportedEngine, match=f"--lookahead is not supported together with {reason}"):
        configure(config_of(model, **flags), Setup(lookahead=True))


def test_what_methods_read_is_in_the_layout(model: str) -> None:
    layout = configure(config_of(model), Setup(attention_rows=True, hidden_states=3))
    assert layout.reads_attention and layout.num_hidden_states == 3
    assert configure(config_of(model), Setup(attention_layers=[2, 0])).attention_layers == (0, 2)
    with pytest.raises(UnsupportedEngine, match="--attention-layers 3: the served model has blocks 0 to 2"):
        configure(config_of(model), Setup(attention_layers=[1, 3]))
    plain = configure(config_of(model))
    assert plain.attention_layers == () and not plain.reads_attention and plain.num_hidden_states == 0


@pytest.mark.parametrize("flag", ["--attention-rows", "--attention-layers", "--hidden-states"])
def test_what_cannot_be_read_is_refused(model: str, flag: str) -> None:
    asked: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): "all" if flag.endswith("layers") else 1}
    with pytest.raises(UnsupportedEngine, match=f"{flag} is not supported together with --kv-sharing-fast-prefill"):
        configure(config_of(model, kv_sharing_fast_prefill=True), Setup(**asked))


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.32.0", "0.3.2"])
def test_other_versions_of_vllm_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedEngine, match=rf"vLLM {version} is installed"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.32.4", "0.33.0"])
def test_supported_versions_of_vllm_are_taken(version: str) -> None:
    check_version(version)
