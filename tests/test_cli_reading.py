"""Documents as text."""

import codecs
import os

import pytest
from documents import make_pdf

from laprox.chat.reading import read_document, read_documents

PDF = make_pdf("The code of Ada is 7.")


@pytest.fixture
def write(tmp_path):
    def make(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return make


@pytest.mark.parametrize(
    "name, data, text",
    [
        ("a.txt", b"  two\nlines\r\n", "two\nlines"),
        ("a.md", "# Gr\u00fc\u00dfe \U0001f600".encode(), "# Gr\u00fc\u00dfe \U0001f600"),
        ("a.txt", codecs.BOM_UTF8 + b"text", "text"),
        ("a.txt", "text".encode("utf-16"), "text"),
        ("a", b"no suffix", "no suffix"),
        ("A.HTML", b"<title>T</title><style>p{}</style><p>One&nbsp;&amp;</p>\n\n\n<p>two<!-- no --></p>", "T\nOne\xa0&\ntwo"),
        ("a.htm", b"<meta charset=latin-1><p>caf\xe9", "caf\u00e9"),
        ("a.html", b"<p>unclosed <b>tags <<>", "unclosed tags <<>"),
        ("a.pdf", PDF, "The code of Ada is 7."),
    ],
)
def test_text_of_a_document(write, name, data, text):
    assert read_document(write(name, data)) == text


def test_several_documents_keep_their_names(write):
    one, two = write("one.txt", b"first"), write("two.md", b"second")
    assert read_documents([one]) == "first"
    assert read_documents([one, two]) == "# one.txt\n\nfirst\n\n# two.md\n\nsecond"


def test_a_locked_pdf(write):
    with pytest.raises(ValueError, match=r"a\.pdf: the PDF asks for a password; save it without one$"):
        read_document(write("a.pdf", make_pdf("text", "secret")))


def test_a_pdf_without_text(write):
    with pytest.raises(ValueError, match="there is no text in it"):
        read_document(write("a.pdf", make_pdf()))


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.pdf"])
def test_damaged_documents_are_read_or_refused(write, rng, name):
    source = {"a.txt": b"text " * 100, "a.html": b"<p>text</p> " * 50, "a.pdf": PDF}[name]
    for _ in range(60):
        data = bytearray(source[: rng.integers(0, len(source) + 1)])
        for at in rng.integers(0, max(1, len(data)), min(len(data), 5)):
            data[at] = rng.integers(256)
        try:
            assert read_document(write(name, bytes(data)))
        except ValueError as error:
            assert name in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_document(write):
    path = write("a.txt", b"text")
    path.chmod(0)
    with pytest.raises(ValueError, match="Permission denied"):
        read_document(path)
