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
from typing import Callable, Iterable, Sequence

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
        "person": "passport/number invoice/number licence/number pet name/phrase talent/phrase "
                  "mentor/person dentist/person hometown/city workplace/city",
        "city": "postcode/number area code/number slogan/phrase mascot/phrase governor/person bishop/person "
                "partner/city",
        "room": "key/number serial/number curtain/phrase lamp/phrase tenant/person painter/person",
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
_LEADS = {
    "train": ("", "", "", "As noted, ", "By the way, ", "It is known that ", "Note that ", "According to the list, ",
              "People say that ", "Also, ", "In fact, ", "In short, ", "They wrote that ", "You will find that "),
    "eval": ("", "", "", "For the record, ", "As it happens, ", "One should know that ", "Remember that "),
}
_REPHRASED = {
    "train": ("{e} has {v} as {a}.", "{E}'s {a} is {v}.", "For {e}, the {a} is {v}.", "{V} is the {a} of {e}.",
              "The {a} belonging to {e} is {v}.", "The {a} of {e}, they say, is {v}.",
              "As for {e}, its {a} is {v}.", "The list gives {v} as the {a} of {e}.", "{E} uses {v} as {a}.",
              "When it comes to {e}, the {a} is {v}.", "The {a}, in the case of {e}, is {v}.",
              "{V} was named the {a} of {e}.", "{E}, whose {a} is {v}, is well known."),
    "eval": ("{E} got {v} as {a}.", "With {e}, the {a} is {v}.", "The {a} that {e} has is {v}.",
             "Regarding {e}, the {a} is {v}.", "The {a} of {e}, we hear, is {v}.", "They call {v} the {a} of {e}."),
}
_ASK = {
    "train": ("What is the {a} of {e}?", "Tell me the {a} of {e}.", "Give the {a} of {e}.", "Find the {a} of {e}.",
              "I need the {a} of {e}.", "Which is the {a} of {e}?", "Can you tell me the {a} of {e}?",
              "What's the {a} of {e}?", "Say the {a} of {e}.", "What does the text give as the {a} of {e}?"),
    "eval": ("Please state the {a} of {e}.", "Do you know the {a} of {e}?", "Look up the {a} of {e}.",
             "What does it say is the {a} of {e}?"),
}
_ASK_REPHRASED = {
    "train": ("What is {e}'s {a}?", "What {a} does {e} have?", "{E} has which {a}?", "For {e}, what is the {a}?",
              "As for {e}, what {a} is given?", "What is the {a} belonging to {e}?"),
    "eval": ("Which {a} is {e}'s?", "Thinking of {e}, what is the {a}?", "What {a} goes with {e}?"),
}
_ASK_SEVERAL = {
    "train": ("List every {a} of {e}.", "What are both values for the {a} of {e}?", "Give all for the {a} of {e}."),
    "eval": ("Name every {a} of {e}.", "List both values for the {a} of {e}."),
}
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


def _value(rng: random.Random, split: str, kind: str) -> str:
    if kind == "number":
        return str(rng.randrange(1000, 10000))
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
def _upper(s: str) -> str:
    return s[:1].upper() + s[1:]


def _fill(template: str, fact: Fact) -> str:
    return template.format(a=fact.attribute, e=fact.name, E=fact.name, v=fact.value, V=_upper(fact.value))


def statement(fact: Fact) -> str:
    return f"The {fact.attribute} of {fact.name} is {fact.value}."


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
                  extra: Sequence[str] = ()) -> Document:
    """A document of about `length` tokens with questions.

    share: part of the document that is facts; the rest is filler (and sentences from `prose`, if given).
    rephrased: part of the facts worded unlike `The A of E is V.`; they are asked as kind "rephrased".
    depths: put the fact of question i at depths[i % len(depths)] of the document.
    count: tokens in a string (default: about 2.6 characters each).
    extra: more attributes (their values are numbers and phrases).
    """
    rng = random.Random(f"{seed}/{split}")
    count = count or (lambda s: -(-len(s) * 10 // 26))
    prose = iter(prose or ())

    facts, kind_of = _facts(rng, split, max(4, round(length * share / 14)), extra)
    seconds: dict[Fact, Fact] = {}  # a fact's second value
    told = {f: _tell(rng, split, f, rng.random() < rephrased) for f in facts}
    plain = {f for f in facts if statement(f)[3:] in told[f]}

    asked = _questions(rng, split, facts, plain, kinds, questions, seconds, kind_of)
    for second in seconds.values():
        told[second] = f"The {second.attribute} of {second.name} is also {second.value}."

    # Sentences in random order up to the length; facts that are asked about always fit.
    needed = {f for q in asked for f in q.facts} | set(seconds.values())
    sentences: list[tuple[str, Fact | None]] = [(told[f], f) for f in told if f in needed]
    used = sum(count(" " + s) for s, _ in sentences)
    spare = [f for f in facts if f not in needed]
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


def _move(sentences, sizes, fact, depth):
    i = next(n for n, s in enumerate(sentences) if s[1] is fact)
    item = sentences.pop(i)
    goal = depth * sum(sizes[id(s)] for s in sentences)
    at = n = 0
    while n < len(sentences) and at < goal:
        at += sizes[id(sentences[n])]
        n += 1
    sentences.insert(n, item)


def _facts(rng, split, n, extra):
    """n facts on few names and few attributes, so that each has near-duplicates both ways."""
    kinds = rng.sample(list(_NAMES), 1 if n < 24 else 2 if n < 60 else 3)
    facts, kind_of, values = [], {}, set()
    pools = {}
    for kind in kinds:
        share = -(-n // len(kinds))
        pool = attributes(split, kind) + [(a, rng.choice(("number", "phrase"))) for a in extra]
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
            if known and rng.random() < 0.5:
                value = rng.choice(known)  # a value that has facts of its own: two hops
            else:
                value = (_distinct(lambda: _value(rng, split, v), 1, values) or [_value(rng, split, v)])[0]
            facts.append(Fact(a, e, value))
    rng.shuffle(facts)
    return facts[:n], kind_of


def _questions(rng, split, facts, plain, kinds, n, seconds, kind_of):
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
                ask = rng.choice(_ASK[split]).format(a=g.attribute, e=f"the {f.attribute} of {f.name}")
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
            value = _distinct(lambda: _value(rng, split, like), 1, {x.value for x in facts})[0]
            seconds[f] = g = Fact(f.attribute, f.name, value)
            ask = _fill(rng.choice(_ASK_SEVERAL[split]), f)
            q = Question(ask, f"{statement(f)[:-1]} and is also {value}.", f"{f.value} and is also {value}", kind,
                         (f, g), f)
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
