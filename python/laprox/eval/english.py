"""Names, words and sentences of plain English, drawn at random: what generated documents and facts are made of."""

from __future__ import annotations

import random
from collections.abc import Callable

_FIRST_NAMES = (
    "Alice Arthur Beatrice Bernard Caroline Cedric Clara Conrad Daphne Dennis Edith Edmund Eleanor Ernest Fiona Frederick Gloria "
    "Gordon Harriet Hector Helen Hubert Irene Isaac Judith Julian Laura Leonard Lydia Malcolm Marian Martin Miriam Nigel Nora "
    "Oscar Pamela Patrick Philippa Quentin Rosalind Rupert Sabrina Samuel Sylvia Theodore Ursula Victor Winifred Wilfred"
).split()
_LAST_NAMES = (
    "Abbott Aldridge Barlow Bennett Calloway Carver Chandler Collins Dalton Doyle Eastman Ellison Fairfax Fletcher Garrett Godwin "
    "Hadley Hawkins Ingram Jarvis Keating Kendall Lambert Lockwood Marlow Mercer Norwood Osborne Parrish Penrose Quigley Radcliffe "
    "Rowland Sawyer Sheridan Tanner Thackeray Underwood Vickers Wainwright Waverly Whitaker Winslow Yardley"
).split()
_TOWN_STARTS = "Amber Bram Carl Dun Ebber Fern Glen Hather Ingle Kes Lang Mossel Nether Oak Pem Quarn Raven Sel Thorn Ubber Wend".split()
_TOWN_ENDS = "bury by cote dale field ford ham hurst ley mere stead thorpe ton wick worth".split()
_ADJECTIVES = (
    "amber bold bright broken bronze clever copper crimson distant faithful gentle golden hidden hollow humble iron ivory jolly "
    "lonely lucky merry misty noble patient proud quiet restless royal scarlet silver silent stormy velvet wandering weary wild"
).split()
_NOUNS = (
    "anchor arrow badger beacon candle canyon cedar comet compass dolphin falcon feather fiddle harbour heron island kettle lantern "
    "lark magpie maple meadow mirror otter pebble pelican raven river robin saddle sparrow swallow thistle tiger violet willow"
).split()
_ONSETS = "B C D F G H J K L M N P R S T V W Z Br Cl Dr Fr Gr Kr Pl Sh St Th Tr".split()
_VOWELS = "a e i o u a e i o ai ea ia".split()
_MIDDLES = "l r n m s t d v k b g".split()
_ENDINGS = "n r s l a o e i us en ar is on ek an or in et ia el".split()

_SENTENCES = (
    "Snow fell on {town} all through the night.",
    "The bakery in {town} opened an hour late again.",
    "{first} counted {count} birds above the river.",
    "A {adjective} cart rolled slowly past the church.",
    "{first} asked {second} for an umbrella.",
    "Behind the barn the grass was wet and tall.",
    "The ferry carried {count} people to {town}.",
    "Later that week the {noun} was moved to another room.",
    "Few travellers noticed the {adjective} sign by the wall.",
    "{first} slept badly and rose before the sun.",
    "Somebody had left a {noun} on the kitchen table.",
    "The road from {town} to {other} was closed for repairs.",
    "In the evening {first} and {second} played cards.",
    "Nobody at the market wanted to talk about the weather.",
    "It took {count} days to mend the roof.",
    "The picture over the fireplace showed a {adjective} {noun}.",
    "{first} wrote a long letter and forgot to send it.",
    "The train to {town} stood still for {count} minutes.",
    "There was a smell of coffee in the hall.",
    "The children built a {noun} out of paper.",
    "Old newspapers lay in a pile beside the stairs.",
    "{first} laughed, and {second} closed the window.",
    "The clock in the station had stopped long ago.",
    "A {adjective} wind came down from the hills.",
)  # fmt: skip


def full_name(rng: random.Random) -> str:
    """Of a person: "Helen Marlow"."""
    return f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"


def namesake(rng: random.Random, name: str) -> str:
    """The name of somebody else with the same first or the same last name."""
    first, last = name.split()
    if rng.random() < 0.5:
        return f"{first} {rng.choice([n for n in _LAST_NAMES if n != last])}"
    return f"{rng.choice([n for n in _FIRST_NAMES if n != first])} {last}"


def town(rng: random.Random) -> str:
    """A town that sounds English: "Fernwick"."""
    return rng.choice(_TOWN_STARTS) + rng.choice(_TOWN_ENDS)


def title(rng: random.Random) -> str:
    """What a boat or a horse may be called: "Silver Heron"."""
    return f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}".title()


def made_up_word(rng: random.Random) -> str:
    """A name that is no word of any language, of two to five tokens: "Narei"."""
    word = rng.choice(_ONSETS) + rng.choice(_VOWELS)
    if rng.random() < 0.25:
        word += rng.choice(_MIDDLES) + rng.choice(_VOWELS)
    return word + rng.choice(_MIDDLES) + rng.choice(_ENDINGS)


def sentence(rng: random.Random) -> str:
    """A sentence that tells nothing that anybody will ask for."""
    return rng.choice(_SENTENCES).format(
        first=rng.choice(_FIRST_NAMES), second=rng.choice(_FIRST_NAMES), town=town(rng), other=town(rng),
        adjective=rng.choice(_ADJECTIVES), noun=rng.choice(_NOUNS), count=rng.randrange(2, 90),
    )  # fmt: skip


def distinct(draw: Callable[[], str], n: int) -> list[str]:
    """n different draws."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)
