"""The model and the document that come with laprox. docs/demo-model.md says what they can do."""

from pathlib import Path

_HERE = Path(__file__).parent


def demo_model() -> Path:
    """A GGUF of a few million parameters that answers questions about facts in a document."""
    return _HERE / "demo.gguf"


def demo_document() -> Path:
    """A text of about 8,000 tokens; beside it demo_questions.json, with the answers."""
    return _HERE / "demo_document.txt"


def demo_questions() -> Path:
    """A JSON list of {question, answer, value, kind, depth} for demo_document()."""
    return _HERE / "demo_questions.json"
