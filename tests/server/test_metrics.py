"""What a worker counts becomes series of /metrics."""

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from whipstaff.server import metrics

OF_SEARCHES = {
    "searches_running": "whipstaff_searches_running",
    "search_sequences_living": "whipstaff_search_sequences_living",
    "search_forks": "whipstaff_search_forks_total",
    "search_rollbacks": "whipstaff_search_rollbacks_total",
    "search_tried": "whipstaff_search_tried_tokens_total",
    "search_moved_seats": "whipstaff_search_moved_sequences_total",
    "search_copied_blocks": "whipstaff_search_copied_blocks_total",
    "search_recomputed_tokens": "whipstaff_search_recomputed_tokens_total",
    "search_seconds": "whipstaff_search_decision_seconds_total",
}
OTHERS = (
    *("slots_in_use", "requests_waiting_for_slots", "vectors_held", "table_uploads", "companions_running"),
    *("group_steps_held", "groups_half_scheduled"),
)


def test_what_searches_did_is_shown() -> None:
    counters = {name: index + 1.0 for index, name in enumerate((*OF_SEARCHES, *OTHERS))}
    metrics.note_worker(counters)
    families = text_string_to_metric_families(generate_latest().decode())
    shown = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    assert {name: shown[series] for name, series in OF_SEARCHES.items()} == {
        name: counters[name] for name in OF_SEARCHES
    }
