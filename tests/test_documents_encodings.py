"""Text in whatever encoding, cut, dirty, or not text at all."""

import codecs

import pytest

from laprox.chat.decoding import clean, printable
from laprox.chat.reading import read_document, read_jsonl

WESTERN = "Der Straßenbau in Köln kostet 4.821 €, “größer” als 2019 – sagt Zoë."
CYRILLIC = "Съешь же ещё этих мягких французских булок, да выпей чаю."
JAPANESE = "これは日本語の文書です。番号は四八二一です。東京は日本の首都です。"
CHINESE = "这是一个中文文件，号码是四八二一。北京是中国的首都。"


@pytest.fixture
def read(tmp_path):
    """read(data): the text, and what is said about it."""

    def run(data, name="a.txt"):
        path = tmp_path / name
        path.write_bytes(data)
        notes = []
        text = read_document(path, notes.append)
        return text, [note.removeprefix(f"{path}: ") for note in notes]

    return run


@pytest.mark.parametrize(
    "text, encoding, said",
    [
        (WESTERN, "cp1252", "windows-1252"),
        ("un café", "cp1252", "windows-1252"),
        ("Grüße", "latin-1", "windows-1252"),
        ("L’été à Paris — où êtes-vous allé, garçon ? Le café coûte 3 €.", "cp1252", "windows-1252"),
        (CYRILLIC, "cp1251", "cp1251"),
        (CYRILLIC, "koi8-r", "koi8-r"),
        ("Zażółć gęślą jaźń, a następnie wróć do domu przed północą.", "cp1250", "cp1250"),
        (JAPANESE, "shift_jis", "Shift-JIS"),
        (JAPANESE, "euc_jp", "euc-jis-2004"),
        (CHINESE, "gbk", "gb18030"),
        ("這是一個中文文件，號碼是四八二一。臺北是一個城市。", "big5", "big5"),
        ("이것은 한국어 문서입니다. 번호는 사팔이일입니다.", "euc_kr", "cp949"),
    ],
)
def test_other_encodings_are_read_and_said(read, text, encoding, said):
    assert read(text.encode(encoding)) == (text, [f"not UTF-8; read as {said}"])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["The code is 4821.\nAda", WESTERN, CYRILLIC, JAPANESE, CHINESE])
def test_unicode_without_a_mark(read, encoding, text):
    assert read(text.encode(encoding)) == (text, [f"read as {encoding.upper()}"])


@pytest.mark.parametrize(
    "mark, encoding",
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("text", ["text", JAPANESE])
def test_unicode_with_a_mark(read, mark, encoding, text):
    assert read(mark + text.encode(encoding)) == (text, [])


def test_japanese_of_old_mail_programs(read):
    assert read(JAPANESE.encode("iso2022_jp")) == (JAPANESE, [])


@pytest.mark.parametrize(
    "encoding, mark", [("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE)]
)
def test_cut_within_the_last_character(read, encoding, mark):
    for text in ("one, two, 東", "le café", "Größe: é"):
        data = mark + text.encode(encoding)[:-1]
        assert read(data) == (text[:-1] + "\ufffd", ["cut off within its last character"])


def test_a_few_bytes_that_are_wrong(read):
    data = (CYRILLIC * 3).encode()
    text, notes = read(data[:100] + b"\xff" + data[100:])
    assert notes == ["1 characters are not UTF-8 and were replaced"] and text.replace("\ufffd", "") == CYRILLIC * 3


def test_nothing_is_said_of_ordinary_text(read):
    assert read(f"{WESTERN} \ufffd 東 😀".encode()) == (f"{WESTERN} \ufffd 東 😀", [])


@pytest.mark.parametrize(
    "dirty, cleaned",
    [
        ("a\0b", "ab"),
        ("a\ufeffb", "ab"),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x1b(B\x1bc", "red link "),
        ("\x9b2Jcleared\x9d0;t\x9c\x85", "cleared"),
        ("bell\x07 \x7f", "bell "),
        ("N\bNA\bAM\bME\bE _\bx", "NAME x"),
        ("one\r\ntwo\rthree\ffour\vfive\tsix", "one\ntwo\nthree\nfour\nfive\tsix"),
        ("\x1b", ""),
        ("half \ud83d, whole \ud83d\ude00", "half \ufffd, whole 😀"),
        ("👩‍👩‍👧 עברית", "👩‍👩‍👧 עברית"),
    ],
)
def test_what_drives_a_terminal_is_gone(read, dirty, cleaned):
    assert clean(dirty) == cleaned
    if dirty.isascii() and cleaned:
        assert read(b"." * 100 + dirty.encode())[0] == ("." * 100 + cleaned).strip()


def test_pieces_of_an_answer_are_printable():
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b") == "a[2Jb\n\tc"
    assert printable("\ud83d") == "\ufffd" and printable("東 😀") == "東 😀"
    printable("".join(map(chr, range(0x11000)))).encode()


@pytest.mark.parametrize(
    "data, said",
    [
        (bytes(100), "not text, but binary data"),
        (bytes(range(256)), "not UTF-8 text (byte 128), but binary data"),
        (b"\x01\x02\x03 a few words", "not text, but binary data"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture (PNG), and text in pictures is not read"),
        (b"GGUF\3\0\0\0", "a model (GGUF), not a document"),
        (b"\x1f\x8b\x08" + bytes(20), "compressed (gzip); unpack it"),
    ],
)
def test_what_is_no_text(read, tmp_path, data, said):
    with pytest.raises(ValueError) as refused:
        read(data)
    assert str(refused.value) == f"{tmp_path / 'a.txt'}: {said}"


def test_noise_is_read_or_refused(read, rng):
    for n in (1, 2, 3, 7, 100, 4000):
        for _ in range(30):
            data = rng.bytes(n) if n < 1000 else rng.integers(32, 256, n).astype("uint8").tobytes()
            try:
                text, _ = read(data)
                assert text == clean(text).strip() and text.encode()
            except ValueError as error:
                assert "a.txt: " in str(error)


def test_half_characters_in_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\\ud83d", "b": ["\\ud83d\\ude00"]}\n')
    assert [data for _, data in read_jsonl(path)] == [{"a": "\ufffd", "b": ["😀"]}]


def test_a_package_that_is_missing(read, monkeypatch):
    from laprox import extras

    monkeypatch.setattr(extras, "_importable", lambda module: module != "charset_normalizer")
    assert read(b"ASCII")[0] == "ASCII"
    with pytest.raises(extras.MissingExtra) as missing:
        read(WESTERN.encode("cp1252"))
    assert (
        str(missing.value) == 'reading text that is not UTF-8 needs charset-normalizer: pip install "laprox[documents]"'
    )
