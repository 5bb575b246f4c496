"""Documents of every kind, made by hand or by the libraries that write them."""

import zipfile
from io import BytesIO

import pypdf
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject


def make_pdf(text=None, password=None, algorithm="RC4-128", owner=None):
    """A page, with or without text and a password. An owner's password alone opens without asking."""
    pdf = pypdf.PdfWriter()
    page = pdf.add_blank_page(300, 300)
    if text:
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        font = DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = pdf._add_object(content)
    if password is not None or owner is not None:
        pdf.encrypt(password or "", owner, algorithm=algorithm)
    return written(pdf.write)


def written(write):
    """What a function writes into a file."""
    data = BytesIO()
    write(data)
    return data.getvalue()


def make_zip(**files):
    """An archive; "__" in a name is a slash and "_dot_" a dot."""
    data = BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return data.getvalue()


def make_docx(body):
    """A Word document around the elements of its body."""
    return make_zip(
        **{
            "[Content_Types]_dot_xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            '<Override PartName="/word/document.xml" '
            'ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>',
            "_rels___dot_rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            '<Relationship Id="r1" Target="word/document.xml" '
            'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"/></Relationships>',
            "word__document_dot_xml": '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
            f"<w:body>{body}</w:body></w:document>",
        }
    )


def docx_text(*runs):
    """A paragraph of runs."""
    return "<w:p>" + "".join(f'<w:r><w:t xml:space="preserve">{run}</w:t></w:r>' for run in runs) + "</w:p>"


def docx_table(*rows):
    """A table of rows of cells."""
    cells = ["".join(f"<w:tc>{docx_text(cell)}</w:tc>" for cell in row) for row in rows]
    return "<w:tbl>" + "".join(f"<w:tr>{row}</w:tr>" for row in cells) + "</w:tbl>"


def make_epub(*chapters, listed=None):
    """An e-book; `listed` are the numbers of its chapters in reading order."""
    listed = range(len(chapters)) if listed is None else listed
    items = "".join(
        f'<opf:item id="c{n}" href="text/part%20{n}.xhtml" media-type="application/xhtml+xml"/>'
        for n in range(len(chapters))
    )
    spine = "".join(f'<opf:itemref idref="c{n}"/>' for n in listed)
    return make_zip(
        mimetype="application/epub+zip",
        **{
            "META-INF__container_dot_xml": '<?xml version="1.0"?><container><rootfiles><rootfile full-path="OEBPS/book.opf" '
            'media-type="application/oebps-package+xml"/></rootfiles></container>',
            "OEBPS__book_dot_opf": '<?xml version="1.0"?><opf:package xmlns:opf="http://www.idpf.org/2007/opf">'
            f"<opf:manifest>{items}</opf:manifest><opf:spine>{spine}</opf:spine></opf:package>",
        },
        **{
            f"OEBPS__text__part {n}_dot_xhtml": '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/>'
            f"<script src='x.js'/></head><body>{chapter}</body></html>"
            for n, chapter in enumerate(chapters)
        },
    )


def make_pptx():
    """Two slides: text, a group and a table; and notes."""
    import pptx
    from pptx.util import Inches

    deck = pptx.Presentation()
    for title in ("First", "Second"):
        slide = deck.slides.add_slide(deck.slide_layouts[5])
        slide.shapes.title.text = title
    box = Inches(1), Inches(2), Inches(3), Inches(1)
    group = slide.shapes.add_group_shape()
    group.shapes.add_textbox(*box).text_frame.text = "in a group"
    table = slide.shapes.add_table(1, 2, *box).table
    table.cell(0, 0).text, table.cell(0, 1).text = "Ada", "4821"
    slide.notes_slide.notes_text_frame.text = "said aloud"
    return written(deck.save)
