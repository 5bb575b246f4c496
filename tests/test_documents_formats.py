"""Files of every kind by what is in them, whatever their names."""

import pytest
from documents import docx_table, docx_text, make_docx, make_epub, make_pdf, make_pptx, make_zip

from laprox.chat.reading import read_document

TEXT = "The code of Ada is 4821."
PDF = make_pdf(TEXT)
DOCX = make_docx(docx_text("The code of ", "Ada", " is 48", "21", ".") + docx_table(["Ada", "4821"], ["Bob", "77"]))
EPUB = make_epub("<h1>One</h1><p>48<b>21</b></p>", "<p>left out</p>", "<p>three</p>", listed=[2, 0])
RTF = rb"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Arial;}}\f0 The code of \b A\b0 da is 48{\i 21}. caf\'e9 \u8364?\par two}"
MAIL = b"""From: =?utf-8?q?Zo=C3=AB?= <zoe@example.org>
To: bob@example.org
Subject: =?iso-8859-1?q?Gr=FC=DFe?=
Date: Mon, 02 Nov 2026 10:00:00 +0000
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=x

--x
Content-Type: multipart/alternative; boundary=y

--y
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

The code is 4821, caf=E9.
--y
Content-Type: text/html

<p>no</p>
--y--
--x
Content-Type: application/pdf
Content-Disposition: attachment; filename="bill.pdf"
Content-Transfer-Encoding: base64

AAAA
--x--
"""
HTML_MAIL = (
    b"From: a@example.org\r\nMessage-ID: <1@x>\r\nContent-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
    + ("<p>48<b>21</b> é</p>".encode())
)


@pytest.fixture
def read(tmp_path):
    def run(data, name):
        path = tmp_path / name
        path.write_bytes(data)
        return read_document(path)

    return run


@pytest.mark.parametrize("name", ["right", "a.txt", "a", "a.html", "a.pdf", "a.md"])
@pytest.mark.parametrize(
    "suffix, data, text",
    [
        ("pdf", PDF, TEXT),
        ("pdf", b"\n\nsent by mail\n" + PDF, TEXT),
        ("docx", DOCX, "The code of Ada is 4821.\nAda | 4821\nBob | 77"),
        ("epub", EPUB, "three\n\n# One\n4821"),
        ("rtf", RTF, "The code of Ada is 4821. café €\ntwo"),
    ],
)
def test_recognised_by_content(read, name, suffix, data, text):
    assert read(data, name.replace("right", f"a.{suffix}")) == text


@pytest.mark.parametrize("name", ["a.eml", "a.txt", "a"])
def test_mail(read, name):
    assert read(MAIL, name) == (
        "From: Zoë <zoe@example.org>\nTo: bob@example.org\nDate: Mon, 02 Nov 2026 10:00:00 +0000\nSubject: Grüße\n\n"
        "The code is 4821, café.\n\n(attachment, not read: bill.pdf)"
    )
    assert read(HTML_MAIL, name) == "From: a@example.org\n\n4821 é"


def test_text_that_begins_like_mail_is_whole(read):
    text = "From: Ann\nTo: Bob\nNote: keep this\n\nbody"
    assert read(text.encode(), "a.txt") == text
    notes = "From: the minutes\nwe decided\nMIME-Version: 1.0 it is\n\nbody"
    assert read(notes.encode(), "a.txt") == notes


def test_presentations(read):
    text = read(make_pptx(), "a.pptx")
    assert text == "# Slide 1\nFirst\n\n# Slide 2\nSecond\nin a group\nAda | 4821\nNotes:\nsaid aloud"
    assert read(make_pptx(), "a.txt") == text


# --- PDF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"])
def test_encrypted_pdfs_that_any_viewer_opens(read, algorithm):
    assert read(make_pdf(TEXT, "", algorithm), "a.pdf") == TEXT
    assert read(make_pdf(TEXT, owner="secret", algorithm=algorithm), "a.pdf") == TEXT


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_locked_pdfs(read, algorithm):
    with pytest.raises(ValueError, match=r"a\.pdf: the PDF asks for a password; save it without one$"):
        read(make_pdf(TEXT, "secret", algorithm), "a.pdf")


def test_pdf_without_its_crypto_package(read, monkeypatch):
    import pypdf
    from pypdf.errors import DependencyError

    def lacking(*_args, **_kwargs):
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PdfReader, "decrypt", lacking)
    with pytest.raises(
        ValueError, match=r'a\.pdf: an encrypted PDF takes the package cryptography: pip install "laprox\[documents\]"$'
    ):
        read(make_pdf(TEXT, "", "AES-128"), "a.pdf")


def test_half_characters_in_a_pdf(read, monkeypatch):
    import pypdf

    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda _: "a \ud83d and \ud83d\ude00 \x1b[2J")
    assert read(PDF, "a.pdf") == "a \ufffd and 😀"


# --- what isn't read, by name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, said",
    [
        (make_zip(xl__workbook_dot_xml="<x/>"), "a spreadsheet; save it as .csv"),
        (
            make_zip(mimetype="application/vnd.oasis.opendocument.text"),
            "an OpenDocument file; save it as .docx, .pptx or .pdf",
        ),
        (make_zip(mimetype="application/vnd.oasis.opendocument.spreadsheet"), "a spreadsheet; save it as .csv"),
        (make_zip(a_dot_txt="text"), "an archive (ZIP); unpack it"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
            "an older Office file (.doc, .xls or .ppt); save it as .docx, .csv or .pptx",
        ),
        (make_epub(), "there is no text in it"),
        (b"PK\x03\x04 cut", "a damaged archive"),
    ],
)
def test_refused_by_name(read, data, said):
    with pytest.raises(ValueError, match="a.bin: ") as refused:
        read(data, "a.bin")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "source",
    [DOCX, EPUB, RTF, MAIL, make_pptx(), make_pdf(TEXT, "", "AES-256")],
    ids=["docx", "epub", "rtf", "mail", "pptx", "pdf"],
)
def test_damaged_files_are_read_or_refused(read, rng, source):
    for _ in range(40):
        data = bytearray(source[: rng.integers(len(source) // 2, len(source) + 1)])
        for at in rng.integers(0, len(data), 5):
            data[at] = rng.integers(256)
        try:
            read(bytes(data), "a.bin")
        except ValueError as error:
            assert "a.bin: " in str(error) and str(error).count("\n") == 0


@pytest.mark.parametrize(
    "data, what",
    [(PDF, "a PDF"), (b"<html>text", "HTML"), (RTF, "RTF"), (DOCX, "a Word document"), (EPUB, r"an e-book \(EPUB\)")],
)
def test_a_package_that_is_missing(read, monkeypatch, data, what):
    from laprox import extras

    monkeypatch.setattr(extras, "_importable", lambda module: module != "mammoth")
    with pytest.raises(
        extras.MissingExtra, match=f'^reading {what} needs mammoth: pip install "laprox\\[documents\\]"$'
    ):
        read(data, "a")
