"""Orders and their JSON: a compositional grammar of several hundred productions in two languages.

A derivation picks one production a slot (``style``), then quantities, units and prices item by item. Some pairs of
productions are held out: they never occur together in a training prompt, though each occurs alone. The prompt's
digest decides on which side of the split it is, so a frozen test's text cannot occur in training.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from random import Random
from types import ModuleType
from typing import Any

from model import english, names, noise, numbers, spanish

SEPARATOR = " =>"
SPLITS = ("train", "seeds", "names", "recombined")
LANGUAGES: dict[str, ModuleType] = {"es": spanish, "en": english}

# Slots whose productions are paired for the held-out recombinations.
PAIRED = [
    ("order", "request"), ("request", "price"), ("item", "price"), ("price", "money"), ("item", "product"),
    ("unit", "price"), ("unit", "item"), ("quantity", "unit"), ("joiner", "item"), ("order", "due"),
]  # fmt: skip
HELD_OUT_SHARE = 20  # one pair in so many
RECOMBINED_PAIRS = 2  # held-out pairs that a recombined prompt has at least

Production = tuple[str, str]
COMMA: Production = ("joiner", ", ")


@dataclass
class Order:
    """One prompt (it ends with the separator), its JSON, and the productions that made it."""

    prompt: str
    answer: str
    language: str
    productions: frozenset[Production]
    names: tuple[str, ...]


@cache
def productions(language: str) -> dict[str, list[Any]]:
    """Slot -> its alternatives. ``unit`` and ``day`` are (text, meaning), ``money`` maps a currency to texts."""
    data = LANGUAGES[language]
    flat = lambda table: [(text, key) for key, texts in table.items() for text in texts.split("|")]  # noqa: E731
    return {
        "opener": data.OPENER, "request": data.REQUEST, "order": data.ORDER, "item": data.ITEM,
        "product": data.PRODUCT, "price": data.PRICE, "joiner": data.JOINER, "due": data.DUE, "front": data.FRONT,
        "note": data.NOTE, "close": data.CLOSE, "separator": data.SEPARATOR, "of": data.OF, "phrase": data.PHRASES,
        "unit": flat(data.UNIT), "day": flat(data.DAY), "money": flat(data.MONEY),
    }  # fmt: skip


def count_productions() -> int:
    """Different productions in both languages."""
    return sum(len({str(a) for a in alternatives}) for lang in LANGUAGES for alternatives in productions(lang).values())


@cache
def held_out(language: str, first: Production, second: Production) -> bool:
    """True for a pair of productions that no training prompt may combine."""
    text = f"{language}|{first[0]}:{first[1]}|{second[0]}:{second[1]}"
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def held_out_combinations(language: str, used: frozenset[Production]) -> list[tuple[Production, Production]]:
    """The held-out pairs among the productions of one prompt."""
    by_slot: dict[str, list[Production]] = {}
    for production in used:
        by_slot.setdefault(production[0], []).append(production)
    return [(a, b) for left, right in PAIRED for a in by_slot.get(left, ()) for b in by_slot.get(right, ()) if held_out(language, a, b)]


def in_test_share(prompt: str) -> bool:
    """True for one prompt in 16, chosen by its text alone (case and white space aside): these are never trained on."""
    return zlib.crc32(" ".join(prompt.casefold().split()).encode()) % 16 == 0


class _Derivation:
    """The choices behind one prompt."""

    def __init__(self, rng: Random, language: str, new_names: bool) -> None:
        self.rng, self.language, self.new_names = rng, language, new_names
        self.slots = productions(language)
        self.used: set[Production] = set()
        self.names: list[str] = []

    def pick(self, slot: str) -> Any:
        """One production of ``slot``, remembered as used."""
        choice = self.rng.choice(self.slots[slot])
        self.used.add((slot, choice if isinstance(choice, str) else choice[0]))
        return choice

    def choose(self) -> None:
        """Everything that the held-out pairs look at, before any text is made."""
        rng = self.rng
        self.order, self.request = self.pick("order"), None
        if "{request}" in self.order:
            self.request = self.pick("request")
        self.item, self.product = self.pick("item"), self.pick("product")
        self.price = self.pick("price") if rng.random() < 0.85 else None
        self.money, self.currency = "", None
        if self.price:
            self.money, self.currency = self.pick("money")
        wants_due = "{due}" in self.order and rng.random() < 0.35
        self.due = self.pick("due") if wants_due else ""
        count = rng.choice((1, 1, 1, 1, 1, 2, 2, 2, 3))
        self.joiner = self.pick("joiner") if count > 1 else ""
        self.units: list[tuple[str, str]] = []
        self.quantities: list[str] = []
        for _ in range(count):
            self.units.append(self.pick("unit") if rng.random() < 0.75 else ("", "unit"))
            self.quantities.append(rng.choice(numbers.QUANTITY_STYLES))
            self.used.add(("quantity", self.quantities[-1]))

    def _quantity(self, style: str) -> tuple[str, int | float, str]:
        if style == "phrase":
            return self.pick("phrase")
        text, value = numbers.draw_number(self.rng, style, self.language)
        return text, value, ""

    def _price(self) -> tuple[str, int | float | None]:
        if self.price is None or self.rng.random() < 0.06:
            return "", None
        text, value = numbers.draw_number(self.rng, self.rng.choice(numbers.PRICE_STYLES), self.language)
        return self.price.format(m=self.money.format(n=noise.shield(text))), value

    def _product(self) -> tuple[str, str]:
        announced = self.product[0].isalpha()
        if announced and not self.new_names and self.rng.random() < 0.1:
            name = names.single_letter(self.rng)
        else:
            name = names.product_name(self.rng, self.new_names)
        self.names.append(name)
        return self.product.format(name=noise.shield(name)), name

    def item_text(self, place: int) -> tuple[str, dict[str, Any]]:
        """The text of one item and its JSON."""
        unit, meaning = self.units[place]
        text, quantity, link = self._quantity(self.quantities[place])
        shown, (price, value), (product, name) = noise.shield(text), self._price(), self._product()
        counted = f"{shown}{link} {unit}" if unit else shown
        counted_of = f"{counted} {self.pick('of')}" if unit else shown + link
        if unit and self.language == "en" and meaning == "unit" and self.rng.random() < 0.3:
            counted_of = counted
        lead = price.strip(" ,.-/") + ", " if price else ""
        line = self.item.format(qu_of=counted_of, qu=counted, p=product, price=price, lead=lead)
        return line, {"product": name, "quantity": quantity, "unit": meaning, "price": value}

    def render(self) -> tuple[str, dict[str, Any]]:
        """The shielded text without noise, and the JSON."""
        rng = self.rng
        pairs = [self.item_text(place) for place in range(len(self.units))]
        day, due, front = None, "", ""
        if self.due or "{front}" in self.order:
            word, day = self.pick("day")
            due = self.due.format(day=word) if self.due else ""
            front = self.pick("front").format(day=word) if "{front}" in self.order else ""
        opener = self.pick("opener") + self.pick("separator") if rng.random() < 0.5 else ""
        close = self.pick("close") if rng.random() < 0.5 else rng.choice(("", "", ".", "!"))
        note = self.pick("note") if "{note}" in self.order else ""
        text = self.order.format(
            open=opener, request=self.request, items=self._join([line for line, _ in pairs]),
            due=due, front=front, close=close, note=note,
        )  # fmt: skip
        text = text.replace("{person}", names.person(rng)).replace("{id}", str(rng.randint(10, 99999)))
        currency = self.currency if any(item["price"] is not None for _, item in pairs) else None
        return text, {"items": [item for _, item in pairs], "currency": currency, "due": day}

    def _join(self, lines: list[str]) -> str:
        if len(lines) == 3 and self.rng.random() < 0.6:
            return lines[0] + ", " + lines[1] + self.joiner + lines[2]
        return self.joiner.join(lines)


def draw_order(rng: Random, split: str = "train") -> Order:
    """One order of ``split`` (see ``SPLITS``); the same ``rng`` state gives the same order."""
    while True:
        language = rng.choice(("es", "en"))
        derivation = _Derivation(rng, language, new_names=split == "names")
        derivation.choose()
        crossed = held_out_combinations(language, frozenset(derivation.used))
        if split == "recombined":
            # A comma also parts the first two of three items, whatever the joiner: training has seen it with every item.
            if sum(COMMA not in pair for pair in crossed) < RECOMBINED_PAIRS:
                continue
        elif crossed:
            continue
        text, content = derivation.render()
        prompt = noise.add_noise(rng, text).strip() + SEPARATOR
        if in_test_share(prompt) == (split == "train"):
            continue
        answer = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        return Order(prompt, answer, language, frozenset(derivation.used), tuple(derivation.names))
