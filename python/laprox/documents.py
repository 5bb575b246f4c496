"""Long documents with questions, made from a seed: for the demo, the tests, the evaluation and the training.

A document is prose (filler) with facts scattered in it, such as `The door code of Kelvar is 4821.`
Every fact has near-duplicates: other attributes of the same name, the same attribute of other names.
The splits "train" and "eval" share neither names, nor attributes, nor wordings.

    doc = make_document(seed=7, length=2000)
    doc.text, doc.questions[0].text, doc.questions[0].answer
"""
from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from typing import Callable, Iterable, Mapping, Sequence

KINDS = ("single", "rephrased", "several", "two-hop", "unanswerable")
SPLITS = ("train", "eval")
NOT_THERE = "not in the document"

# --- Words ---------------------------------------------------------------------------------------
_ONSETS = "B C D F G H J K L M N P R S T V W Z Br Cl Dr Fr Gr Kr Pl Sh St Th Tr".split()
_VOWELS = "a e i o u a e i o ai ea ia".split()
_MIDDLES = "l r n m s t d v k b g l r n nd lv rt rn st nn ll rr".split()
_ENDS = "n r s l a o e i us en ar is on ek an or in et ia el".split()
_CITY_ENDS = "ford mere burg stad haven port dale ton".split()
_HALL_KINDS = "Hall Room Tower Gate Vault Cellar Studio Garden".split()

# What a person, a city and a room have; the kind of value behind the slash.
_ATTRIBUTES = {
    "train": {
        "person": "phone/number code/number pin/number badge/number locker/number account/number ticket/number "
                  "password/phrase nickname/phrase motto/phrase hobby/phrase dessert/phrase emblem/phrase "
                  "boss/person cousin/person doctor/person tutor/person friend/person lawyer/person tailor/person "
                  "birthplace/city home/city office/city destination/city",
        "city": "zip/number altitude/number population/number hotline/number census/number "
                "anthem/phrase festival/phrase flag/phrase symbol/phrase market/phrase newspaper/phrase "
                "mayor/person founder/person sheriff/person baker/person judge/person poet/person "
                "rival/city neighbour/city twin/city",
        "room": "number/number alarm/number floor/number extension/number capacity/number "
                "colour/phrase scent/phrase painting/phrase carpet/phrase label/phrase "
                "owner/person cleaner/person guard/person architect/person keeper/person",
    },
    "eval": {
        "person": "passport/number key/number score/number horse/phrase song/phrase pet name/phrase "
                  "brother/person teacher/person captain/person village/city workplace/city",
        "city": "height/number area code/number river/phrase statue/phrase governor/person bishop/person king/person "
                "partner/city",
        "room": "price/number width/number lamp/phrase window/phrase tenant/person painter/person",
    },
}
_ADJECTIVES = {
    "train": "bronze quiet silver hollow crimson gentle frozen golden faded narrow violet rapid wooden "
             "bitter humble lonely marble tender sunny rusty pale brave misty royal velvet copper".split(),
    "eval": "scarlet silent broken distant hidden clever stormy dusty wild granite".split(),
}
_NOUNS = {
    "train": "falcon river lantern meadow anchor compass harbour thistle mirror cedar raven candle "
             "orchard glacier violin saddle pebble comet walnut dragon basket sparrow temple otter".split(),
    "eval": "heron canyon beacon willow hammer feather kettle tiger island clover".split(),
}

# --- Wordings: {a} attribute, {e} name, {v} value ---------------------------------------------------
# A fact names both keys before it gives the value. What is asked for is a phrase with a way to ask around it. Training
# and evaluation share phrases where a kind of question could not be told without ("every", "the A of the B of E"), but
# no whole wording.
_LEADS = {
    "train": ("", "", "", "As noted, ", "By the way, ", "It is known that ", "Note that ", "According to the list, ",
              "People say that ", "Also, ", "In fact, ", "In short, ", "They wrote that ", "You will find that ",
              "As it happens, ", "We should remember that ", "For the most part, ", "It was written that "),
    "eval": ("", "", "", "For the record, ", "As they say, ", "One should know that ", "Remember that "),
}
_OWNED = {  # the attribute of a name, unlike "the {a} of {e}"
    "train": ("{e}'s {a}", "the {a} belonging to {e}", "the {a} for {e}", "the {a} {e} has", "{e}'s own {a}",
              "the {a} given for {e}", "the {a} from {e}", "the {a} known for {e}", "the {a} going with {e}",
              "the {a} listed under {e}", "{e}'s only {a}", "the {a} there for {e}", "the {a} kept for {e}",
              "the {a} which {e} has", "the {a} that {e} had", "the {a} set for {e}", "the {a} known to {e}",
              "{e}'s other {a}", "the {a} chosen by {e}", "the {a} sent to {e}", "the {a} found with {e}"),
    "eval": ("the {a} that {e} has", "the {a} noted for {e}", "the {a} given to {e}"),
}
_TOPICS = {
    "train": ("for {e}, the {a}", "as for {e}, the {a}", "when it comes to {e}, the {a}", "about {e}: the {a}",
              "in the case of {e}, the {a}", "{e} has one {a}, which", "{e} has a {a}, which",
              "with regard to {e}, the {a}", "we know {e}, whose {a}", "now to {e}, where the {a}",
              "on {e}: the {a}", "by {e}, the {a}", "at {e}, the {a}", "and {e}: the {a}", "{e} is where the {a}",
              "{e} was one that had a {a}, which", "under {e}, the {a}", "so for {e} the {a}", "this is {e}, whose {a}"),
    "eval": ("with {e}, the {a}", "in regard to {e}, the {a}", "{e} is one whose {a}", "now for {e}, whose {a}"),
}
_LINKS = {
    "train": ("is", "is", "is", "was", "is now", "has been", "is just", "should be", "reads", "is always", "will be",
              "became", "is still"),
    "eval": ("is", "was", "was always"),
}
_ENDINGS = {
    "train": ("", "", "", "", ", they say", ", as we know", ", it seems", " at this time", ", and that is all"),
    "eval": ("", "", ", as they say", ", and that is known"),
}
_WAYS_TO_ASK = {
    "train": ("What is {}?", "What's {}?", "Which is {}?", "Tell me {}.", "Please tell me {}.", "Give me {}.", "Give {}.",
              "Please give {}.", "Find {}.", "I need {}.", "I need to know {}.", "I want to know {}.", "Name {}.",
              "I would like to know {}.", "Can you tell me {}?", "Can you find {}?", "Could you give me {}?",
              "Would you say what {} is?", "Say what {} is.", "Tell us {}.", "What does the text say about {}?",
              "What does the text give as {}?", "Read out {}.", "Write down {}.", "I am looking for {}.", "Look for {}.",
              "We need {}.", "Let me know {}.", "Let us hear {}.", "So what is {}?", "And what is {}?", "List {}.",
              "Now tell me {}.", "Now, what is {}?", "From the text, give {}.", "According to the text, what is {}?",
              "In the document, what is {}?", "One more question: what is {}?", "Next: {}.", "Do you see {}?",
              "What was {}?", "Answer this: what is {}?", "Show me {}.", "Show {}, please.", "Tell me about {}.",
              "Now I ask for {}.", "May I have {}?", "May I ask for {}?", "What do you know about {}?"),
    "eval": ("Please find {}.", "Do you know {}?", "Could you tell me {}?", "Please say what {} is.", "Now give me {}.",
             "What does the document give as {}?", "I would like to have {}."),
}
_ASK_OWNED = {
    "train": ("What {a} does {e} have?", "Which {a} belongs to {e}?", "For {e}, what is the {a}?", "{E} has which {a}?",
              "As for {e}, what is the {a}?", "About {e}: which {a} is given?", "What {a} goes with {e}?",
              "Does the text say what {a} {e} has?", "{E}'s {a}?", "When it comes to {e}, what is the {a}?"),
    "eval": ("Which {a} does {e} have?", "What {a} belongs to {e}?", "About {e}: what is the {a}?", "{E} has what {a}?"),
}
_SEVERAL = {
    "train": ("every {a} of {e}", "each {a} of {e}", "both values for the {a} of {e}", "all values for the {a} of {e}",
              "every value given as the {a} of {e}", "all that is given as the {a} of {e}", "each {a} that {e} has",
              "both of the values of the {a} of {e}", "every single {a} of {e}", "every value for the {a} of {e}",
              "each value of the {a} of {e}", "any value for the {a} of {e}", "each of the values for the {a} of {e}",
              "both values of the {a} of {e}", "every {a} {e} has"),
    "eval": ("every {a} of {e}", "each value for the {a} of {e}", "both values given as the {a} of {e}"),
}
_TWO_HOP = {
    "train": ("the {b} of the {a} of {e}", "the {b} of the {a} of {e}", "the {b} of {e}'s {a}",
              "the {b} belonging to the {a} of {e}", "the {b} for the {a} of {e}"),
    "eval": ("the {b} of the {a} of {e}", "the {b} given for the {a} of {e}"),
}


def _wordings(*phrases: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Every way to ask around every phrase."""
    return {s: tuple(_upper(ask.format(p)) for kind in phrases for p in dict.fromkeys(kind[s]) for ask in _WAYS_TO_ASK[s])
            for s in SPLITS}


def _upper(s: str) -> str:
    return s.replace("{e}", "{E}", 1) if s.startswith("{e}") else s[:1].upper() + s[1:]


_REPHRASED = {s: tuple(f"{_upper(keys)} {link} {{v}}{ending}." for keys in _OWNED[s] + _TOPICS[s] for link in _LINKS[s]
                       for ending in _ENDINGS[s]) for s in SPLITS}
_ASK = _wordings({s: ("the {a} of {e}",) for s in SPLITS})
_ASK_REPHRASED = {s: _wordings(_OWNED)[s] + 5 * _ASK_OWNED[s] for s in SPLITS}
_ASK_SEVERAL = _wordings(_SEVERAL)
_ASK_TWO_HOP = _wordings(_TWO_HOP)
_FILLER = {
    "train": ("The rain over {c} stopped before noon.", "Nobody in the {n} shop had seen the {j} {n}.",
              "{p} walked to the station and waited.", "A {j} {n} stood at the end of the road.",
              "The train to {c} was late again.", "In the evening the {n} looked {j}.",
              "{p} and {q} talked about the weather.", "There was a {j} smell of coffee in the hall.",
              "The road from {c} to {d} is long and dusty.", "Some said the {n} was {j}, others did not care.",
              "{p} wrote a letter and forgot to send it.", "It took {k} days to repair the {n}.",
              "The old clock struck and the {n} fell silent.", "They sold {k} copies of the {j} book."),
    "eval": ("Snow fell on {c} all through the night.", "{p} counted {k} birds above the {n}.",
             "A {j} cart rolled slowly past the {n}.", "The bakery in {c} opened an hour late.",
             "{p} asked {q} for a {j} umbrella.", "Behind the {n} the grass was {j} and tall.",
             "The ferry carried {k} people to {d}.", "Later that week the {n} was moved again.",
             "Few travellers noticed the {j} {n} by the wall.", "{p} slept badly and rose early."),
}


@dataclass(frozen=True)
class Fact:
    attribute: str
    name: str
    value: str


@dataclass
class Question:
    text: str
    answer: str  # the whole reply; it restates the question, then gives the value
    value: str  # what a right reply must contain
    kind: str
    facts: tuple[Fact, ...]
    about: Fact  # what is asked for; for "unanswerable" the fact that is not there
    depth: float | None = None  # where the (first) fact lies in the document, 0 to 1


@dataclass
class Document:
    text: str
    questions: list[Question]
    facts: list[Fact] = field(default_factory=list)


# --- Names and values -------------------------------------------------------------------------------
def split_of(name: str) -> str:
    """Every made-up name belongs to one split for good."""
    return "eval" if zlib.crc32(name.encode()) % 4 == 0 else "train"


def _stem(rng: random.Random) -> str:
    stem = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    if rng.random() < 0.25:
        stem += rng.choice(_MIDDLES) + rng.choice(_VOWELS[:9])
    return stem


def _draw(rng: random.Random, split: str, make: Callable[[], str]) -> str:
    while split_of(name := make()) != split:
        pass
    return name


def person(rng: random.Random, split: str) -> str:
    return _draw(rng, split, lambda: _stem(rng) + rng.choice(_MIDDLES[:11]) + rng.choice(_ENDS))


def city(rng: random.Random, split: str) -> str:
    return _draw(rng, split, lambda: _stem(rng) + rng.choice(_CITY_ENDS))


def room(rng: random.Random, split: str) -> str:
    stem = _draw(rng, split, lambda: _stem(rng) + rng.choice(_MIDDLES[:11]))
    return f"{stem} {rng.choice(_HALL_KINDS)}"


_NAMES = {"person": person, "city": city, "room": room}


def attributes(split: str, kind: str) -> list[tuple[str, str]]:
    """(attribute, kind of value) of a person, a city or a room."""
    words = _ATTRIBUTES[split][kind].replace("/", " / ").split(" ")
    found, name = [], []
    while words:
        word = words.pop(0)
        if word == "/":
            found.append((" ".join(name), words.pop(0)))
            name = []
        elif word:
            name.append(word)
    return found


def evaluation_words() -> list[str]:
    """The attributes and the words of values that training must not use."""
    return [*_ADJECTIVES["eval"], *_NOUNS["eval"], *(a for kind in _NAMES for a, _ in attributes("eval", kind))]


def _value(rng: random.Random, split: str, kind: str, words: Sequence[str]) -> str:
    if kind == "number":
        return str(rng.randrange(1000, 10000))
    if kind == "phrase" and words and rng.random() < 0.8:
        return " ".join(rng.sample(words, 2))
    if kind == "phrase":
        return f"{rng.choice(_ADJECTIVES[split])} {rng.choice(_NOUNS[split])}"
    return _NAMES[kind](rng, split)


def _distinct(draw: Callable[[], str], n: int, taken: set[str]) -> list[str]:
    found: list[str] = []
    for _ in range(50 * n):
        if len(found) == n:
            break
        if (x := draw()) not in taken:
            taken.add(x)
            found.append(x)
    return found


# --- Wording ----------------------------------------------------------------------------------------
def _fill(template: str, fact: Fact) -> str:
    return template.format(a=fact.attribute, e=fact.name, E=fact.name, v=fact.value)


def statement(fact: Fact) -> str:
    return f"The {fact.attribute} of {fact.name} is {fact.value}."


def _also(second: Fact) -> str:
    return f"The {second.attribute} of {second.name} is also {second.value}."


def _tell(rng: random.Random, split: str, fact: Fact, rephrased: bool) -> str:
    if rephrased:
        return _fill(rng.choice(_REPHRASED[split]), fact)
    lead = rng.choice(_LEADS[split])
    return lead + "the" + statement(fact)[3:] if lead else statement(fact)


def filler(rng: random.Random, split: str) -> str:
    """One sentence that states no fact anyone asks for."""
    return rng.choice(_FILLER[split]).format(
        p=person(rng, split), q=person(rng, split), c=city(rng, split), d=city(rng, split),
        n=rng.choice(_NOUNS[split]), j=rng.choice(_ADJECTIVES[split]), k=rng.randrange(2, 90))


def prompt(text: str, question: str) -> str:
    """The user's message: the document, then the question."""
    return f"{text}\n\n{question}"


# --- Documents --------------------------------------------------------------------------------------
def make_document(seed: int | str, length: int = 2000, *, split: str = "eval", kinds: Sequence[str] = KINDS,
                  questions: int = 10, share: float = 0.5, rephrased: float = 0.25, depths: Sequence[float] = (),
                  count: Callable[[str], int] | None = None, prose: Iterable[str] | None = None,
                  extra: Sequence[str] = (), words: Sequence[str] = ()) -> Document:
    """A document of about `length` tokens with questions.

    share: part of the document that is facts; the rest is filler (and sentences from `prose`, if given).
    rephrased: part of the facts worded unlike `The A of E is V.`; they are asked as kind "rephrased".
    depths: put the fact of question i at depths[i % len(depths)] of the document.
    count: tokens in a string (default: about 2.6 characters each).
    extra: more attributes; words: more words for values.
    """
    rng = random.Random(f"{seed}/{split}")
    count = count or (lambda s: -(-len(s) * 10 // 26))
    prose = iter(prose or ())

    told, asked, seconds = tell_facts(rng, max(4, round(length * share / 14)), split, kinds, questions, rephrased, extra, words)

    # Sentences in random order up to the length; facts that are asked about always fit.
    needed = {f for q in asked for f in q.facts} | set(seconds.values())
    sentences: list[tuple[str, Fact | None]] = [(told[f], f) for f in told if f in needed]
    used = sum(count(" " + s) for s, _ in sentences)
    spare = [f for f in told if f not in needed]
    rng.shuffle(spare)
    filling = 0
    while True:
        wanted_facts = (used - filling) <= share * used
        if wanted_facts and spare:
            item = (told[spare[-1]], spare.pop())
        else:
            line = next(prose, None) if rng.random() < 0.5 else None
            item = (line or filler(rng, split), None)
        n = count(" " + item[0])
        if used + n > length:
            break
        used += n
        filling += 0 if item[1] else n
        sentences.append(item)
    rng.shuffle(sentences)

    sizes = {id(s): count(" " + s[0]) for s in sentences}
    for i, q in enumerate(asked if depths else ()):
        if q.facts and q.facts[0] in needed:
            _move(sentences, sizes, q.facts[0], depths[i % len(depths)])
    for first, second in seconds.items():  # "also" comes after
        i, j = (next(n for n, s in enumerate(sentences) if s[1] is f) for f in (first, second))
        if i > j:
            sentences[i], sentences[j] = sentences[j], sentences[i]

    start, at = 0, {}
    for s in sentences:
        at[s[1]] = start / max(1, used)
        start += sizes[id(s)]
    for q in asked:
        q.depth = at[q.facts[0]] if q.facts else None
    names, known = ({x for f in at if f for x in (f.name, f.value)}, {f.attribute for f in at if f})
    asked = [q for q in asked if q.facts or (q.about.name in names and q.about.attribute in known)]

    text, line = [], []
    for s, _ in sentences:
        line.append(s)
        if rng.random() < 0.12:
            text.append(" ".join(line))
            line = []
    text.append(" ".join(line))
    return Document("\n".join(t for t in text if t), asked, [s[1] for s in sentences if s[1]])


def tell_facts(rng: random.Random, n: int, split: str, kinds: Sequence[str], questions: int, rephrased: float,
               extra: Sequence[str] = (), words: Sequence[str] = ()
               ) -> tuple[dict[Fact, str], list[Question], dict[Fact, Fact]]:
    """About `n` facts that resemble each other, as sentences, with questions about them; the rest is as in make_document().

    Returns: the sentence of each fact; the questions, without a depth; and of facts with two values the second.
    """
    facts, kind_of = _facts(rng, split, n, extra, words)
    seconds: dict[Fact, Fact] = {}
    told = {f: _tell(rng, split, f, rng.random() < rephrased) for f in facts}
    plain = {f for f in facts if statement(f)[3:] in told[f]}
    asked = _questions(rng, split, facts, plain, kinds, questions, seconds, kind_of, words)
    for second in seconds.values():
        told[second] = _also(second)
    return told, asked, seconds


def _move(sentences, sizes, fact, depth):
    i = next(n for n, s in enumerate(sentences) if s[1] is fact)
    item = sentences.pop(i)
    goal = depth * sum(sizes[id(s)] for s in sentences)
    at = n = 0
    while n < len(sentences) and at < goal:
        at += sizes[id(sentences[n])]
        n += 1
    sentences.insert(n, item)


def _facts(rng, split, n, extra, words):
    """n facts on few names and few attributes, so that each has near-duplicates both ways."""
    kinds = rng.sample(list(_NAMES), 1 if n < 24 else 2 if n < 60 else 3)
    facts, kind_of, values = [], {}, set()
    pools = {}
    for kind in kinds:
        share = -(-n // len(kinds))
        pool = attributes(split, kind) + [(a, rng.choice(("number", "phrase", "person", "city", kind, kind))) for a in extra]
        rng.shuffle(pool)
        pool = pool[:max(2, min(len(pool), round(share**0.5)))]
        people = _distinct(lambda: _NAMES[kind](rng, split), max(2, -(-round(share * 1.4) // len(pool))), values)
        for name in people:
            kind_of[name] = kind
        pools[kind] = (pool, people, share)
    for kind, (pool, people, share) in pools.items():
        grid = [(a, v, e) for a, v in pool for e in people]
        for a, v, e in rng.sample(grid, min(share, len(grid))):
            known = [x for x, k in kind_of.items() if k == v and x != e]
            if known and rng.random() < 0.7:
                value = rng.choice(known)  # a value that has facts of its own: two hops
            else:
                value = (_distinct(lambda: _value(rng, split, v, words), 1, values) or [_value(rng, split, v, words)])[0]
            facts.append(Fact(a, e, value))
    rng.shuffle(facts)
    return facts[:n], kind_of


def _questions(rng, split, facts, plain, kinds, n, seconds, kind_of, words):
    by_name: dict[str, list[Fact]] = {}
    for f in facts:
        by_name.setdefault(f.name, []).append(f)
    have = {(f.attribute, f.name) for f in facts}
    chain = [(f, g) for f in facts for g in by_name.get(f.value, ()) if g.value != f.name]
    single = [f for f in facts if f in plain]
    other = [f for f in facts if f not in plain] or facts
    asked, seen = [], set()
    for i in range(20 * n):
        if len(asked) == n:
            break
        kind = kinds[len(asked) % len(kinds)] if i < 15 * n else "single"
        if kind == "two-hop":
            if not chain:
                kind = "single"
            else:
                f, g = rng.choice(chain)
                ask = _fill(rng.choice(_ASK_TWO_HOP[split]).replace("{b}", g.attribute), f)
                q = Question(ask, f"{statement(f)} {statement(g)}", g.value, kind, (f, g), g)
        if kind == "unanswerable":
            f = rng.choice(facts)
            same = [x for x, k in kind_of.items() if k == kind_of[f.name] and x in by_name]
            name = rng.choice(same)
            if (f.attribute, name) in have:
                continue
            none = Fact(f.attribute, name, NOT_THERE)
            q = Question(_fill(rng.choice(_ASK[split]), none), statement(none), NOT_THERE, kind, (), none)
        elif kind == "several":
            f = rng.choice(single or facts)
            if f in seconds or f in seen:
                continue
            like = ("number" if f.value.isdigit() else "phrase" if " " in f.value
                    else "city" if f.value.endswith(tuple(_CITY_ENDS)) else "person")
            value = _distinct(lambda: _value(rng, split, like, words), 1, {x.value for x in facts})[0]
            seconds[f] = g = Fact(f.attribute, f.name, value)
            ask = _fill(rng.choice(_ASK_SEVERAL[split]), f)
            q = Question(ask, f"{statement(f)} {_also(g)}", f"{f.value}. {_also(g)[:-1]}", kind, (f, g), f)
        elif kind in ("single", "rephrased"):
            f = rng.choice((single or facts) if kind == "single" else other)
            # "rephrased": the fact, the question or both are not worded as the answer is
            way = _ASK if kind == "single" or (f not in plain and rng.random() < 0.5) else _ASK_REPHRASED
            q = Question(_fill(rng.choice(way[split]), f), statement(f), f.value, kind, (f,), f)
        key = (q.kind, q.answer)
        if key in seen or (kind != "several" and any(f in seconds for f in q.facts)):
            continue
        seen.update((key, *q.facts))
        asked.append(q)
    # a fact asked about before it got a second value
    return [q for q in asked if q.kind == "several" or not any(f in seconds for f in q.facts)]
