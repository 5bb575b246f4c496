"""Questions about excerpts of books: how the text is found, what is said when it is not, which replies are right."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from laprox.eval import books
from laprox.eval.books import Document, Question, checksum, load, normalised
from laprox.eval.metrics import contains_any

BOOK = (
    "A MADE-UP BOOK\r\n\r\nby Nobody\r\n\r\n\r\nThe ship left on a _Friday_\r\nwith nine men.\r\n\r\n"
    "It rained. {12} The\r\n  captain slept.\r\n   \r\nThey saw land at last.\r\n\r\nThe end.\r\n"
)
TEXT = "The ship left on a Friday with nine men.\n\nIt rained. The captain slept.\n\nThey saw land at last."
DOCUMENT = Document(
    book=7,
    title="A Made-up Book",
    author="Nobody",
    first="The ship left",
    last="land at last.",
    sha256=checksum(TEXT),
    questions=(Question("How many men sailed?", ("nine", "9")), Question("Who slept?", ("captain",))),
)
SHIPPED = Path(__file__).parents[1] / "scripts" / "questions" / "books.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pg7.txt").write_bytes(BOOK.encode())
    return tmp_path


def as_json(document):
    fields = ("book", "title", "author", "first", "last", "sha256")
    questions = [{"question": q.text, "answers": list(q.answers)} for q in document.questions]
    return {**{name: getattr(document, name) for name in fields}, "questions": questions}


def write(path, *documents):
    path.write_text(json.dumps({"documents": documents}))
    return path


# --- The text --------------------------------------------------------------------------------------------------------


def test_text_is_what_a_reader_of_the_book_sees(folder):
    assert DOCUMENT.text(folder) == TEXT


OTHER_LINES = (BOOK.replace("\r\n", "\n"), "\ufeff" + BOOK, BOOK.replace("nine men", "nine\r\nmen"))


@pytest.mark.parametrize("changed", OTHER_LINES)
def test_line_ends_and_line_breaks_make_no_difference(folder, changed):
    (folder / "pg7.txt").write_bytes(changed.encode())
    assert DOCUMENT.text(folder) == TEXT


def test_an_excerpt_may_be_one_paragraph(folder):
    text = "It rained. The captain slept."
    assert replace(DOCUMENT, first="It rained", last="slept.", sha256=checksum(text)).text(folder) == text


def test_a_missing_book_is_named_with_its_title(tmp_path):
    with pytest.raises(ValueError, match=r"pg7\.txt: not found.*'A Made-up Book' by Nobody, number 7"):
        DOCUMENT.text(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"first": "The boat left"}, "none of its 6 paragraphs begin with 'The boat left'"),
        ({"first": "The"}, "3 of its 6 paragraphs begin with 'The'"),
        ({"last": "in the end."}, "none of its 6 paragraphs end with 'in the end.'"),
        ({"last": "nine men.", "first": "It rained."}, "precedes the one with 'It rained.'"),
    ],
)
def test_anchors_that_are_missing_ambiguous_or_in_the_wrong_order_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=r"pg7\.txt: .*" + re.escape(message)):
        replace(DOCUMENT, **changes).text(folder)


def test_another_text_between_the_same_anchors_is_refused(folder):
    (folder / "pg7.txt").write_bytes(BOOK.replace("captain", "cook").encode())
    with pytest.raises(ValueError, match=r"not what the questions were made for \(SHA-256 \w{12}\.\.\., not "):
        DOCUMENT.text(folder)


# --- The file --------------------------------------------------------------------------------------------------------


def test_load_gives_what_was_written(tmp_path):
    other = replace(DOCUMENT, book=8)
    assert load(write(tmp_path / "q.json", as_json(DOCUMENT), as_json(other))) == [DOCUMENT, other]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("book", "7", "'book' is '7'; expected a number"),
        ("book", True, "'book' is True; expected a number"),
        ("first", "", "'first' is ''; expected a text"),
        ("sha256", None, "'sha256' is None; expected a text"),
        ("questions", [], "there are no questions"),
        ("questions", ["Who?"], "question 1: not an object"),
        ("questions", [{"question": "Who?", "answers": "he"}], "question 1: 'answers' is 'he'; expected a list"),
        ("questions", [{"question": "Who?", "answers": []}], "question 1: 'answers' should be one or more texts"),
        ("questions", [{"question": "Who?", "answers": ["he", "!"]}], "question 1: 'answers' should be one or more"),
    ],
)
def test_a_broken_document_is_named(tmp_path, name, value, message):
    path = write(tmp_path / "q.json", as_json(DOCUMENT), {**as_json(DOCUMENT), name: value})
    with pytest.raises(ValueError, match=re.escape(f"{path}: document 2") + ".*" + re.escape(message)):
        load(path)


@pytest.mark.parametrize("content", ["{}", '{"documents": []}', '{"documents": {}}'])
def test_a_file_without_documents_is_refused(tmp_path, content):
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(ValueError, match='q.json: expected {"documents"'):
        load(path)


# --- Replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, answers",
    [
        ("There were nine men.", ("nine", "9")),
        ("9", ("nine", "9")),
        ("It was JOHN LANE, the driver", ("John Lane",)),
        ("$4,000 in gold", ("4000",)),
        ("twenty-five louis", ("twenty five",)),
        ("the vicar Desèves", ("Deseves",)),
        ("Flint's ship", ("Flint",)),
        ("“Sea Gull”", ("sea gull",)),
    ],
)
def test_right(reply, answers):
    assert contains_any(reply, answers)


@pytest.mark.parametrize(
    "reply, answers",
    [
        ("ninety men", ("nine", "9")),
        ("19 men", ("nine", "9")),
        ("14,000", ("4000",)),
        ("John and Mary Lane", ("John Lane",)),
        ("", ("nine",)),
        ("I don't know.", ("nine",)),
    ],
)
def test_wrong(reply, answers):
    assert not contains_any(reply, answers)


# --- The questions that come with laprox -----------------------------------------------------------------------------


def test_shipped_questions_give_nothing_away():
    for document in load(SHIPPED):
        texts = [question.text for question in document.questions]
        assert len(set(texts)) == len(texts)
        for question in document.questions:
            assert question.text.endswith("?")
            for other in texts:
                assert not contains_any(other, question.answers), (other, question.answers)


def test_shipped_documents_are_sorted_and_differ():
    documents = load(SHIPPED)
    assert [d.book for d in documents] == sorted(d.book for d in documents)
    assert len({d.sha256 for d in documents}) == len(documents)


def test_normalised_paragraphs_have_no_empty_ones():
    assert normalised("\n\n_\n\n{3}\n\na\nb\n\n\n") == ["a b"]
    assert books.normalised("") == []
