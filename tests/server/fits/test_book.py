"""Jobs on the disk: several processes see one book, and a job whose process died has failed and left nothing."""

from pathlib import Path

import pytest

from whipstaff.server.errors import Conflict, NotFound, RateLimited
from whipstaff.server.fits.book import LOST, MOST_KEPT, MOST_UNFINISHED, Book, Failure

ROWS = {"train": 7, "dev": 2, "test": 1}


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "fits")


def test_a_job_is_seen_by_others_until_it_is_forgotten(book: Book, tmp_path: Path) -> None:
    other = Book(tmp_path / "fits")
    record, lock = book.add("caa", "mine", ROWS, ["few"])
    assert other.all() == [record] and record.state == "queued"
    book.write(record.but(state="running"))
    assert other.get(record.id).state == "running"
    assert other.cancel(record.id).state == "cancelling" and book.is_cancelled(record.id)
    book.close(record.but(state="cancelled"), lock)
    ended = other.get(record.id)
    assert ended.state == "cancelled" and ended.ended is not None and not book.is_cancelled(record.id)
    assert other.cancel(record.id) == ended
    other.remove(record.id)
    with pytest.raises(NotFound):
        book.get(record.id)


def test_a_job_whose_process_died_has_failed_and_leaves_nothing(book: Book, tmp_path: Path) -> None:
    record, lock = book.add("caa", "mine", ROWS, [])
    book.write(record.but(state="running"))
    book.rows(record.id).mkdir()
    book.cancel(record.id)
    lock.close()  # as the end of a process does
    found = Book(tmp_path / "fits").get(record.id)
    assert (found.state, found.error) == ("failed", Failure(message=LOST))
    assert [path.name for path in (tmp_path / "fits").iterdir() if path.name != "lock"] == [f"{record.id}.json"]


def test_an_end_that_cannot_be_written_lets_go_of_the_job(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    record, lock = book.add("caa", "mine", ROWS, [])
    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr(Book, "write", lambda self, record: (_ for _ in ()).throw(OSError("full")))
        book.close(record.but(state="done"), lock)
    found = book.get(record.id)
    assert (found.state, found.error) == ("failed", Failure(message=LOST))
    book.add("caa", "mine", ROWS, [])[1].close()


def test_so_many_are_unfinished_and_of_one_name_there_is_one(book: Book) -> None:
    locks = [book.add("caa", f"mine{index}", ROWS, [])[1] for index in range(MOST_UNFINISHED)]
    with pytest.raises(Conflict):
        book.add("caa", "mine0", ROWS, [])
    with pytest.raises(RateLimited):
        book.add("caa", "more", ROWS, [])
    locks[0].close()
    locks.append(book.add("caa", "mine0", ROWS, [])[1])
    for lock in locks[1:]:
        lock.close()


def test_of_those_that_ended_the_oldest_are_forgotten(book: Book) -> None:
    for index in range(MOST_KEPT + 2):
        record, lock = book.add("caa", f"mine{index}", ROWS, [])
        book.close(record.but(state="done"), lock)
    last, lock = book.add("caa", "last", ROWS, [])
    assert len(book.all()) == MOST_KEPT + 1 and last in book.all()
    lock.close()


@pytest.mark.parametrize("number", ["fit-0", "../manifest", "lock", "fit-0123456789ab"])
def test_nothing_else_is_read(book: Book, number: str) -> None:
    with pytest.raises(NotFound):
        book.get(number)
