"""The conformance kits catch what they promise to catch, by the test that names the mistake."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from lmcache_core.testing import loop, transfer_processes

with suppress(ImportError):
    # What is compiled can be imported once in a process, and pytester forgets its runs' imports.
    import lmcache_kernels.plugin  # noqa: F401

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
"""What leaks is found by a kit, and what it leaked in some later test."""

BACKENDS: dict[str, set[str]] = {
    "Correct": set(),
    "KeepsReference": {"test_store_keeps_a_copy", "test_buffers_are_released"},
    "RemembersBuffers": {"test_buffers_are_released"},
    "RaisesOnMiss": {"test_a_missing_chunk_is_a_miss_not_an_error"},
    "StopsAtTheFirstMiss": {"test_answers_are_positional"},
    "AnswersHitsOnly": {"test_answers_are_positional"},
    "Truncates": {"test_a_longer_value_is_a_miss"},
    "AnswersCapacity": {"test_a_shorter_value_is_reported_with_its_length"},
    "WritesPastTheBuffer": {"test_nothing_is_written_outside_the_buffer"},
    "ScramblesSource": {"test_a_source_is_not_changed"},
    "DropsGroupIndex": {"test_keys_of_later_layer_groups"},
    "Sleeps": {"test_the_event_loop_is_never_blocked"},
    "ReadsFilesOnTheLoop": {"test_the_event_loop_is_never_blocked"},
    "WaitsForAThread": {"test_the_event_loop_is_never_blocked"},
    "IgnoresNamespace": {"test_namespaces_do_not_mix"},
    "LeaksThread": {"test_close_twice_and_leave_no_thread"},
    "ClosesOnlyOnce": {"test_close_twice_and_leave_no_thread"},
    "ClaimsShared": {"test_what_is_shared_is_seen_by_others"},
    "ClaimsPersistent": {"test_what_is_persistent_outlives_the_backend"},
    "PublishesBeforeComplete": {"test_readers_never_see_a_part"},
    "MixesBatches": {"test_concurrent_batches"},
    "DeletesWithoutCounting": {"test_delete"},
    "DeletesOnlyTheAnswer": {"test_delete"},
    "CountsAllHits": {"test_count_leading_hits"},
    "ClearsEverybody": {"test_clear"},
    "WritesInPlace": {"test_readers_never_see_a_part"},
    "CancelsItsWaitingOnly": {"test_a_cancelled_call_ends_and_lets_go"},
    "CountsEveryStore": {"test_usage"},
    "AnswersSixtyFour": {"test_batches_of_any_size"},
    "AnswersNewOnly": {"test_each_of_a_batch_is_answered"},
    "ClosesForAll": {"test_two_backends_at_once"},
    "LeaksSocket": {"test_close_leaves_no_socket"},
    "ReconnectsAfterClose": {"test_a_call_after_close_ends"},
    "RaisesWhenFull": {"test_a_full_store_admits_or_makes_room"},
    "OpensAnything": {"test_an_open_that_fails_says_so"},
    "RaisesRawErrors": {"test_an_open_that_fails_says_so"},
}
"""For each mistake the tests whose sentence it breaks; others may fail as a consequence."""

SERDES: dict[str, set[str]] = {
    "Correct": set(),
    "CorrectlyLossy": set(),
    "CanonicalNaN": {"test_every_bit_pattern"},
    "PromisesTooLittle": {"test_max_encoded_bytes_is_enough"},
    "ForgivesTruncation": {"test_truncated_input_is_refused"},
    "IgnoresTheRest": {"test_longer_input_is_refused"},
    "SharesScratch": {"test_threads_share_one_instance"},
    "RemembersInItself": {"test_any_instance_decodes"},
    "RaisesStructError": {"test_truncated_input_is_refused"},
    "EncodesInPlace": {"test_arguments_are_not_changed"},
    "KeepsBuffer": {"test_buffers_are_released"},
    "WritesBehind": {"test_decode_gives_back_what_was_encoded"},
    "WrongWireId": {"test_wire_id"},
    "ReservedWireId": {"test_wire_id"},
    "SharesACompressor": {"test_threads_share_one_instance_at_the_same_time"},
    "ClaimsInPlace": {"test_in_place_means_the_same_bytes"},
    "WorseThanPromised": {"test_decode_gives_back_what_was_encoded"},
}

CONNECTORS: dict[str, set[str]] = {
    "Correct": set(),
    "TakesNoneForAll": {"test_no_layers_are_nothing"},
    "SwapsPlanes": {"test_gather_makes_the_canonical_chunk"},
    "SortsBlocks": {"test_order_of_blocks"},
    "IgnoresChunkOffset": {"test_spans_that_begin_and_end_anywhere"},
    "WholeBlocksOnly": {"test_spans_that_begin_and_end_anywhere"},
    "WipesTheChunk": {"test_spans_that_begin_and_end_anywhere"},
    "ScattersWholeBlocks": {"test_scatter_touches_only_its_span"},
    "FirstSpanOnly": {"test_several_spans_in_one_call"},
    "IgnoresLayers": {"test_other_layers_are_left_alone"},
    "GoesThroughFloats": {"test_every_bit_pattern_survives"},
    "ClampsBlocks": {"test_a_block_that_is_not_there_raises"},
    "NegativeFromTheEnd": {"test_a_block_that_is_not_there_raises"},
    "SharesState": {"test_any_thread_may_call"},
    "ScramblesSources": {"test_scatter_does_not_change_its_sources"},
    "KeepsBuffer": {"test_buffers_are_released"},
    "TrustsTheBuffer": {"test_a_chunk_of_another_size_raises"},
    "SumsOnlyTheSpan": {"test_gather_with_checksums"},
    "BelievesAnything": {"test_scatter_with_checksums"},
    "GivesUpOnAll": {"test_scatter_with_checksums"},
    "MisstatesItsBlocks": {"test_paging_is_true"},
    "TrustsSpans": {"test_a_span_that_makes_no_sense_raises"},
    "StartsBeforeItsBlocks": {"test_a_span_that_makes_no_sense_raises"},
    "RepeatsTheLastBlock": {"test_a_span_that_makes_no_sense_raises"},
    "ChecksAsItGoes": {"test_a_span_that_makes_no_sense_raises"},
    "FillsACopy": {"test_a_read_only_chunk_is_not_filled"},
}

CHANNELS: dict[str, set[str]] = {
    "Correct": set(),
    "TakesOneOffsetForBoth": {"test_read_fills_the_ranges_and_nothing_else"},
    "SwapsOffsetsOfWrites": {"test_write_fills_the_ranges_and_nothing_else"},
    "MovesTheFirstHundred": {"test_many_small_ranges"},
    "RoundsUp": {"test_write_fills_the_ranges_and_nothing_else"},
    "MovesBeforeItChecks": {"test_a_range_outside_is_refused_and_nothing_moves"},
    "ClampsRanges": {"test_a_range_outside_is_refused_and_nothing_moves"},
    "OpenForWriting": {"test_a_region_that_is_not_writable"},
    "NoteFirst": {"test_a_note_comes_after_its_bytes"},
    "NoteTwice": {"test_a_note_comes_after_its_bytes"},
    "CutsNotes": {"test_notes_are_whole_in_order_and_say_who_sent_them"},
    "NotesFromItsThread": {"test_notes_come_on_the_event_loop"},
    "AnonymousNotes": {"test_notes_are_whole_in_order_and_say_who_sent_them"},
    "OneNameForAll": {"test_descriptors_name_each_channel_differently"},
    "BelievesDescriptors": {"test_a_damaged_descriptor_is_refused"},
    "AsksForNoSecret": {"test_a_forged_descriptor_leads_nowhere"},
    "StaysOpen": {
        "test_a_channel_that_was_closed_is_unavailable",
        "test_after_close_nobody_touches_the_region",
        "test_close_leaves_no_thread_and_no_view",
    },
    "SwallowsDeath": {"test_a_process_that_was_killed_is_unavailable"},
    "WaitsForTheDead": {"test_a_process_that_was_killed_is_unavailable"},
    "OneThreadForAll": {"test_a_process_that_hangs_costs_others_nothing"},
    "EndsBeforeItsThread": {"test_a_cancelled_call_to_a_process_leaves_memory_alone"},
    "Sleeps": {"test_the_event_loop_is_never_blocked"},
    "MixesCalls": {"test_concurrent_calls"},
    "LeaksThread": {"test_close_leaves_no_thread_and_no_view"},
    "KeepsAView": {"test_close_leaves_no_thread_and_no_view"},
    "ClosesOnlyOnce": {"test_close_leaves_no_thread_and_no_view"},
    "ForgetsToDisconnect": {"test_disconnect"},
}

STORAGE_MODULE = """
import broken_backends, pytest
from lmcache_core.testing.storage import StorageBackendTests

class TestIt(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path):
        return lambda: broken_backends.make(broken_backends.{name}, tmp_path)
{more}
"""

SMALL = """
    @pytest.fixture
    def make_small(self, make_backend):
        return make_backend
"""
UNREACHABLE = """
    @pytest.fixture
    def make_unreachable(self, make_backend):
        return make_backend
"""
MORE = {"RaisesWhenFull": SMALL, "OpensAnything": UNREACHABLE, "RaisesRawErrors": UNREACHABLE}

SERDE_MODULE = """
import broken_serdes, pytest
from lmcache_core.testing.serde import SerdeTests

class TestIt(SerdeTests):
    max_error = broken_serdes.{name}.max_error

    @pytest.fixture
    def make_serde(self):
        return broken_serdes.{name}
"""

CONNECTOR_MODULE = """
import broken_connectors, pytest
from lmcache_core.testing.connector import EngineConnectorTests

class TestIt(EngineConnectorTests):
    @pytest.fixture
    def engine(self):
        return broken_connectors.ToyEngine(broken_connectors.{name})
"""

CHANNEL_MODULE = """
from lmcache_core.testing.transfer import TransferChannelTests

class TestIt(TransferChannelTests):
    channel = "broken_channels:described_{name}"
    process_bytes = 4 << 20
"""


def failures(pytester: pytest.Pytester, code: str, *options: str, at_least: int = 10) -> set[str]:
    """Run ``code`` as a test module; answer the names of the tests that fail."""
    pytester.syspathinsert(Path(__file__).parent)
    pytester.makepyfile(code)
    # Native tracebacks: pytest's own parse the source, which in some Pythons (3.11.7 is one) raises
    # SystemError once in a while in a process with threads: python/cpython issue 106905.
    recorded = pytester.inline_run("-q", "--tb=native", "-p", "no:cacheprovider", *options)
    reports = recorded.getreports("pytest_runtest_logreport")
    assert len({report.nodeid for report in reports}) >= at_least, "the kit didn't run"
    return {
        report.nodeid.rpartition("::")[2].partition("[")[0] for report in reports if report.failed
    }


def check(actual: set[str], named: set[str]) -> None:
    assert named <= actual
    assert named or not actual, "what has no mistake must pass"


@pytest.mark.parametrize("name", BACKENDS)
def test_storage_kit(name: str, pytester: pytest.Pytester) -> None:
    code = STORAGE_MODULE.format(name=name, more=MORE.get(name, ""))
    check(failures(pytester, code), BACKENDS[name])


def test_a_backend_that_hangs_fails_once(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is skipped: each would take a minute."""
    monkeypatch.setattr(loop, "DEADLINE_S", 0.5)
    failed = failures(pytester, STORAGE_MODULE.format(name="Hangs", more=""))
    assert failed == {"test_load_returns_what_was_stored"}


@pytest.mark.parametrize("name", SERDES)
def test_serde_kit(name: str, pytester: pytest.Pytester) -> None:
    check(failures(pytester, SERDE_MODULE.format(name=name)), SERDES[name])


@pytest.mark.parametrize("name", CONNECTORS)
def test_connector_kit(name: str, pytester: pytest.Pytester) -> None:
    check(failures(pytester, CONNECTOR_MODULE.format(name=name)), CONNECTORS[name])


@pytest.mark.parametrize("name", CHANNELS)
def test_transfer_kit(
    name: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = CHANNELS[name]
    code = CHANNEL_MODULE.format(name=name)
    if not named:
        check(failures(pytester, code), named)
        return
    # Some mistakes are hangs, and every test takes its time: only those that are to catch it.
    monkeypatch.setattr(loop, "DEADLINE_S", 8.0)
    monkeypatch.setattr(transfer_processes, "HANG_S", 3.0)
    check(failures(pytester, code, "-k", " or ".join(named), at_least=1), named)
